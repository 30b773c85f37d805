"""Manifest, hashes, platform: what is accepted and what is refused, always by the field's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engines.bucket import Bucket
from engines.bundle import (
    EngineFile,
    LatencyRow,
    Manifest,
    check_platform,
    content_version,
    current_platform,
    hash_files,
    read_manifest,
    verify_files,
    write_manifest,
)
from engines.errors import BundleError
from engines.platform import compare_platforms

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
        backend="aotinductor",
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


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "object"), ("\xff", "not JSON")])
def test_manifest_that_is_not_a_json_object_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(BundleError, match=message) as caught:
        read_manifest(tmp_path)
    assert caught.value.field == "manifest.json"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"schema_version": 2}, "schema_version"),
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


def test_version_follows_the_checkpoint_and_nothing_else(eager_bundle: Path, bundle: Path) -> None:
    version = content_version(hash_files(eager_bundle))
    (bundle / "engines").mkdir(exist_ok=True)
    (bundle / "engines" / "decode.pt2").write_bytes(b"compiled elsewhere")
    assert content_version(hash_files(bundle)) == version
    (bundle / "checkpoint" / "student.json").write_text("{}")
    assert content_version(hash_files(bundle)) != version


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


def test_code_for_fewer_instruction_sets_and_an_older_libc_fits(eager_bundle: Path) -> None:
    manifest = with_engine(
        read_manifest(eager_bundle), cpu_flags=(), libc="glibc 2.1", cpu="i386", python="2"
    )
    assert check_platform(manifest) == []


def test_bundle_without_compiled_code_fits_every_machine(eager_bundle: Path) -> None:
    manifest = read_manifest(eager_bundle)
    elsewhere = current_platform().model_copy(update={"torch": "1.0.0"})
    assert check_platform(manifest, elsewhere) == []


def predicting(manifest: Manifest) -> Manifest:
    """A latency table with round numbers."""
    ms = {"text": {1: 1.0, 4: 4.0}, "denoise": {1: 10.0, 4: 25.0}, "decode": {1: 20.0, 4: 80.0}}
    rows = [
        LatencyRow(stage=stage, bucket=BUCKET, batch=batch, backend="eager", ms=value)
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
