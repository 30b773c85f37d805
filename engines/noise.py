"""Starting noise that depends on a row's seed and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_latents(
    seeds: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw unit-variance noise, one generator per row, so that a seed gives the same latents in any batch.

    Drawn on the CPU in fp32 whatever `dtype` is: a picture must not change with the device or precision that
    serves it. Each row is what `torch.randn` draws from a generator of that seed, which is also how diffusers
    makes its latents; torch looks at the low 32 bits of a seed.

    Args:
        seeds: B integers in [0, 2**63).
        shape: shape of one row, (C, h, w) for images.
    Returns:
        (B, *shape) on the CPU.
    Raises:
        ValueError: a seed is out of range.
    """
    latents = torch.empty((len(seeds), *shape), dtype=torch.float32)
    for row, seed in zip(latents, seeds, strict=True):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        row.normal_(generator=torch.Generator().manual_seed(seed))
    return latents.to(dtype)
