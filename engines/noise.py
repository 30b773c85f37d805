"""Starting noise that depends on a row's seed and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SEEDS_OF_TORCH = 2**32
"""As many as a CPU generator of torch (MT19937) tells apart."""


def seeded_latents(
    seeds: Sequence[int], shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw unit-variance noise, one generator per row, so that a seed gives the same latents in any batch.

    Drawn on the CPU in fp32 whatever `dtype` is: a picture must not change with the device or precision that
    serves it. For seeds below 2**32 a row is what `torch.randn` draws from a generator of that seed, which is
    also how diffusers makes its latents. That generator looks at the low 32 bits of a seed; the high ones, if
    there are any, have noise of their own that is mixed in.

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
        low, high = seed % SEEDS_OF_TORCH, seed // SEEDS_OF_TORCH
        row.normal_(generator=torch.Generator().manual_seed(low))
        if high:
            # The second draw of its generator, so that equal halves do not add the same noise twice; unequal
            # weights, so that swapped halves differ. 0.6^2 + 0.8^2 = 1 keeps the variance.
            _, own = torch.randn((2, *shape), generator=torch.Generator().manual_seed(high))
            row.mul_(0.6).add_(own, alpha=0.8)
    return latents.to(dtype)
