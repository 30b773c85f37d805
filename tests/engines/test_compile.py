"""One real compilation of the tiny student, and the bundle that comes of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from engines.bundle.integrity import check_platform, verify_files
from engines.bundle.manifest import read_manifest
from engines.bundle.platform import current_platform
from engines.bundle.stages import Backend
from engines.compile.aotinductor import CompileJob, compile_key
from engines.compile.verify import verify_bundle
from engines.runtime.pipeline import Pipeline, Sample
from tests.engines.conftest import BATCH_SIZES, build, build_settings
from tests.engines.doubling import BUCKET
from tests.engines.tiny import make_tiny_checkpoint

# The compiler takes a minute on a quiet machine.
pytestmark = pytest.mark.timeout(2400)


def test_compiled_bundle_is_complete_and_fits_this_machine(compiled_bundle: Path) -> None:
    manifest = verify_files(compiled_bundle)
    assert manifest.backend == "aotinductor"
    assert manifest.eager_only is None
    assert check_platform(manifest) == []
    assert {engine.stage for engine in manifest.engines} == {"text", "denoise", "decode"}
    assert {(row.stage, row.batch, row.backend) for row in manifest.latency} == {
        (stage, batch, backend)
        for stage in ("text", "denoise", "decode")
        for batch in BATCH_SIZES
        for backend in ("eager", "aotinductor")
    }
    assert all(row.ms > 0 for row in manifest.latency)
    assert manifest.predict_ms(BUCKET, 4, 2) > manifest.predict_ms(BUCKET, 1, 2)


def test_compiled_code_agrees_with_eager_at_every_batch_size(compiled_bundle: Path) -> None:
    rows = read_manifest(compiled_bundle).parity
    assert {(row.stage, row.batch) for row in rows} == {
        (stage, batch) for stage in ("text", "denoise", "decode") for batch in BATCH_SIZES
    }
    assert all(row.finite and row.cosine >= 0.999 for row in rows)
    assert all(row.max_abs <= 2 for row in rows if row.stage == "decode")


def test_packages_hold_code_and_the_checkpoint_the_weights(compiled_bundle: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    for engine in manifest.engines:
        with safe_open(compiled_bundle / engine.constants, framework="pt") as stream:
            bindings = json.loads(stream.metadata()["bindings"])
            own = set(stream.keys())
        assert bindings
        assert {binding["tensor"] for binding in bindings.values() if binding.get("own")} == own
        # only the table of positions, which no checkpoint stores
        assert own == ({"transformer.pos_embed.pos_embed"} if engine.stage == "denoise" else set())


def test_building_leaves_nothing_behind(compiled_bundle: Path) -> None:
    assert {path.name for path in compiled_bundle.iterdir()} == {"manifest.json", "checkpoint", "engines"}
    modes = {path.stat().st_mode & 0o444 for path in compiled_bundle.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_verification_repeats_the_parity_check(compiled_bundle: Path) -> None:
    verdict = verify_bundle(compiled_bundle)
    assert verdict.mismatches == []
    assert len(verdict.parity) == 3 * len(BATCH_SIZES)


def test_retrained_student_keeps_the_packages_and_draws_with_its_own_weights(
    compiled_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(compiled_bundle, tmp_path / "bundle")
    before = {path.name: path.stat().st_mtime_ns for path in (bundle / "engines").iterdir()}
    student = make_tiny_checkpoint(tmp_path / "student", seed=1)
    build(replace(build_settings(student, bundle), backends=(Backend.AOTINDUCTOR,)))
    after = {path.name: path.stat().st_mtime_ns for path in (bundle / "engines").iterdir()}
    assert after == before
    assert read_manifest(bundle).version != read_manifest(compiled_bundle).version
    samples = [Sample(prompt="a red cube", seed=7, num_steps=2, bucket=BUCKET)]
    retrained, eager, original = (
        Pipeline.load(bundle).run(samples)[0].astype(int),
        Pipeline.load(bundle, backend=Backend.EAGER).run(samples)[0].astype(int),
        Pipeline.load(compiled_bundle).run(samples)[0].astype(int),
    )
    assert np.abs(retrained - eager).max() <= 2
    assert np.abs(retrained - original).max() > 50


def test_key_follows_code_and_machine_but_not_weights(compiled_bundle: Path, tmp_path: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    job = CompileJob(
        family="pixart",
        spec=manifest.stages[1],
        min_batch=1,
        max_batch=4,
        num_threads=1,
        bundle=compiled_bundle,
        platform=current_platform(),
    )
    key = compile_key(job)
    other_weights = tmp_path / "bundle"
    make_tiny_checkpoint(other_weights / "checkpoint", seed=5)
    assert key == manifest.engines[1].key
    assert compile_key(replace(job, bundle=other_weights)) == key
    assert compile_key(replace(job, max_batch=8)) != key
    assert compile_key(replace(job, num_threads=2)) != key
    elsewhere = job.platform.model_copy(update={"torch": "1.0"})
    assert compile_key(replace(job, platform=elsewhere)) != key
