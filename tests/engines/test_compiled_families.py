"""SDXL and CogVideoX from checkpoint to pictures through compiled code; two real compilations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import check_platform, read_manifest
from engines.runtime.pipeline import Pipeline, Sample
from tests.engines.conftest import build, build_settings
from tests.engines.tiny import make_tiny_cogvideox, make_tiny_sdxl

# The compiler takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(1800)

MAKERS: dict[str, Callable[[Path], Path]] = {"sdxl": make_tiny_sdxl, "cogvideox": make_tiny_cogvideox}
FRAMES = {"sdxl": 1, "cogvideox": 9}
TOLERANCE = 2
"""Of 255."""


@pytest.mark.parametrize("family", MAKERS)
def test_compiled_bundle_draws_what_eager_draws(family: str, tmp_path: Path) -> None:
    student = MAKERS[family](tmp_path / "student")
    settings = replace(
        build_settings(student, tmp_path / "bundle"), backends=("aotinductor",), batch_sizes=(1, 2)
    )
    bundle = build(settings)
    manifest = read_manifest(bundle)
    assert (manifest.family, manifest.eager_only, check_platform(manifest)) == (family, None, [])
    assert manifest.fps == (8 if family == "cogvideox" else None)
    assert {(row.stage, row.batch) for row in manifest.parity} == {
        (stage, batch) for stage in ("text", "denoise", "decode") for batch in (1, 2)
    }

    bucket = manifest.buckets[0]
    samples = [
        Sample(prompt="a red cube", seed=1, num_steps=4, bucket=bucket),
        Sample(prompt="two blue cones", seed=2, num_steps=1, bucket=bucket),
    ]
    compiled, eager = Pipeline.load(bundle), Pipeline.load(bundle, backend="eager")
    assert compiled.backend == "aotinductor"
    together, reference = compiled.run(samples), eager.run(samples)
    alone = [compiled.run([sample])[0] for sample in samples]
    for row in range(2):
        assert together[row].shape == (FRAMES[family], bucket.height, bucket.width, 3)
        assert together[row].dtype == np.uint8
        for other in (reference[row], alone[row]):
            assert np.abs(together[row].astype(int) - other.astype(int)).max() <= TOLERANCE
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 20
