"""Solids of one unit that stand on the ground, and the rays that meet them.

A vector is a (3, ...) tensor. Each solid is intersected in its own frame, its base centre at the origin and
z up; it returns the ray parameter, inf where there is no hit, and the normal, bent near the edges as if they
were rounded. Rays of many pictures are cast at once, on any device.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engines.demo.scenes import SHAPES

Hit = tuple[Tensor, Tensor]

_NEAR = 1e-3
_BEVEL = 0.14
_CUBE = 0.78
_CYLINDER = (0.72, 1.6)
_CONE = (0.92, 1.9)
_TORUS = (0.68, 0.27)
_CENTRE, _BOUND = 0.9, 1.45  # a ball around every solid


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar products of (3, ...) vectors."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(v: Tensor) -> Tensor:
    """Vectors of length one."""
    return v * torch.rsqrt(dot(v, v).clamp_min(1e-12))


def _roots(a: Tensor, half_b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Both roots of a t^2 + 2 half_b t + c in order, inf where there is none."""
    discriminant = half_b * half_b - a * c
    root = discriminant.clamp_min(0).sqrt()
    a = torch.where(a.abs() < 1e-9, 1e-9, a)
    one, two = (-half_b - root) / a, (-half_b + root) / a
    miss = discriminant < 0
    near, far = torch.minimum(one, two), torch.maximum(one, two)
    return near.masked_fill(miss, math.inf), far.masked_fill(miss, math.inf)


def _ahead(t: Tensor, valid: Tensor) -> Tensor:
    return t.masked_fill(~(valid & (t > _NEAR)), math.inf)


def _finite(t: Tensor) -> Tensor:
    return torch.where(torch.isfinite(t), t, 0.0)


def _sphere(o: Tensor, d: Tensor) -> Hit:
    o = torch.stack([o[0], o[1], o[2] - 1])
    t, _ = _roots(dot(d, d), dot(o, d), dot(o, o) - 1)
    t = _ahead(t, t < math.inf)
    return t, o + _finite(t) * d


def _cube(o: Tensor, d: Tensor) -> Hit:
    o = torch.stack([o[0], o[1], o[2] - _CUBE])
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    one, two = (-_CUBE - o) * inverse, (_CUBE - o) * inverse
    enter, leave = torch.minimum(one, two).amax(0), torch.maximum(one, two).amin(0)
    t = _ahead(enter, enter < leave)
    at = (o + _finite(t) * d) / _CUBE
    return t, at.sign() * _rounded(at.abs())


def _rounded(share: Tensor) -> Tensor:
    """How far a normal leans towards a side of which a point has this share of the way."""
    return ((share - (1 - _BEVEL)) / _BEVEL).clamp(0, 1).square()


def _cylinder(o: Tensor, d: Tensor) -> Hit:
    radius, height = _CYLINDER
    side, _ = _roots(d[0] ** 2 + d[1] ** 2, o[0] * d[0] + o[1] * d[1], o[0] ** 2 + o[1] ** 2 - radius**2)
    z = o[2] + _finite(side) * d[2]
    side = _ahead(side, (z > 0) & (z < height))
    cap = (height - o[2]) / d[2]
    x, y = o[0] + cap * d[0], o[1] + cap * d[1]
    cap = _ahead(cap, x * x + y * y < radius**2)
    t = torch.minimum(side, cap)
    x, y, z = o + _finite(t) * d
    around = torch.hypot(x, y).clamp_min(1e-6)
    lean = _rounded(around / radius) / around
    return t, torch.stack([x * lean, y * lean, _rounded(1 - (height - z) / radius)])


def _cone(o: Tensor, d: Tensor) -> Hit:
    radius, height = _CONE
    slope = (radius / height) ** 2
    up = o[2] - height
    a = d[0] ** 2 + d[1] ** 2 - slope * d[2] ** 2
    half_b = o[0] * d[0] + o[1] * d[1] - slope * up * d[2]
    both = []
    for t in _roots(a, half_b, o[0] ** 2 + o[1] ** 2 - slope * up * up):
        z = o[2] + _finite(t) * d[2]
        both.append(_ahead(t, (z > 0) & (z < height)))
    t = torch.minimum(*both)
    x, y, z = o + _finite(t) * d
    return t, torch.stack([x, y, slope * (height - z)])


def _torus(o: Tensor, d: Tensor) -> Hit:
    """A standing ring whose axis is y, by sphere tracing (Hart, The Visual Computer 12, 1996)."""
    major, minor = _TORUS
    o = torch.stack([o[0], o[1], o[2] - (major + minor)])
    near, far = _roots(dot(d, d), dot(o, d), dot(o, o) - (major + minor) ** 2)
    t = _finite(near).clamp_min(_NEAR)
    distance = torch.zeros_like(t)
    for _ in range(24):
        x, y, z = o + t * d
        distance = torch.hypot(torch.hypot(x, z) - major, y) - minor
        t = t + distance
    x, y, z = o + t * d
    inwards = 1 - major / torch.hypot(x, z).clamp_min(1e-6)
    hit = torch.isfinite(near) & (distance.abs() < 6e-3) & (t < far + 1e-2) & (t > 4 * _NEAR)
    return t.masked_fill(~hit, math.inf), torch.stack([x * inwards, y, z * inwards])


_MEET: dict[str, Callable[[Tensor, Tensor], Hit]] = {
    "sphere": _sphere, "cube": _cube, "cone": _cone, "cylinder": _cylinder, "torus": _torus,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Placed:
    """The solids of N pictures in K slots; every field is (K, N).

    Attributes:
        shape: index in `SHAPES`, -1 for none.
        x, y: where it stands.
        cos, sin: of how far it is turned about z.
        radius: length of its unit.
    """

    shape: Tensor
    x: Tensor
    y: Tensor
    cos: Tensor
    sin: Tensor
    radius: Tensor

    def at(self, row: Tensor) -> "Placed":
        """The solids that each of some rays can meet, for rays of these pictures."""
        return Placed(*(getattr(self, name)[:, row] for name in self.__slots__))


@dataclass(frozen=True, slots=True)
class Traced:
    """What rays meet first.

    Attributes:
        t: ray parameter, inf if there is nothing.
        slot: which solid, -1 if none.
        normal: (3, ...) of length one, of the world.
        local: (3, ...) point in the solid's frame, in its units.
    """

    t: Tensor
    slot: Tensor
    normal: Tensor
    local: Tensor


def trace(solids: Placed, origin: Tensor, direction: Tensor) -> Traced:
    """Find the first solid on rays.

    Args:
        solids: fields (K, M), or (K, N, 1) for rays (3, N, R).
        origin: broadcast against `direction`.
        direction: of length one.
    """
    shape = torch.broadcast_shapes(origin.shape, direction.shape)
    size = shape[1:]
    t_all = direction.new_full(size, math.inf)
    slot_all = torch.full(size, -1, device=direction.device)
    normal_all, local_all = direction.new_zeros(shape), direction.new_zeros(shape)
    for slot, where, t, normal, local, (cos, sin) in _met(solids, origin, direction):
        closer = t < t_all.view(-1)[where]
        rays, n, c, s = where[closer], unit(normal[:, closer]), cos[closer], sin[closer]
        t_all.view(-1)[rays] = t[closer]
        slot_all.view(-1)[rays] = slot
        normal_all.view(3, -1)[:, rays] = torch.stack([c * n[0] - s * n[1], s * n[0] + c * n[1], n[2]])
        local_all.view(3, -1)[:, rays] = local[:, closer]
    return Traced(t_all, slot_all, normal_all, local_all)


def blocked(solids: Placed, origin: Tensor, direction: Tensor) -> Tensor:
    """Whether a solid is in the way of rays, as `trace` takes them."""
    shape = torch.broadcast_shapes(origin.shape, direction.shape)
    out = torch.zeros(shape[1:], dtype=torch.bool, device=direction.device)
    for _, where, t, *_ in _met(solids, origin, direction):
        out.view(-1)[where[t < math.inf]] = True
    return out


def _met(
    solids: Placed, origin: Tensor, direction: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Per slot and shape: rays that come near, ray parameter, normal and point in its own frame, its turn."""
    shape = torch.broadcast_shapes(origin.shape, direction.shape)
    size = shape[1:]
    origin, direction = origin.expand(shape), direction.expand(shape)
    for slot in range(len(solids.shape)):
        index = _meets_bound(solids, slot, origin, direction).reshape(-1).nonzero()[:, 0]
        kinds = solids.shape[slot].expand(size).reshape(-1)[index]
        for number, name in enumerate(SHAPES):
            where = index[kinds == number]
            if not len(where):
                continue
            x, y, cos, sin, radius = (
                getattr(solids, field)[slot].expand(size).reshape(-1)[where]
                for field in ("x", "y", "cos", "sin", "radius")
            )
            o, d = (torch.stack([part.reshape(-1)[where] for part in v]) for v in (origin, direction))
            ox, oy = (o[0] - x) / radius, (o[1] - y) / radius
            o = torch.stack([cos * ox + sin * oy, cos * oy - sin * ox, o[2] / radius])
            d = torch.stack([cos * d[0] + sin * d[1], cos * d[1] - sin * d[0], d[2]])
            t, normal = _MEET[name](o, d)
            yield slot, where, t * radius, normal, o + _finite(t) * d, (cos, sin)


def _meets_bound(solids: Placed, slot: int, origin: Tensor, direction: Tensor) -> Tensor:
    radius = solids.radius[slot]
    x, y = origin[0] - solids.x[slot], origin[1] - solids.y[slot]
    z = origin[2] - _CENTRE * radius
    along = x * direction[0] + y * direction[1] + z * direction[2]
    reach = (_BOUND * radius) ** 2
    apart = x * x + y * y + z * z
    return (apart - along * along < reach) & ((along < 0) | (apart < reach)) & (solids.shape[slot] >= 0)
