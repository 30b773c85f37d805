"""Random numbers of a batch, of which a process may hold a share of the rows."""

from __future__ import annotations

import torch
from torch import Tensor


class SharedGenerator(torch.Generator):
    """The generator of a batch that several processes share: `uniform` and `normal` draw all rows, keep some.

    Attributes:
        rank, size: which of how many equal shares of the rows is kept.
    """

    rank = 0
    size = 1


def uniform(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Draw evenly from [0, 1), float64 of `shape` (B, ...) with the B rows that this process keeps."""
    whole, rows = _whole(shape, rng)
    return torch.rand(whole, generator=rng, dtype=torch.float64)[rows]


def normal(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Draw unit-variance noise, float32 of `shape` (B, ...) with the B rows that this process keeps."""
    whole, rows = _whole(shape, rng)
    return torch.randn(whole, generator=rng)[rows]


def _whole(shape: tuple[int, ...], rng: torch.Generator) -> tuple[tuple[int, ...], slice]:
    if not isinstance(rng, SharedGenerator):
        return tuple(shape), slice(None)
    batch, *rest = shape
    return (batch * rng.size, *rest), slice(rng.rank * batch, (rng.rank + 1) * batch)
