"""Pictures of scenes, drawn by analytic ray casting.

Units: the ground is the plane z = 0, x runs to the right, y away from the camera, one unit is about the
radius of a large sphere. Vectors are triples of (N, R) tensors: N images, R rays. A solid is intersected in
its own frame: its base centre at the origin, turned about z. Every intersection returns the ray parameter
(inf = miss) and the normal.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engines.demo.scenes import COLOURS, GROUNDS, SKIES, Scene, said

IMAGE_SIZE = 64

Vector = tuple[Tensor, Tensor, Tensor]
Hit = tuple[Tensor, Vector]

_CAMERA = (0.0, -6.6, 2.55)
_LOOK_AT = (0.0, 0.0, 0.70)
_FIELD_OF_VIEW_DEG = 37.0
_EPS = 1e-3


def _dot(a: Vector, b: Vector) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _along(origin: Vector, direction: Vector, t: Tensor) -> Vector:
    return (origin[0] + t * direction[0], origin[1] + t * direction[1], origin[2] + t * direction[2])


def _normalised(v: Vector) -> Vector:
    scale = torch.rsqrt(_dot(v, v).clamp_min(1e-12))
    return (v[0] * scale, v[1] * scale, v[2] * scale)


def _quadratic(a: Tensor, half_b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Both roots of a t² + 2 half_b t + c, (inf, inf) where there is none."""
    discriminant = half_b * half_b - a * c
    root = discriminant.clamp_min(0).sqrt()
    a = torch.where(a.abs() < 1e-9, torch.full_like(a, 1e-9), a)
    near, far = (-half_b - root) / a, (-half_b + root) / a
    miss = discriminant < 0
    return torch.where(miss, math.inf, torch.minimum(near, far)), torch.where(
        miss, math.inf, torch.maximum(near, far)
    )


def _first(t: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid & (t > _EPS), t, math.inf)


def _finite(t: Tensor) -> Tensor:
    return torch.where(torch.isfinite(t), t, 0.0)


def _hit_sphere(origin: Vector, direction: Vector, r: Tensor) -> Hit:
    o = (origin[0], origin[1], origin[2] - r)
    t, _ = _quadratic(_dot(direction, direction), _dot(o, direction), _dot(o, o) - r * r)
    t = _first(t, t < math.inf)
    return t, _normalised(_along(o, direction, _finite(t)))


def _hit_cube(origin: Vector, direction: Vector, r: Tensor) -> Hit:
    half = 0.78 * r
    o = (origin[0], origin[1], origin[2] - half)
    enter, leave = torch.full_like(direction[0], -math.inf), torch.full_like(direction[0], math.inf)
    axis = torch.zeros_like(direction[0])
    for i in range(3):
        inverse = 1.0 / torch.where(
            direction[i].abs() < 1e-9, torch.full_like(direction[i], 1e-9), direction[i]
        )
        a, b = (-half - o[i]) * inverse, (half - o[i]) * inverse
        near = torch.minimum(a, b)
        axis = torch.where(near > enter, float(i), axis)
        enter, leave = torch.maximum(enter, near), torch.minimum(leave, torch.maximum(a, b))
    t = _first(enter, enter < leave)
    normal = tuple(torch.where(axis == i, -torch.sign(direction[i]), 0.0) for i in range(3))
    return t, (normal[0], normal[1], normal[2])


def _hit_cylinder(origin: Vector, direction: Vector, r: Tensor) -> Hit:
    radius, height = 0.72 * r, 1.6 * r
    a = direction[0] ** 2 + direction[1] ** 2
    half_b = origin[0] * direction[0] + origin[1] * direction[1]
    side, _ = _quadratic(a, half_b, origin[0] ** 2 + origin[1] ** 2 - radius**2)
    z = origin[2] + _finite(side) * direction[2]
    side = _first(side, (z > 0) & (z < height))
    cap = (height - origin[2]) / direction[2]
    x, y, _ = _along(origin, direction, cap)
    cap = _first(cap, x * x + y * y < radius**2)
    t = torch.minimum(side, cap)
    x, y, _ = _along(origin, direction, _finite(t))
    on_cap = cap < side
    zero = torch.zeros_like(t)
    return t, (torch.where(on_cap, zero, x / radius), torch.where(on_cap, zero, y / radius), on_cap.float())


def _hit_cone(origin: Vector, direction: Vector, r: Tensor) -> Hit:
    radius, height = 0.92 * r, 1.9 * r
    slope = (radius / height) ** 2
    up = origin[2] - height
    a = direction[0] ** 2 + direction[1] ** 2 - slope * direction[2] ** 2
    half_b = origin[0] * direction[0] + origin[1] * direction[1] - slope * up * direction[2]
    c = origin[0] ** 2 + origin[1] ** 2 - slope * up * up
    near, far = _quadratic(a, half_b, c)
    hits = []
    for t in (near, far):
        z = origin[2] + _finite(t) * direction[2]
        hits.append(_first(t, (z > 0) & (z < height)))
    t = torch.minimum(hits[0], hits[1])
    x, y, z = _along(origin, direction, _finite(t))
    return t, _normalised((x, y, slope * (height - z) + torch.zeros_like(x)))


def _hit_torus(origin: Vector, direction: Vector, r: Tensor) -> Hit:
    """A standing ring whose axis is y, by sphere tracing."""
    major, minor = 0.68 * r, 0.27 * r
    o = (origin[0], origin[1], origin[2] - (major + minor))
    near, far = _quadratic(_dot(direction, direction), _dot(o, direction), _dot(o, o) - (major + minor) ** 2)
    t = _finite(near).clamp_min(_EPS)
    x, y, z = _along(o, direction, t)
    distance = torch.zeros_like(t)
    for _ in range(28):
        ring = (x * x + z * z).sqrt() - major
        distance = (ring * ring + y * y).sqrt() - minor
        t = t + distance
        x, y, z = _along(o, direction, t)
    around = (x * x + z * z).sqrt().clamp_min(1e-6)
    hit = torch.isfinite(near) & (distance.abs() < 4e-3) & (t < far + 1e-2) & (t > 4 * _EPS)
    normal = _normalised((x * (1 - major / around), y, z * (1 - major / around)))
    return torch.where(hit, t, math.inf), normal


_INTERSECT: dict[str, Callable[[Vector, Vector, Tensor], Hit]] = {
    "sphere": _hit_sphere,
    "cube": _hit_cube,
    "cone": _hit_cone,
    "cylinder": _hit_cylinder,
    "torus": _hit_torus,
}


@dataclass(slots=True)
class _Placed:
    """One solid slot of a chunk of images; every field is (N,)."""

    shape: list[str | None]
    x: Tensor
    y: Tensor
    turn: Tensor
    radius: Tensor
    colour: Tensor  # (N, 3)
    gloss: Tensor


def _cast(solid: _Placed, origin: Vector, direction: Vector) -> Hit:
    """Intersect the rays of each image with the solid in this slot; (N, R) in and out.

    Only the few rays that meet the solid's bounding sphere go through the exact intersection.
    """
    shape = torch.broadcast_shapes(origin[0].shape, direction[0].shape)
    t_all = torch.full(shape, math.inf)
    normal_all = (torch.zeros(shape), torch.zeros(shape), torch.zeros(shape))
    centre = (solid.x[:, None], solid.y[:, None], 0.95 * solid.radius[:, None])
    o = (origin[0] - centre[0], origin[1] - centre[1], origin[2] - centre[2])
    along = _dot(o, direction)
    inside = _dot(o, o) - along * along < (1.55 * solid.radius[:, None]) ** 2  # directions are unit vectors
    for name, intersect in _INTERSECT.items():
        of_shape = torch.tensor([s == name for s in solid.shape])
        if not of_shape.any():
            continue
        row, ray = (inside & of_shape[:, None]).nonzero(as_tuple=True)
        cos, sin = solid.turn.cos()[row], solid.turn.sin()[row]
        ox, oy, oz = (component.expand(shape)[row, ray] for component in o)
        dx, dy, dz = (component.expand(shape)[row, ray] for component in direction)
        local_origin = (cos * ox + sin * oy, cos * oy - sin * ox, oz + 0.95 * solid.radius[row])
        t, n = intersect(local_origin, (cos * dx + sin * dy, cos * dy - sin * dx, dz), solid.radius[row])
        t_all[row, ray] = t
        turned = (cos * n[0] - sin * n[1], sin * n[0] + cos * n[1], n[2])
        for component, value in zip(normal_all, turned, strict=True):
            component[row, ray] = value
    return t_all, normal_all


def _place(scene: Scene, rng: np.random.Generator) -> list[dict[str, float]]:
    """Where the solids stand: nuisance within what the caption allows."""

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    if scene.num_objects == 1:
        x = {"left": -1.2, "middle": 0.0, "right": 1.2}[said(scene.place)] + between(-0.2, 0.2)
        spots = [(x, between(-0.5, 0.7))]
    elif scene.place == "left of":
        spots = [(between(-1.3, -0.95), between(-0.3, 0.3)), (between(0.95, 1.3), between(-0.3, 0.3))]
    else:
        side = 1.0 if rng.random() < 0.5 else -1.0
        spots = [
            (side * between(0.75, 1.15), between(1.9, 2.4)),
            (-side * between(0.45, 0.75), between(-1.1, -0.7)),
        ]
    return [
        {
            "x": x,
            "y": y,
            "turn": between(-0.7, 0.7),
            "radius": between(0.82, 0.92) if solid.size == "large" else between(0.49, 0.56),
            "gloss": max(0.0, between(-0.5, 1.0)),
        }
        for solid, (x, y) in zip(scene.solids, spots, strict=True)
    ]


def _camera_rays(size: int, samples: int) -> tuple[Vector, Vector]:
    """Camera position (1, 1) and unit directions (1, size² samples²), subsamples of a pixel last."""
    camera = np.array(_CAMERA)
    forward = np.array(_LOOK_AT) - camera
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    up = np.cross(right, forward)
    reach = math.tan(math.radians(_FIELD_OF_VIEW_DEG) / 2)
    offsets = (np.arange(samples) + 0.5) / samples
    pixels = (np.arange(size)[:, None] + offsets[None, :]) / size * 2 - 1  # (size, samples) in [-1, 1]
    py, sy, px, sx = np.meshgrid(range(size), range(samples), range(size), range(samples), indexing="ij")
    order = (
        py.transpose(0, 2, 1, 3),
        sy.transpose(0, 2, 1, 3),
        px.transpose(0, 2, 1, 3),
        sx.transpose(0, 2, 1, 3),
    )
    u, v = pixels[order[2], order[3]].ravel() * reach, -pixels[order[0], order[1]].ravel() * reach
    rays = forward[None] + u[:, None] * right[None] + v[:, None] * up[None]
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    d = torch.tensor(rays.T, dtype=torch.float32)
    c = torch.tensor(camera, dtype=torch.float32)
    return (c[0].view(1, 1), c[1].view(1, 1), c[2].view(1, 1)), (d[0:1], d[1:2], d[2:3])


def _rows(values: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _slots(scenes: Sequence[Scene], rngs: Sequence[np.random.Generator]) -> list[_Placed]:
    """The first solid of every scene, then the second; a scene without one has None as its shape."""
    num = len(scenes)
    placed = [_place(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]
    slots: list[_Placed] = []
    for slot in range(max(scene.num_objects for scene in scenes)):
        has = [slot < scene.num_objects for scene in scenes]
        spots = [placed[i][slot] if has[i] else placed[i][0] for i in range(num)]
        colours = [COLOURS[scenes[i].solids[slot if has[i] else 0].colour] for i in range(num)]
        column = {name: _rows([[spot[name]] for spot in spots])[:, 0] for name in spots[0]}
        shapes = [scenes[i].solids[slot].shape if has[i] else None for i in range(num)]
        slots.append(
            _Placed(
                shapes,
                column["x"],
                column["y"],
                column["turn"],
                column["radius"],
                _rows(colours),
                column["gloss"],
            )
        )
    return slots


def _light(rngs: Sequence[np.random.Generator], num_rays: int, subsamples: int) -> Vector:
    """Where the sun stands, seen from each ray."""
    azimuth = _rows([[float(rng.uniform(-1.0, 1.0)) * 2.3 - math.pi / 2] for rng in rngs])
    elevation = _rows([[float(rng.uniform(0.65, 1.1))] for rng in rngs])
    # each subsample of a pixel sees the sun from a slightly different angle: soft shadow edges
    jitter = torch.linspace(-0.06, 0.06, subsamples).repeat(num_rays // subsamples)[None]
    azimuth, elevation = azimuth + jitter, elevation - jitter.flip(-1) * 0.5
    return (elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin())


def _first_hit(slots: Sequence[_Placed], origin: Vector, direction: Vector) -> tuple[Tensor, Vector, Tensor]:
    """Ray parameter and normal of the nearest surface, and which it is: -1 sky, 0 ground, else a solid."""
    ground_t = torch.where(direction[2] < -1e-4, -origin[2] / direction[2].clamp_max(-1e-4), math.inf)
    t, normal = ground_t, (torch.zeros_like(ground_t), torch.zeros_like(ground_t), torch.ones_like(ground_t))
    which = torch.where(torch.isfinite(ground_t), 0, -1)
    for index, solid in enumerate(slots):
        hit, n = _cast(solid, origin, direction)
        closer = hit < t
        t = torch.where(closer, hit, t)
        which = torch.where(closer, index + 1, which)
        normal = tuple(torch.where(closer, a, b) for a, b in zip(n, normal, strict=True))  # type: ignore[assignment]
    return t, normal, which


def _shadows(
    slots: Sequence[_Placed], point: Vector, normal: Vector, which: Tensor, light: Vector
) -> tuple[Tensor, Tensor]:
    """1 where the sun reaches a point and 0 where not, and what the solids leave of the sky's light."""
    lifted = _along(point, normal, torch.tensor(2e-2))
    lit = torch.ones_like(point[0])
    occlusion = torch.ones_like(point[0])
    for solid in slots:
        shadow_t, _ = _cast(solid, lifted, light)
        lit = torch.where(torch.isfinite(shadow_t), 0.0, lit)
        exists = torch.tensor([s is not None for s in solid.shape], dtype=torch.float32)[:, None]
        away = ((point[0] - solid.x[:, None]) ** 2 + (point[1] - solid.y[:, None]) ** 2) / solid.radius[
            :, None
        ] ** 2
        occlusion = occlusion * (1 - 0.5 * exists * torch.exp(-1.3 * away) * (which == 0))
    return lit, occlusion


def _render_chunk(
    scenes: Sequence[Scene], rngs: Sequence[np.random.Generator], size: int, samples: int
) -> Tensor:
    num, subsamples = len(scenes), samples * samples
    num_rays = size * size * subsamples
    slots = _slots(scenes, rngs)
    skies = [SKIES[said(scene.sky)] for scene in scenes]
    zenith, horizon = _rows([sky.zenith for sky in skies]), _rows([sky.horizon for sky in skies])
    sun, ambient = _rows([sky.sun for sky in skies]), _rows([sky.ambient for sky in skies])
    earth = _rows([GROUNDS[said(scene.ground)] for scene in scenes])
    earth = earth * _rows([[float(rng.uniform(0.92, 1.08))] for rng in rngs])
    light = _light(rngs, num_rays, subsamples)

    origin, direction = _camera_rays(size, samples)
    direction = (direction[0].expand(num, -1), direction[1].expand(num, -1), direction[2].expand(num, -1))
    t, normal, which = _first_hit(slots, origin, direction)
    point = _along(origin, direction, _finite(t))
    lit, occlusion = _shadows(slots, point, normal, which, light)
    lambert = _dot(normal, light).clamp_min(0) * lit

    half = _normalised((light[0] - direction[0], light[1] - direction[1], light[2] - direction[2]))
    gloss, albedo = torch.zeros_like(t), earth[:, None, :].expand(num, num_rays, 3)
    for index, solid in enumerate(slots):
        mine = which == index + 1
        gloss = torch.where(mine, solid.gloss[:, None], gloss)
        albedo = torch.where(mine[..., None], solid.colour[:, None, :], albedo)
    highlight = gloss * lit * _dot(normal, half).clamp_min(0) ** 40

    up_facing = (0.62 + 0.38 * normal[2]) * occlusion
    colour = albedo * (ambient[:, None] * up_facing[..., None] * 1.3 + sun[:, None] * lambert[..., None])
    colour = colour + 0.55 * sun[:, None] * highlight[..., None]

    height = (direction[2] / 0.28).clamp(0, 1)[..., None] ** 0.7
    sky_colour = horizon[:, None] * (1 - height) + zenith[:, None] * height
    haze = torch.where(which == 0, 1 - torch.exp(-((_finite(t) / 26.0) ** 2)), torch.zeros_like(t))[..., None]
    colour = colour * (1 - haze) + horizon[:, None] * haze
    colour = torch.where((which < 0)[..., None], sky_colour, colour)
    pixels = colour.clamp(0, 1).view(num, size, size, subsamples, 3).mean(3)
    return (pixels.clamp(0, 1) ** (1 / 1.6) * 255).round().to(torch.uint8)


@torch.no_grad()
def render(
    scenes: Sequence[Scene], seed: int, *, size: int = IMAGE_SIZE, samples: int = 2, chunk: int = 8
) -> Tensor:
    """Draw scenes; scene i always looks the same for the same (seed, i).

    Args:
        scenes: what to draw.
        seed: chooses light, pose, exact place and gloss.
        size: height and width in pixels.
        samples: subsamples per pixel edge, for smooth outlines and soft shadows.
        chunk: images cast together; bounds the memory, changes nothing else.
    Returns:
        (B, size, size, 3) uint8.
    """
    out = torch.empty(len(scenes), size, size, 3, dtype=torch.uint8)
    for start in range(0, len(scenes), chunk):
        part = scenes[start : start + chunk]
        rngs = [np.random.default_rng([seed, start + i]) for i in range(len(part))]
        out[start : start + chunk] = _render_chunk(part, rngs, size, samples)
    return out
