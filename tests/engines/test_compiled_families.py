"""SDXL and CogVideoX from checkpoint to pictures through compiled code; two real compilations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.bundle.integrity import check_platform
from engines.bundle.manifest import read_manifest
from engines.bundle.stages import Backend
from engines.runtime.pipeline import Pipeline, Sample
from tests.engines.tiny import make_tiny_sdxl
from tests.shared import clips_bundle, compile_bundle

# The compiler takes minutes on a busy machine.
pytestmark = pytest.mark.timeout(1800)

FRAMES = {"sdxl": 1, "cogvideox": 9}
TOLERANCE = 2
"""Of 255."""


def compiled_sdxl_bundle(factory: pytest.TempPathFactory) -> Path:
    """Of a tiny SDXL student, which nothing else needs."""
    folder = factory.mktemp("sdxl")
    compile_bundle(make_tiny_sdxl(folder / "student"), folder / "bundle")
    return folder / "bundle"


BUNDLES = {"sdxl": compiled_sdxl_bundle, "cogvideox": clips_bundle}


@pytest.mark.slow
@pytest.mark.parametrize("family", BUNDLES)
def test_compiled_bundle_draws_what_eager_draws(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bundle = BUNDLES[family](tmp_path_factory)
    manifest = read_manifest(bundle)
    assert (manifest.family, manifest.eager_only, check_platform(manifest)) == (family, None, [])
    assert manifest.fps == (8 if family == "cogvideox" else None)
    assert {(row.stage, row.batch) for row in manifest.parity} == {
        (stage, batch) for stage in ("text", "denoise", "decode") for batch in manifest.batch_sizes
    }

    bucket = manifest.buckets[0]
    samples = [
        Sample(prompt="a red cube", seed=1, num_steps=4, bucket=bucket),
        Sample(prompt="two blue cones", seed=2, num_steps=1, bucket=bucket),
    ]
    compiled, eager = Pipeline.load(bundle), Pipeline.load(bundle, backend=Backend.EAGER)
    assert compiled.backend == "aotinductor"
    together, reference = compiled.run(samples), eager.run(samples)
    alone = [compiled.run([sample])[0] for sample in samples]
    for row in range(2):
        assert together[row].shape == (FRAMES[family], bucket.height, bucket.width, 3)
        assert together[row].dtype == np.uint8
        for other in (reference[row], alone[row]):
            assert np.abs(together[row].astype(int) - other.astype(int)).max() <= TOLERANCE
    assert np.abs(together[0].astype(int) - together[1].astype(int)).max() > 20
