"""TensorRT from module to result, on a stand-in that has exactly what the real bindings have.

The stand-in (`fake_tensorrt.py`) is made of recordings of the released wheels and computes with ONNX Runtime.
What it cannot tell is whether TensorRT builds these networks, and how fast they are.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.__main__ import main
from engines.bundle import platform as platform_module
from engines.bundle.integrity import check_platform, verify_files
from engines.bundle.manifest import read_manifest
from engines.bundle.platform import Platform, compare_for_plan, current_platform
from engines.bundle.stages import Backend
from engines.compile.needed import reason_to_build
from engines.compile.verify import verify_bundle
from engines.errors import BackendUnavailable
from engines.runtime.memory import plan_memory
from engines.runtime.pipeline import Pipeline, Sample
from engines.runtime.tensorrt import import_tensorrt
from tests.engines import fake_tensorrt
from tests.engines.plans import BATCHES, BUCKET, OLDEST, with_gpu

pytestmark = pytest.mark.timeout(2400)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has the version that the plans were built with."""
    from engines.bundle import integrity

    def platform(*_: object) -> Platform:
        return current_platform().model_copy(update={"tensorrt": platform_module.tensorrt_version()})

    monkeypatch.setattr(integrity, "current_platform", platform)


# --- a bundle of plans ---


def test_bundle_of_plans_says_what_it_holds(both_bundle: Path) -> None:
    manifest = verify_files(both_bundle)
    assert (manifest.backend, manifest.compiled_backends) == ("tensorrt", ["tensorrt"])
    assert [engine.stage for engine in manifest.engines] == ["text", "denoise", "decode"]
    for engine in manifest.engines:
        assert engine.profiles == ((1, 1), (2, 3))
        assert (engine.min_batch, engine.max_batch, engine.constants) == (1, 3, "")
        assert engine.scratch_bytes == 3 * fake_tensorrt.SCRATCH_PER_ROW
        assert engine.fused_attention is not None
        assert OLDEST in engine.verified_on
        report = json.loads((both_bundle / engine.report).read_text())
        assert report["tensorrt"] == OLDEST
        assert report["inspector"]["Layers"]
    assert {(row.stage, row.batch, row.backend) for row in manifest.parity} == {
        (stage, batch, "tensorrt") for stage in ("text", "denoise", "decode") for batch in BATCHES
    }
    assert all(row.cosine > 0.999999 for row in manifest.parity)
    hidden = [path.name for path in both_bundle.rglob(".*")]
    assert hidden == [f".timing-{OLDEST}.cache"]


@pytest.mark.usefixtures("here", "fake")
def test_bundle_of_plans_draws_what_eager_draws(both_bundle: Path) -> None:
    pipeline, eager = Pipeline.load(both_bundle), Pipeline.load(both_bundle, backend=Backend.EAGER)
    assert (pipeline.backend, pipeline.warnings) == ("tensorrt", [])
    samples = [
        Sample(prompt="a red cube", seed=1, num_steps=4, bucket=BUCKET),
        Sample(prompt="two blue cones", seed=2, num_steps=1, bucket=BUCKET),
    ]
    for drawn, reference in zip(pipeline.run(samples), eager.run(samples), strict=True):
        assert np.abs(drawn.astype(int) - reference.astype(int)).max() <= 2
    pipeline.warm_up()


@pytest.mark.usefixtures("here", "fake")
def test_verification_repeats_the_parity_check(both_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = verify_bundle(both_bundle)
    assert (verdict.fitting, verdict.mismatches) == (["tensorrt"], [])
    assert len(verdict.parity) == 3 * len(BATCHES)
    assert main(["inspect", str(both_bundle)]) == 0
    assert "tensorrt" in capsys.readouterr().out


def test_memory_of_plans_is_their_files_and_one_scratch(both_bundle: Path) -> None:
    manifest = read_manifest(both_bundle)
    lines = {
        line.what: line.size_bytes for line in plan_memory(both_bundle, manifest, Backend.TENSORRT).lines
    }
    assert lines["scratch of the plans"] == 3 * fake_tensorrt.SCRATCH_PER_ROW
    weights = sum(size for what, size in lines.items() if what.startswith("weights of"))
    assert weights == sum(manifest.files[engine.path].size_bytes for engine in manifest.engines)


@pytest.mark.usefixtures("here")
def test_next_backend_serves_where_the_first_does_not_fit(
    both_bundle: Path, compiled_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans are listed first, packages second; without TensorRT the packages serve and the reason is told."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    plans, packages = read_manifest(both_bundle), read_manifest(compiled_bundle)
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    shutil.copytree(both_bundle / "engines", bundle / "engines", dirs_exist_ok=True)
    data = packages.model_copy(
        update={
            "engines": [*plans.engines, *packages.engines],
            "platform": packages.platform.model_copy(update={"tensorrt": OLDEST}),
            "files": packages.files | {name: one for name, one in plans.files.items() if "engines/" in name},
        }
    )
    (bundle / "manifest.json").write_text(data.model_dump_json())
    pipeline = Pipeline.load(bundle)
    assert pipeline.backend == "aotinductor"
    (warning,) = pipeline.warnings
    assert warning.startswith(
        f"compiled code does not fit this machine (platform.tensorrt: built with {OLDEST}"
    )
    assert warning.endswith("or build the bundle again); aotinductor serves instead")
    with pytest.raises(BackendUnavailable, match=r"platform\.tensorrt"):
        Pipeline.load(bundle, backend=Backend.TENSORRT)
    assert [mismatch.field for mismatch in verify_bundle(bundle).mismatches] == ["tensorrt"]
    assert verify_bundle(bundle).fitting == ["aotinductor"]


def test_backend_that_a_bundle_lacks_is_refused_by_name(compiled_bundle: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no tensorrt engines, only aotinductor; build it with"):
        Pipeline.load(compiled_bundle, backend=Backend.TENSORRT)


# --- platform ---


@pytest.mark.parametrize(
    ("field", "here"),
    [("gpu", "NVIDIA L4"), ("compute_capability", "8.9"), ("tensorrt", "11.1.0.106"), ("driver", "570.1")],
)
def test_plan_of_another_gpu_or_tensorrt_is_refused_with_field_and_remedy(field: str, here: str) -> None:
    (mismatch,) = compare_for_plan(with_gpu(), with_gpu(**{field: here}))
    assert mismatch.field == field
    assert here in str(mismatch)
    assert re.search("build the bundle", str(mismatch))


def test_plan_does_not_ask_for_a_torch_or_a_cpu() -> None:
    built = with_gpu().model_copy(update={"torch": "1.0", "cpu_flags": ("avx4096",), "libc": "glibc 9"})
    assert compare_for_plan(built, with_gpu(driver="590.1")) == []


def test_bundle_is_judged_by_the_backend_that_is_asked_for(both_bundle: Path) -> None:
    manifest = read_manifest(both_bundle)
    elsewhere = manifest.platform.model_copy(update={"torch": "1.0"})
    assert check_platform(manifest, elsewhere) == []
    assert [one.field for one in check_platform(manifest, elsewhere, Backend.AOTINDUCTOR)] == ["torch"]


def test_bundle_with_other_backends_is_built_anew(
    tiny_student: Path, both_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engines.compile import needed

    platform = read_manifest(both_bundle).platform
    monkeypatch.setattr(needed, "current_platform", lambda *_: platform)

    def reason(*backends: Any) -> str | None:
        return reason_to_build(
            tiny_student,
            both_bundle,
            batch_sizes=BATCHES,
            backends=backends,
            num_threads=1,
            decode_dtype="auto",
        )

    assert reason("tensorrt") is None
    assert reason("tensorrt", "aotinductor") == "its engines are tensorrt"


# --- absence ---


def test_asking_for_tensorrt_where_there_is_none_is_an_error_with_the_remedy(
    tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    command = ["build", str(tiny_student), "--out", str(tmp_path / "bundle"), "--backends", "tensorrt"]
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error[backend_unavailable]: tensorrt is not to be had here")
    assert "install the extra tensorrt" in error
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("fake")
def test_plans_are_not_built_for_a_cpu(
    tiny_student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", str(tiny_student), "--out", str(tmp_path / "bundle"), "--device", "cpu"]
    assert main([*command, "--backends", "tensorrt,aotinductor"]) == 2
    assert "plans run on a GPU; use --device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("version", ["8.6.1", "10.14.1", "12.0.0"])
def test_version_that_nobody_checked_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_tensorrt.make(OLDEST)
    module.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(BackendUnavailable, match=f"tensorrt {version} is not supported"):
        import_tensorrt()
