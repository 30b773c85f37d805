"""Manifests of bundles that need not exist: what a worker would announce."""

from __future__ import annotations

from typing import Any

from engines.bundle.manifest import Manifest
from engines.bundle.platform import current_platform

EXAMPLES = ["a large red sphere on the left, on grass, at sunset", "a blue cube"]


def make_manifest(name: str = "scenes", **changes: Any) -> Manifest:
    """An image model of 64x64 and 96x64 pixels (height x width), at 20 ms + 10 ms per sample and stage."""
    buckets = ["64x64", "96x64"]
    stages: list[dict[str, Any]] = [
        {"name": stage, "part": stage, "bucket": None, "inputs": [], "output": OUTPUT}
        for stage in ("text", "denoise", "decode")
    ]
    latency = [
        {"stage": stage, "bucket": None, "batch": batch, "backend": "eager", "ms": 20 + 10 * batch}
        for stage in ("text", "denoise", "decode")
        for batch in (1, 2, 4, 8)
    ]
    fields = {
        "schema_version": 1,
        "name": name,
        "kind": "image",
        "family": "pixart",
        "version": "0123456789ab",
        "created": "2026-01-01T00:00:00Z",
        "software": {},
        "platform": current_platform().model_dump(),
        "buckets": buckets,
        "num_steps": [1, 2, 4],
        "default_num_steps": 4,
        "timesteps": {1: [999], 2: [999, 499], 4: [999, 749, 499, 249]},
        "solver": "ddim",
        "guidance_scale": 1.0,
        "max_text_tokens": 20,
        "batch_sizes": [1, 2, 4, 8],
        "num_threads": 1,
        "stages": stages,
        "engines": [],
        "eager_only": "no compiled code in this test",
        "latency": latency,
        "parity": [],
        "gate": {"passed": None, "forced": False},
        "student": {"examples": EXAMPLES},
        "files": {},
    }
    return Manifest.model_validate({**fields, **changes})


def make_video_manifest(name: str = "clips", **changes: Any) -> Manifest:
    """A video model at 8 frames a second: 32x32 with 9 or 17 frames, and 48x32 (height x width) with 9."""
    return make_manifest(
        name,
        **{
            "kind": "video",
            "family": "cogvideox",
            "fps": 8,
            "buckets": ["32x32x9", "32x32x17", "48x32x9"],
            "student": {},
            **changes,
        },
    )


OUTPUT = {"name": "out", "dtype": "float32", "shape": [1]}
