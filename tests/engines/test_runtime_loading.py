"""Loading a bundle: what makes way for eager, what is refused, and whose weights compiled code gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from engines.bundle import integrity
from engines.bundle.manifest import read_manifest, write_manifest
from engines.bundle.platform import current_platform
from engines.bundle.stages import Backend
from engines.errors import BackendUnavailable, BundleError
from engines.runtime.aotinductor import AotInductorEngine, Constants
from engines.runtime.memory import plan_memory
from engines.runtime.pipeline import Pipeline
from tests.engines.batches import MIXED
from tests.engines.published_form import as_published
from tests.engines.test_memory import with_peaks

# A real compilation may have to run first.
pytestmark = pytest.mark.timeout(2400)


def test_compiled_code_that_does_not_fit_makes_way_for_eager(
    compiled_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = current_platform()
    elsewhere = here.model_copy(update={"torch": "9.9.9", "cpu_flags": ()})
    monkeypatch.setattr(integrity, "current_platform", lambda *_: elsewhere)
    pipeline = Pipeline.load(compiled_bundle)
    assert pipeline.backend == "eager"
    (warning,) = pipeline.warnings
    assert "platform.torch" in warning
    assert "platform.cpu_flags" in warning
    assert pipeline.run(MIXED[:1])[0].shape == (1, 64, 64, 3)
    with pytest.raises(BackendUnavailable, match=r"platform\.torch") as caught:
        Pipeline.load(compiled_bundle, backend=Backend.AOTINDUCTOR)
    assert caught.value.code == "backend_unavailable"


def test_compiled_code_that_does_not_load_makes_way_for_eager(compiled_bundle: Path, tmp_path: Path) -> None:
    """As on a machine that lacks a shared library: hashes and platform are right, loading still fails."""
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    data = json.loads((bundle / "manifest.json").read_text())
    path = data["engines"][0]["path"]
    (bundle / path).write_bytes(b"PK\x03\x04 no package at all")
    data["files"][path] = integrity.hash_file(bundle / path).model_dump()
    (bundle / "manifest.json").write_text(json.dumps(data))
    pipeline = Pipeline.load(bundle)
    assert pipeline.backend == "eager"
    assert path in pipeline.warnings[0]
    assert pipeline.run(MIXED[:1])


def test_bundle_without_compiled_code_serves_with_a_warning(eager_bundle: Path) -> None:
    pipeline = Pipeline.load(eager_bundle)
    assert pipeline.backend == "eager"
    assert "no compiled code" in pipeline.warnings[0]
    with pytest.raises(BackendUnavailable, match="no compiled code"):
        Pipeline.load(eager_bundle, backend=Backend.AOTINDUCTOR)


def test_damaged_bundle_is_refused_by_the_fields_name(compiled_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    path = read_manifest(bundle).engines[0].path
    data = bytearray((bundle / path).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / path).write_bytes(data)
    with pytest.raises(BundleError, match="sha256") as caught:
        Pipeline.load(bundle)
    assert caught.value.field == f"files.{path}"


def test_unsupported_scheduler_is_refused_by_the_fields_name(eager_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(eager_bundle, tmp_path / "bundle")
    path = bundle / "checkpoint" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "beta_schedule": "cosine"}))
    manifest = read_manifest(bundle)
    files = integrity.hash_files(bundle)
    version = integrity.content_version(files, manifest.buckets)
    write_manifest(bundle, manifest.model_copy(update={"files": files, "version": version}))
    with pytest.raises(BundleError, match=r"^checkpoint\.scheduler: .*cosine"):
        Pipeline.load(bundle)


def test_package_with_foreign_constants_is_refused(compiled_bundle: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    spec, engine = manifest.stages[0], manifest.engines[0]
    constants = Constants(compiled_bundle).bind(spec, engine)
    constants.pop(next(iter(constants)))
    with pytest.raises(BundleError, match="constants"):
        AotInductorEngine(compiled_bundle / engine.path, constants, min_batch=1, max_batch=4)


def test_constants_are_read_once_and_shared(compiled_bundle: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    constants = Constants(compiled_bundle)
    for spec, engine in zip(manifest.stages, manifest.engines, strict=True):
        first, second = constants.bind(spec, engine), constants.bind(spec, engine)
        assert all(first[name] is second[name] for name in first)
        assert {str(tensor.dtype) for tensor in first.values()} == {"torch.float32"}


def test_missing_weight_is_refused_by_its_name(compiled_bundle: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from engines.families.weights import load_weights

    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    part = bundle / "checkpoint" / "transformer"
    weights = load_weights(part)
    del weights["proj_out.bias"]
    save_file(weights, next(part.glob("*.safetensors")))
    manifest = read_manifest(bundle)
    with pytest.raises(BundleError, match=r"checkpoint\.transformer\.proj_out\.bias: missing"):
        Constants(bundle).bind(manifest.stages[1], manifest.engines[1])


def test_packages_find_the_weights_of_a_published_folder(compiled_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    as_published(bundle / "checkpoint")
    manifest = read_manifest(bundle)
    modern, published = Constants(compiled_bundle), Constants(bundle)
    for spec, engine in zip(manifest.stages, manifest.engines, strict=True):
        found, expected = published.bind(spec, engine), modern.bind(spec, engine)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    planned = with_peaks(manifest, Backend.AOTINDUCTOR)
    assert plan_memory(bundle, planned).lines == plan_memory(compiled_bundle, planned).lines


def test_loading_a_compiled_bundle_imports_neither_diffusers_nor_transformers(compiled_bundle: Path) -> None:
    """They take seconds, at every start of a worker."""
    import subprocess
    import sys

    script = (
        "import sys; from pathlib import Path; from engines.runtime.pipeline import Pipeline;"
        f"assert Pipeline.load(Path({str(compiled_bundle)!r})).backend == 'aotinductor';"
        "print(*sorted({'diffusers', 'transformers', 'torch._inductor'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
