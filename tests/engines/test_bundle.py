"""Manifest, hashes, platform: what is accepted and what is refused, always by the field's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.bundle.bucket import Bucket
from engines.bundle.integrity import check_platform, content_version, hash_files, verify_files
from engines.bundle.latency import LatencyRow
from engines.bundle.manifest import EngineFile, Manifest, read_manifest, write_manifest
from engines.bundle.platform import Gpu, Platform, compare_platforms, current_platform, parse_gpus
from engines.bundle.stages import Backend
from engines.errors import BundleError

BUCKET = Bucket(64, 64)


@pytest.fixture
def bundle(eager_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return shutil.copytree(eager_bundle, tmp_path / "bundle")


def edit(bundle: Path, **fields: Any) -> None:
    """Overwrite fields of a manifest, whatever the schema says."""
    data = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**data, **fields}))


def with_engine(manifest: Manifest, **platform: Any) -> Manifest:
    """A manifest that claims compiled code, built on another platform."""
    engine = EngineFile(
        stage="decode",
        bucket=BUCKET,
        backend=Backend.AOTINDUCTOR,
        min_batch=1,
        max_batch=4,
        path="engines/decode.pt2",
        constants="engines/decode.safetensors",
        key="0" * 64,
    )
    built_on = current_platform().model_copy(update=platform)
    return manifest.model_copy(update={"engines": [engine], "platform": built_on})


def test_manifest_survives_writing_and_reading(eager_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(eager_bundle)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert manifest.buckets == [BUCKET]
    assert manifest.timesteps[4] == [999, 749, 499, 249]


def test_untouched_bundle_verifies(eager_bundle: Path) -> None:
    assert verify_files(eager_bundle).name == "tiny"


def test_directory_without_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"^manifest\.json: not found"):
        read_manifest(tmp_path)


def test_manifest_of_version_1_is_still_read(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    data = json.loads((bundle / "manifest.json").read_text())
    del data["fps"]
    for stage in data["stages"]:
        (stage["part"],), (stage["output"],) = stage.pop("parts"), stage.pop("outputs")
    (bundle / "manifest.json").write_text(json.dumps({**data, "schema_version": 1}))
    assert read_manifest(bundle) == manifest.model_copy(update={"schema_version": 1})


def test_manifest_of_version_3_is_of_a_bundle_for_the_cpu(bundle: Path) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    del data["device"]
    for field in ("gpu", "compute_capability", "cuda", "driver"):
        del data["platform"][field]
    for row in data["latency"]:
        del row["graph_ms"], row["peak_bytes"]
    (bundle / "manifest.json").write_text(json.dumps({**data, "schema_version": 3}))
    manifest = read_manifest(bundle)
    assert (manifest.device, manifest.platform.gpu) == ("cpu", "")
    assert manifest.latency[0].served_ms == manifest.latency[0].ms


def test_manifest_of_version_2_has_no_criteria(bundle: Path) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    gate = {"passed": False, "forced": True}
    (bundle / "manifest.json").write_text(json.dumps({**data, "schema_version": 2, "gate": gate}))
    verdict = read_manifest(bundle).gate
    assert (verdict.summary, verdict.criteria) == ("failed, forced", ())


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "object"), ("\xff", "not JSON")])
def test_manifest_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=message) as caught:
        read_manifest(tmp_path)
    assert caught.value.field == "manifest.json"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"schema_version": 6}, "schema_version"),
        ({"name": "../evil"}, "name"),
        ({"kind": "audio"}, "kind"),
        ({"surprise": 1}, "surprise"),
        ({"buckets": ["64*64"]}, "buckets.0"),
        ({"batch_sizes": []}, "batch_sizes"),
        ({"guidance_scale": 4.5}, "guidance_scale"),
        ({"default_num_steps": 3}, "default_num_steps"),
        ({"timesteps": {"1": [999], "2": [999], "4": [999, 749, 499, 249]}}, "timesteps.2"),
        ({"stages": []}, "stages"),
        ({"files": {"../../etc/passwd": {"sha256": "0" * 64, "size_bytes": 1}}}, "files.../../etc/passwd"),
        ({"files": {"/etc/passwd": {"sha256": "0" * 64, "size_bytes": 1}}}, "files./etc/passwd"),
    ],
)
def test_bad_field_is_refused_by_name(bundle: Path, fields: dict[str, Any], field: str) -> None:
    edit(bundle, **fields)
    with pytest.raises(BundleError) as caught:
        read_manifest(bundle)
    assert caught.value.field == field
    assert caught.value.code == "bundle_invalid"


def test_missing_field_is_refused_by_name(bundle: Path) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    del data["max_text_tokens"]
    (bundle / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"^max_text_tokens: "):
        read_manifest(bundle)


WEIGHTS = "checkpoint/transformer/diffusion_pytorch_model.safetensors"


def test_wrong_hash_is_refused(bundle: Path) -> None:
    data = bytearray((bundle / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (bundle / WEIGHTS).write_bytes(data)
    with pytest.raises(BundleError, match="sha256") as caught:
        verify_files(bundle)
    assert caught.value.field == f"files.{WEIGHTS}"


def test_truncated_file_is_refused(bundle: Path) -> None:
    data = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(BundleError, match="bytes") as caught:
        verify_files(bundle)
    assert caught.value.field == f"files.{WEIGHTS}"


def test_missing_file_is_refused(bundle: Path) -> None:
    (bundle / WEIGHTS).unlink()
    with pytest.raises(BundleError, match="is missing") as caught:
        verify_files(bundle)
    assert caught.value.field == f"files.{WEIGHTS}"


def test_added_file_is_refused(bundle: Path) -> None:
    (bundle / "checkpoint" / "vae" / "extra.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match="not part of this bundle") as caught:
        verify_files(bundle)
    assert caught.value.field == "files.checkpoint/vae/extra.safetensors"


def test_version_of_another_checkpoint_is_refused(bundle: Path) -> None:
    edit(bundle, version="0123456789ab")
    with pytest.raises(BundleError, match=r"^version: "):
        verify_files(bundle)


def test_version_follows_the_checkpoint_and_the_sizes_and_nothing_else(
    eager_bundle: Path, bundle: Path
) -> None:
    buckets = read_manifest(eager_bundle).buckets
    version = content_version(hash_files(eager_bundle), buckets)
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "decode.pt2").write_bytes(b"compiled elsewhere")
    assert content_version(hash_files(bundle), buckets) == version
    assert content_version(hash_files(bundle), [*buckets, Bucket(96, 64)]) != version
    (bundle / "checkpoint" / "student.json").write_text("{}")
    assert content_version(hash_files(bundle), buckets) != version


def test_version_that_says_nothing_of_sizes_is_that_of_an_older_bundle(bundle: Path) -> None:
    before_sizes = content_version(hash_files(bundle), ())
    edit(bundle, version=before_sizes)
    with pytest.raises(BundleError, match=r"^version: "):
        verify_files(bundle)
    edit(bundle, version=before_sizes, schema_version=4)
    assert verify_files(bundle).version == before_sizes


def test_this_machine_fits_itself(eager_bundle: Path) -> None:
    here = current_platform()
    assert here.torch
    assert here.machine
    assert compare_platforms(here, here) == []
    assert check_platform(with_engine(read_manifest(eager_bundle))) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("torch", "1.0.0"), ("machine", "sparc"), ("os", "plan9"), ("libc", "glibc 9.99")],
)
def test_mismatch_names_its_field(eager_bundle: Path, field: str, value: str) -> None:
    (mismatch,) = check_platform(with_engine(read_manifest(eager_bundle), **{field: value}))
    assert mismatch.field == field
    assert f"platform.{field}: built with {value}" in str(mismatch)


def test_code_for_more_instruction_sets_than_this_cpu_has_does_not_fit(eager_bundle: Path) -> None:
    flags = (*current_platform().cpu_flags, "avx4096")
    (mismatch,) = check_platform(with_engine(read_manifest(eager_bundle), cpu_flags=flags))
    assert (mismatch.field, mismatch.built_with) == ("cpu_flags", "avx4096")


H100 = {"gpu": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "cuda": "13.0", "driver": "580.65.06"}


def on_gpu(**changes: str) -> Platform:
    """This machine with a GPU."""
    return current_platform().model_copy(update={**H100, **changes})


def test_code_for_a_gpu_fits_the_same_kind_and_a_newer_driver(eager_bundle: Path) -> None:
    manifest = with_engine(read_manifest(eager_bundle), **H100)
    assert check_platform(manifest, on_gpu()) == []
    assert check_platform(manifest, on_gpu(driver="590.1")) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "gpu",
            "NVIDIA H200",
            "built with NVIDIA H100 80GB HBM3, here NVIDIA H200; build the bundle on a GPU",
        ),
        ("gpu", "", "built with NVIDIA H100 80GB HBM3, here no GPU; build the bundle on a GPU"),
        ("compute_capability", "8.0", "built with 9.0, here 8.0; build the bundle on a GPU"),
        ("cuda", "12.8", "built with 13.0, here 12.8; install the same build of torch"),
        ("driver", "575.57.08", "built with 580.65.06, here 575.57.08; update the driver"),
    ],
)
def test_other_gpu_does_not_fit_and_says_what_to_do(
    eager_bundle: Path, field: str, value: str, message: str
) -> None:
    manifest = with_engine(read_manifest(eager_bundle), **H100)
    (mismatch,) = check_platform(manifest, on_gpu(**{field: value}))
    assert mismatch.field == field
    assert str(mismatch).startswith(f"platform.{field}: {message}")


def test_code_for_a_cpu_does_not_care_about_gpus(eager_bundle: Path) -> None:
    manifest = with_engine(read_manifest(eager_bundle))
    assert check_platform(manifest, on_gpu()) == []


def test_gpus_are_read_as_the_driver_prints_them() -> None:
    printed = "GPU-1, NVIDIA H200, 9.0, 580.65.06\nGPU-2, NVIDIA H200, 9.0, 580.65.06\n"
    assert parse_gpus(printed) == [
        Gpu(uuid=uuid, name="NVIDIA H200", compute_capability="9.0", driver="580.65.06")
        for uuid in ("GPU-1", "GPU-2")
    ]
    assert parse_gpus("No devices were found\n") == []


def test_gpu_is_found_through_the_driver_and_cuda_through_torchs_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'GPU-1, NVIDIA H200, 9.0, 580.65.06'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    found = current_platform("cuda")
    assert (found.gpu, found.compute_capability, found.driver) == ("NVIDIA H200", "9.0", "580.65.06")
    assert found.cuda == (torch.version.cuda or "")
    assert current_platform().gpu == ""


def test_code_for_fewer_instruction_sets_and_an_older_libc_fits(eager_bundle: Path) -> None:
    manifest = with_engine(
        read_manifest(eager_bundle), cpu_flags=(), libc="glibc 2.1", cpu="i386", python="2"
    )
    assert check_platform(manifest) == []


def test_bundle_without_compiled_code_fits_every_machine(eager_bundle: Path) -> None:
    manifest = read_manifest(eager_bundle)
    elsewhere = current_platform().model_copy(update={"torch": "1.0.0"})
    assert check_platform(manifest, elsewhere) == []


def test_prediction_takes_the_graph_where_it_is_faster(eager_bundle: Path) -> None:
    manifest = predicting(read_manifest(eager_bundle))
    rows = [row.model_copy(update={"graph_ms": row.ms / 2}) for row in manifest.latency]
    slower = [row.model_copy(update={"graph_ms": row.ms * 2}) for row in manifest.latency]
    plain = manifest.predict_ms(BUCKET, 4, 1)
    assert manifest.model_copy(update={"latency": rows}).predict_ms(BUCKET, 4, 1) == plain / 2
    assert manifest.model_copy(update={"latency": slower}).predict_ms(BUCKET, 4, 1) == plain


def predicting(manifest: Manifest) -> Manifest:
    """A latency table with round numbers."""
    ms = {"text": {1: 1.0, 4: 4.0}, "denoise": {1: 10.0, 4: 25.0}, "decode": {1: 20.0, 4: 80.0}}
    rows = [
        LatencyRow(stage=stage, bucket=BUCKET, batch=batch, backend=Backend.EAGER, ms=value)
        for stage, table in ms.items()
        for batch, value in table.items()
    ]
    return manifest.model_copy(update={"latency": rows})


@pytest.mark.parametrize(
    ("num_steps", "batch", "ms"),
    [
        (1, 1, 1 + 10 + 20),
        (4, 1, 1 + 40 + 20),
        (4, 4, 4 + 100 + 80),
        (1, 2, 2 + 15 + 40),  # on the line between 1 and 4
        (1, 8, 8 + 50 + 160),  # in proportion beyond 4
    ],
)
def test_prediction_adds_the_stages_up(eager_bundle: Path, num_steps: int, batch: int, ms: float) -> None:
    assert predicting(read_manifest(eager_bundle)).predict_ms(BUCKET, num_steps, batch) == pytest.approx(ms)


def test_prediction_for_an_unmeasured_bucket_is_refused(eager_bundle: Path) -> None:
    with pytest.raises(ValueError, match="32x32"):
        predicting(read_manifest(eager_bundle)).predict_ms(Bucket(32, 32), 1, 1)
