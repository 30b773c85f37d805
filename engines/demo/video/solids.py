"""Distance functions of the solids that clips show, and rays that walk along them.

A solid is about one unit in radius, centred at the origin; z is up. Points and directions are (K, 3),
distances (K,).
Source: Hart, "Sphere tracing", The Visual Computer 12 (1996).
"""

from collections.abc import Callable

import torch
from torch import Tensor

BOUND = 1.25
"""Radius of a ball around the origin that contains every solid."""

_STEPS = 24
_CLOSE = 0.012


def _ball(p: Tensor) -> Tensor:
    return p.square().sum(1).sqrt() - 0.82


def _cube(p: Tensor) -> Tensor:
    rounding = 0.06
    q = p.abs() - (0.70 - rounding)
    return q.clamp_min(0).square().sum(1).sqrt() + q.amax(1).clamp_max(0) - rounding


def _cone(p: Tensor) -> Tensor:
    height, radius = 0.85, 0.90  # from -height to height
    around = torch.hypot(p[:, 0], p[:, 1])
    slant = (4 * height**2 + radius**2) ** 0.5
    side = (2 * height * around + radius * (p[:, 2] - height)) / slant
    return torch.maximum(side, -height - p[:, 2])


def _ring(p: Tensor) -> Tensor:
    around = torch.hypot(p[:, 0], p[:, 2]) - 0.64
    return torch.hypot(around, p[:, 1]) - 0.24


SOLIDS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "ball": (_ball, 0.82),
    "cube": (_cube, 0.70),
    "cone": (_cone, 0.85),
    "ring": (_ring, 0.88),
}
"""Distance function of each solid, and how high its centre is above the ground that it touches."""


def meets_bound(origin: Tensor, direction: Tensor, bound: float = BOUND) -> Tensor:
    """Which rays, (..., 3) with unit directions, come within `bound` of the origin."""
    along = (origin * direction).sum(-1)
    return (origin.square().sum(-1) - along.square() < bound**2) & (along < 0)


def trace(shape: str, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Walk along rays to a solid.

    Args:
        shape: of `SOLIDS`.
        origin: (K, 3), outside of the bound.
        direction: (K, 3) unit vectors of rays that meet the bound.

    Returns:
        Whether each ray hits, (K,) bool, and the outward normal where it does, (K, 3).
    """
    distance, _ = SOLIDS[shape]
    t = -(origin * direction).sum(1) - BOUND
    p = origin + t[:, None] * direction
    for _ in range(_STEPS):
        p = p + distance(p)[:, None] * direction
    return distance(p) < _CLOSE, _normal(distance, p)


def _normal(distance: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    offsets = torch.eye(3) * 1e-3
    gradient = torch.stack([distance(p + offset) - distance(p - offset) for offset in offsets], dim=1)
    return torch.nn.functional.normalize(gradient, dim=1)


def shade(shape: str, origin: Tensor, direction: Tensor, softness: float = 0.10) -> Tensor:
    """How much of the sun reaches points on the ground, (K,) in [0, 1]: what comes close to a ray dims it.

    Args:
        shape: of `SOLIDS`.
        origin: (K, 3) points.
        direction: (K, 3) unit vectors to the sun.
        softness: width of the half-shadow per distance to what casts it.
    """
    distance, _ = SOLIDS[shape]
    t = (-(origin * direction).sum(1) - 1.5 * BOUND).clamp_min(0.02)
    light = torch.ones_like(t)
    for _ in range(_STEPS // 2):
        d = distance(origin + t[:, None] * direction)
        light = torch.minimum(light, 0.5 + 0.5 * d / (softness * t))
        t = t + d.clamp(0.03, 0.5)
    return light.clamp(0, 1)
