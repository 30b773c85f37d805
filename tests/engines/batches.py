"""Batches of samples, and how far two pictures are apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.bundle.bucket import Bucket
from engines.runtime.pipeline import Sample

BUCKET = Bucket(64, 64)
TOLERANCE = 2
"""Of 255. What a row may change with the batch around it: other batch sizes add up in another order."""


def make_sample(prompt: str = "a red cube", seed: int = 0, num_steps: int = 4) -> Sample:
    return Sample(prompt=prompt, seed=seed, num_steps=num_steps, bucket=BUCKET)


MIXED = [
    make_sample("a red cube", seed=1, num_steps=4),
    make_sample("a blue sphere left of a cone", seed=2, num_steps=1),
    make_sample("", seed=2**63 - 1, num_steps=2),
]


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())
