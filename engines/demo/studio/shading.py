"""Light on surfaces: textures of the ground, sky, sun and shadow, one reflection.

Everything works on lists of M points, `row` saying to which picture each belongs. Vectors and colours are
(3, M).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.demo.studio.scenes import GROUNDS
from engines.demo.studio.solids import Placed, blocked, dot, trace, unit
from engines.demo.studio.staging import Stage

_LIFT = 2e-2
_TILE_MIRROR = 0.16


def _wave(x: Tensor, y: Tensor, a: float, b: float, phase: Tensor) -> Tensor:
    return torch.sin(a * x + b * y + 6.283 * phase)


def _chance(cell: Tensor, seed: Tensor) -> Tensor:
    """A number in [0, 1) for each cell."""
    return (torch.sin(cell * 12.9898 + seed * 78.233) * 43758.5453).frac().abs()


def _grass(x: Tensor, y: Tensor, fade: Tensor, grain: Tensor) -> Tensor:
    """Mown in stripes away from the camera, a little uneven."""
    stripe = torch.tanh(4 * torch.sin(x * 1.55 + y * (grain[0] - 0.5) * 0.5 + 6.283 * grain[1]))
    uneven = _wave(x, y, 2.3, 1.1, grain[2]) + _wave(x, y, -1.2, 2.9, grain[3])
    blades = _wave(x, y, 17.0, 5.0, grain[4]) * _wave(x, y, -6.0, 13.0, grain[5])
    return 1 + 0.17 * stripe * fade + 0.06 * uneven + 0.12 * blades * fade * fade


def _sand(x: Tensor, y: Tensor, fade: Tensor, grain: Tensor) -> Tensor:
    """Ripples across."""
    bend = 0.5 * _wave(x, y, 0.7, 0.3, grain[0]) + 0.25 * _wave(x, y, -1.9, 0.8, grain[1])
    ripple = torch.sin(6.2 * y + (grain[3] - 0.5) * 3 * x + 2.2 * bend + 6.283 * grain[2])
    return 1 + 0.10 * ripple * fade + 0.05 * _wave(x, y, 1.1, 0.6, grain[4])


def _joint(x: Tensor, width: float, fade: Tensor) -> Tensor:
    """1 inside a cell of length one, 0 in the joint between two; the joint fades with distance."""
    inside = ((x - x.floor() - 0.5).abs() * -2 + 1) / width
    return 1 - fade * (1 - inside.clamp(0, 1))


def _stone(x: Tensor, y: Tensor, fade: Tensor, grain: Tensor) -> Tensor:
    """Square slabs with dark joints."""
    x, y = x * 0.8 + grain[0], y * 0.8 + grain[1]
    tint = _chance(x.floor() + 7 * y.floor(), grain[2])
    cloud = 0.05 * _wave(x, y, 5.0, 3.0, grain[3]) * _wave(x, y, -2.0, 6.0, grain[4])
    joint = torch.minimum(_joint(x, 0.10, fade), _joint(y, 0.10, fade))
    return (0.88 + 0.3 * tint * fade + 0.12 * (1 - fade) + cloud) * (0.45 + 0.55 * joint)


def _wood(x: Tensor, y: Tensor, fade: Tensor, grain: Tensor) -> Tensor:
    """Planks that run away from the camera."""
    x = x * 1.35 + grain[0]
    plank = x.floor()
    tint = _chance(plank, grain[1])
    rings = torch.sin(9 * (x - plank) + 1.2 * torch.sin(0.9 * y + 6.283 * tint) + 9 * tint)
    return (0.78 + 0.5 * tint + 0.09 * rings * fade) * (0.35 + 0.65 * _joint(x, 0.07, fade))


def _tiles(x: Tensor, y: Tensor, fade: Tensor, grain: Tensor) -> Tensor:
    """Black and white squares."""
    x, y = x * 1.05 + grain[0], y * 1.05 + grain[1]

    def square(v: Tensor) -> Tensor:  # edges as soft as a pixel is wide there
        return (torch.sin(3.14159 * v) * (6 + 14 * fade * fade)).clamp(-1, 1)

    return 0.52 + 0.48 * square(x) * square(y) * fade


_TEXTURES = {"grass": _grass, "sand": _sand, "stone": _stone, "wood": _wood, "tiles": _tiles}
_FADE = {"grass": 0.035, "sand": 0.045, "stone": 0.09, "wood": 0.08, "tiles": 0.11}


def ground_colour(stage: Stage, row: Tensor, at: Tensor, footprint: Tensor) -> Tensor:
    """Albedo of the ground.

    Args:
        stage: the scenes.
        row: (M,).
        at: (3, M) points on the ground.
        footprint: (M,) length of the ground that one pixel covers there; texture fades where it is large.
    """
    out = stage.earth[row].T.clone()
    kinds = stage.ground[row]
    for number, name in enumerate(GROUNDS):
        mine = (kinds == number).nonzero()[:, 0]
        if len(mine):
            fade = 1 / (1 + (footprint[mine] / _FADE[name]).square())
            grain = stage.grain[row[mine]].T
            out[:, mine] *= _TEXTURES[name](at[0, mine], at[1, mine], fade, grain)
    return out


def sky_colour(stage: Stage, row: Tensor, direction: Tensor) -> Tensor:
    """What is seen in a direction where there is nothing; below the horizon the ground far away."""
    height = (direction[2] / 0.38).clamp(0, 1) ** 0.65
    horizon, zenith = stage.horizon[row].T, stage.zenith[row].T
    colour = horizon + (zenith - horizon) * height
    towards = dot(direction, stage.sun_at[row].T).clamp(0, 1)
    colour = colour + stage.glow[row].T * (towards**6 + 1.5 * towards**40)
    below = (-direction[2] / 0.06).clamp(0, 1)
    far = stage.earth[row].T * (stage.ambient[row] + 0.6 * stage.sun[row]).T
    return colour + (far - colour) * below


@dataclass(frozen=True, slots=True)
class Points:
    """Points of surfaces: which picture and slot (-1: ground) each belongs to, and how light meets it there.

    Attributes:
        row, slot: (M,).
        at, normal, seen_from: (3, M); the last is the direction of the ray that found the point.
        sun_at: (3, M) direction of the sun as this sample sees it.
        albedo: (3, M).
        look: (6, M), see `staging.Look`.
    """

    row: Tensor
    slot: Tensor
    at: Tensor
    normal: Tensor
    seen_from: Tensor
    sun_at: Tensor
    albedo: Tensor
    look: Tensor


def _closeness(stage: Stage, points: Points) -> Tensor:
    """What the solids leave of the sky's light: dark where they touch the ground, darker beneath them."""
    left = torch.ones_like(points.at[0])
    solids = stage.solids
    for slot in range(len(solids.shape)):
        radius = solids.radius[slot][points.row]
        x, y = points.at[0] - solids.x[slot][points.row], points.at[1] - solids.y[slot][points.row]
        apart = (x * x + y * y) / (radius * radius)
        high = (points.at[2] / radius).clamp(0, 2)
        there = (solids.shape[slot][points.row] >= 0) & (points.slot != slot)
        left = left * (1 - 0.62 * there * torch.exp(-1.25 * apart - 1.2 * high))
    own = (points.slot >= 0) * torch.exp(-3.2 * points.at[2].clamp_min(0))
    return left * (1 - 0.45 * own * (1 - points.normal[2].clamp(-1, 1)) * 0.7)


def shade(stage: Stage, points: Points, *, shadows: bool = True) -> Tensor:
    """Light that leaves points towards the camera, mirrored light aside; (3, M)."""
    row = points.row
    lambert = dot(points.normal, points.sun_at).clamp_min(0)
    if shadows:
        facing = (lambert > 0).nonzero()[:, 0]
        lifted = points.at[:, facing] + _LIFT * points.normal[:, facing]
        dark = blocked(stage.solids.at(row[facing]), lifted, points.sun_at[:, facing])
        lambert[facing] = lambert[facing] * ~dark
    sun, ambient = stage.sun[row].T, stage.ambient[row].T
    up = points.normal[2] * 0.5 + 0.5
    bounce = stage.earth[row].T * (ambient + 0.55 * sun) * 0.7
    soft = (bounce + (ambient - bounce) * up) * _closeness(stage, points)
    diffuse, shine, sharpness = points.look[0], points.look[1], points.look[2]
    half = unit(points.sun_at - points.seen_from)
    spark = shine * (lambert > 0) * dot(points.normal, half).clamp_min(0) ** sharpness
    tint = 1 + points.look[5] * (points.albedo - 1)
    return points.albedo * diffuse * (soft + sun * lambert) + 0.8 * sun * spark * tint


def mirrored(stage: Stage, points: Points) -> Tensor:
    """What is added by the mirror images in points; (3, M)."""
    cosine = -dot(points.seen_from, points.normal)
    share = points.look[3] + (points.look[4] - points.look[3]) * (1 - cosine.clamp(0, 1)) ** 5
    out = torch.zeros_like(points.at)
    which = (share > 0.012).nonzero()[:, 0]
    if not len(which):
        return out
    row, normal = points.row[which], points.normal[:, which]
    ray = points.seen_from[:, which]
    ray = unit(ray - 2 * dot(ray, normal) * normal)
    start = points.at[:, which] + _LIFT * normal
    seen = look_along(stage, row, start, ray, points.sun_at[:, which])
    tint = 1 + points.look[5, which] * (points.albedo[:, which] - 1)
    out[:, which] = share[which] * tint * seen
    return out


def look_along(stage: Stage, row: Tensor, start: Tensor, ray: Tensor, sun_at: Tensor) -> Tensor:
    """What single rays see, without further mirrors; (3, M)."""
    found = trace(stage.solids.at(row), start, ray)
    ground = torch.where(ray[2] < -1e-3, -start[2] / ray[2].clamp_max(-1e-3), torch.inf)
    colour = sky_colour(stage, row, ray)
    for on_solid in (True, False):
        hit = found.t < ground if on_solid else (ground < found.t) & (ground < 40)
        mine = hit.nonzero()[:, 0]
        if not len(mine):
            continue
        t = (found.t if on_solid else ground)[mine]
        points = surface(
            stage, row[mine], found.slot[mine], start[:, mine] + t * ray[:, mine], ray[:, mine],
            sun_at[:, mine], found.normal[:, mine], found.local[:, mine], 0.012 * t,
        ) if on_solid else surface(
            stage, row[mine], torch.full_like(row[mine], -1), start[:, mine] + t * ray[:, mine],
            ray[:, mine], sun_at[:, mine], None, None, 0.012 * t,
        )  # fmt: skip
        colour[:, mine] = hazy(stage, row[mine], shade(stage, points), t, on_solid=on_solid)
    return colour


def hazy(stage: Stage, row: Tensor, colour: Tensor, t: Tensor, *, on_solid: bool) -> Tensor:
    """The ground melts into the horizon far away."""
    if on_solid:
        return colour
    return colour + (stage.horizon[row].T - colour) * (1 - torch.exp(-((t / 24.0) ** 2)))


_GROUND_LOOK = (1.0, 0.0, 1.0, 0.0, 0.0, 0.0)
_TILE_LOOK = (0.9, 0.35, 60.0, _TILE_MIRROR, 0.9, 0.0)


def surface(
    stage: Stage,
    row: Tensor,
    slot: Tensor,
    at: Tensor,
    ray: Tensor,
    sun_at: Tensor,
    normal: Tensor | None,
    local: Tensor | None,
    footprint: Tensor,
) -> Points:
    """Colour and material of points of solids, or of the ground where there is no normal."""
    if normal is None or local is None:
        up = torch.zeros_like(at)
        up[2] = 1
        looks = torch.tensor([_GROUND_LOOK, _TILE_LOOK], device=at.device)
        look = looks[(stage.ground[row] == GROUNDS.index("tiles")).long()].T
        return Points(row, slot, at, up, ray, sun_at, ground_colour(stage, row, at, footprint), look)
    colour, second = stage.colour[slot, row].T, stage.second[slot, row].T
    # cells of a third of a cube, whose own sides lie well within them
    cells = (
        ((0.985 * local + torch.tensor([[0.26], [0.26], [0.013]], device=at.device)) / 0.52).floor().sum(0)
    )
    other = stage.checkered[slot, row] & (cells % 2 > 0.5)
    albedo = torch.where(other, second, colour)
    return Points(row, slot, at, normal, ray, sun_at, albedo, stage.look[slot, row].T)


def solids_of(stage: Stage) -> Placed:
    """The solids of all pictures, to be met by rays (3, N, R)."""
    return Placed(*(getattr(stage.solids, name)[:, :, None] for name in Placed.__slots__))
