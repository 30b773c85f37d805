"""Captioned clips: a solid that moves over a plane under a sky, seen by a camera that stands still.

The caption says shape, colour and motion. Everything else (speed, exact path, size, pose, ground, sky, light)
is nuisance that `render` draws from its seed, so one caption has many clips and none of them is their mean.
Units are those of the image demo: the ground is the plane z = 0, x runs to the right, y away from the camera.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.demo.scenes import said
from engines.demo.video.solids import BOUND, SOLIDS, meets_bound, shade, trace

CLIP_SIZE = 32
NUM_FRAMES = 9
FPS = 8

Colour = tuple[float, float, float]

SHAPES = tuple(SOLIDS)
MOTIONS: dict[str, str] = {
    "left": "moving left",
    "right": "moving right",
    "closer": "moving closer",
    "away": "moving away",
    "bouncing": "bouncing",
    "rising": "rising",
}
COLOURS: dict[str, Colour] = {
    "red": (0.85, 0.06, 0.06),
    "yellow": (0.96, 0.82, 0.04),
    "green": (0.04, 0.58, 0.10),
    "blue": (0.06, 0.16, 0.85),
    "purple": (0.48, 0.07, 0.68),
    "white": (0.95, 0.95, 0.95),
}
GROUNDS: tuple[Colour, ...] = ((0.30, 0.44, 0.17), (0.76, 0.62, 0.40), (0.36, 0.37, 0.40))
"""Grass, sand, stone; captions do not say."""


@dataclass(frozen=True, slots=True)
class Sky:
    """Colours of one time of day, linear RGB in [0, 1]."""

    zenith: Colour
    horizon: Colour
    sun: Colour
    ambient: Colour


SKIES: tuple[Sky, ...] = (
    Sky((0.16, 0.38, 0.82), (0.68, 0.83, 0.96), (0.78, 0.76, 0.72), (0.30, 0.32, 0.36)),
    Sky((0.30, 0.16, 0.42), (0.98, 0.52, 0.22), (0.80, 0.66, 0.54), (0.30, 0.26, 0.28)),
    Sky((0.01, 0.015, 0.06), (0.07, 0.09, 0.22), (0.56, 0.59, 0.66), (0.17, 0.18, 0.24)),
)
"""Day, sunset, night; captions do not say."""

# Never seen together in training: (colour, motion) pairs that measure whether attributes are composed. Left
# and right go together, because training also shows every clip mirrored.
HELD_OUT_PAIRS = frozenset(
    {
        ("yellow", "left"),
        ("yellow", "right"),
        ("blue", "closer"),
        ("green", "away"),
        ("purple", "bouncing"),
        ("red", "rising"),
    }
)

Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says; None is left unsaid. To be rendered, a scene has to be complete."""

    shape: str
    colour: str | None
    motion: str | None

    def key(self) -> tuple[object, ...]:
        """Hashable identity of the captioned attributes."""
        return (self.shape, self.colour, self.motion)

    def is_held_out(self) -> bool:
        return (self.colour, self.motion) in HELD_OUT_PAIRS

    def shown_by(self, seen: "Scene") -> bool:
        """Whether what is seen has everything that this scene says."""
        return (
            self.shape == seen.shape
            and self.colour in (None, seen.colour)
            and self.motion in (None, seen.motion)
        )

    def mirrored(self) -> "Scene":
        """What the clip shows when left and right are exchanged."""
        return replace(self, motion={"left": "right", "right": "left"}.get(self.motion or "", self.motion))

    def partly_said(self, rng: np.random.Generator) -> "Scene":
        """The scene with colour and motion each left unsaid every other time."""
        colour, motion = rng.random(2) < 0.5
        return replace(self, colour=self.colour if colour else None, motion=self.motion if motion else None)

    def caption(self) -> str:
        """Say it as people do: "a red ball bouncing", "a cone moving left"."""
        words = [self.colour, self.shape, None if self.motion is None else MOTIONS[self.motion]]
        return " ".join(["a", *(word for word in words if word is not None)])


def vocabulary() -> list[str]:
    """All words that captions use, in a fixed order, but for the article."""
    captions = itertools.chain(COLOURS, SHAPES, MOTIONS.values())
    return list(dict.fromkeys(word for caption in captions for word in caption.split()))


_PAIRS = [(colour, motion) for colour in COLOURS for motion in MOTIONS]
_POOLS = {
    "train": [pair for pair in _PAIRS if pair not in HELD_OUT_PAIRS],
    "held_out": [pair for pair in _PAIRS if pair in HELD_OUT_PAIRS],
    "all": _PAIRS,
}


def sample_scenes(num: int, seed: int, *, split: Split = "all") -> list[Scene]:
    """Draw scenes with uniform attributes.

    Args:
        num: how many.
        seed: same seed, same scenes.
        split: "train" has no held-out (colour, motion) pair, "held_out" has only such, "all" has any.
    """
    rng = np.random.default_rng([seed, tuple(_POOLS).index(split)])
    pool = _POOLS[split]

    def scene() -> Scene:
        colour, motion = pool[rng.integers(len(pool))]
        return Scene(SHAPES[rng.integers(len(SHAPES))], colour, motion)

    return [scene() for _ in range(num)]


def sample_captions(
    num: int, seed: int, split: Split = "train", *, partial_share: float = 1 / 3
) -> list[str]:
    """Captions of random scenes, mixed as the teacher sees them; in some, attributes are left unsaid."""
    rng = np.random.default_rng([seed, 1])
    return [
        (scene.partly_said(rng) if rng.random() < partial_share else scene).caption()
        for scene in sample_scenes(num, seed, split=split)
    ]


@dataclass(frozen=True, slots=True)
class _Nuisance:
    """What the caption leaves unsaid of one clip."""

    path: npt.NDArray[np.float64]  # (frames, 3): where the solid touches down, were it to sink straight
    turn: npt.NDArray[np.float64]  # (frames,) radians about the vertical
    radius: float
    gloss: float
    ground: Colour
    sky: int
    azimuth: float
    elevation: float


def _draw_nuisance(scene: Scene, rng: np.random.Generator, num_frames: int) -> _Nuisance:
    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    time = np.linspace(0, 1, num_frames)
    x, y, z = (np.zeros(num_frames) for _ in range(3))
    if scene.motion in ("left", "right"):
        reach, y = between(1.1, 2.3), y + between(-0.7, 1.0)
        x = between(-1, 1) * (1.3 - reach / 2) + reach * (time - 0.5)
        x = -x if scene.motion == "left" else x
    elif scene.motion in ("closer", "away"):
        reach, near = between(2.4, 4.0), between(-1.9, -0.9)
        y = near + reach * (1 - time if scene.motion == "closer" else time)
        x = x + between(-0.6, 0.6)
    else:
        x, y = x + between(-1.05, 1.05), y + between(-0.5, 1.2)
        if scene.motion == "bouncing":
            hop = between(0.0, 1.0) + between(1.3, 2.3) * time
            z = between(0.7, 1.15) * 4 * (hop % 1) * (1 - hop % 1)
        else:
            z = between(0.0, 0.3) + between(0.7, 1.2) * time
    return _Nuisance(
        path=np.stack([x, y, z], axis=1),
        turn=between(-0.8, 0.8) + between(-1.2, 1.2) * time,
        radius=between(0.64, 0.90),
        gloss=max(0.0, between(-0.5, 1.0)),
        ground=_tinted(GROUNDS[rng.integers(len(GROUNDS))], between(0.88, 1.12)),
        sky=int(rng.integers(len(SKIES))),
        azimuth=between(-1.0, 1.0) * 2.3 - math.pi / 2,
        elevation=between(0.7, 1.2),
    )


def _tinted(colour: Colour, tint: float) -> Colour:
    return (colour[0] * tint, colour[1] * tint, colour[2] * tint)


_CAMERA = (0.0, -6.6, 2.2)
_LOOK_AT = (0.0, 0.0, 0.95)
_FIELD_OF_VIEW_DEG = 33.0


def _camera_rays(size: int, samples: int) -> Tensor:
    """Unit directions from the camera, (size² samples², 3); the samples of a pixel stand together."""
    forward = torch.tensor(_LOOK_AT) - torch.tensor(_CAMERA)
    forward = forward / forward.norm()
    right = torch.linalg.cross(forward, torch.tensor((0.0, 0.0, 1.0)))
    right = right / right.norm()
    up = torch.linalg.cross(right, forward)
    across = (torch.arange(size * samples) + 0.5) / (size * samples) * 2 - 1
    across = (across * math.tan(math.radians(_FIELD_OF_VIEW_DEG) / 2)).view(size, samples)
    u, v = across[None, None], -across[:, :, None, None]  # (row, sample, column, sample)
    rays = forward + u[..., None] * right + v[..., None] * up
    rays = rays.transpose(1, 2).reshape(-1, 3)
    return torch.nn.functional.normalize(rays, dim=1)


def _rows(values: Sequence[object]) -> Tensor:
    return torch.tensor(np.array(values), dtype=torch.float32)


def _turned(v: Tensor, angle: Tensor) -> Tensor:
    """Vectors (..., 3) turned by angles (...) about the vertical."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        [cos * v[..., 0] - sin * v[..., 1], sin * v[..., 0] + cos * v[..., 1], v[..., 2].expand_as(cos)],
        dim=-1,
    )


@dataclass(frozen=True, slots=True)
class _Traced:
    """What rays meet of the solids, each (clip, frame, ray), the normals with a last axis of 3."""

    hit: Tensor
    normal: Tensor
    light: Tensor


def _trace_solids(
    scenes: Sequence[Scene],
    eye: Tensor,
    ground: Tensor,
    rays: Tensor,
    falls: Tensor,
    turn: Tensor,
    sun: Tensor,
) -> _Traced:
    """Follow every ray to its clip's solid or, past it, to the ground where the solid's shadow may lie.

    Args:
        scenes: one for each clip.
        eye: (clip, frame, 3), the camera in the frame of each solid, in units of its radius.
        ground: (clip, frame, ray, 3), where rays meet the ground, in the same.
        rays: (ray, 3) directions.
        falls: (ray,), whether it meets the ground at all.
        turn: (clip, frame) radians, how far the solid is turned.
        sun: (clip, 3) direction to it.
    """
    seen = meets_bound(eye[:, :, None], rays[None, None])
    dimmed = meets_bound(ground, sun[:, None, None], 1.5 * BOUND) & falls
    traced = _Traced(
        hit=torch.zeros(seen.shape, dtype=torch.bool),
        normal=torch.zeros(*seen.shape, 3),
        light=torch.ones(seen.shape),
    )
    for shape in SHAPES:
        of_shape = torch.tensor([scene.shape == shape for scene in scenes])[:, None, None]
        i, f, r = (seen & of_shape).nonzero(as_tuple=True)
        back = -turn[i, f]
        traced.hit[i, f, r], facing = trace(shape, _turned(eye[i, f], back), _turned(rays[r], back))
        traced.normal[i, f, r] = _turned(facing, -back)
        i, f, r = (dimmed & of_shape & ~traced.hit).nonzero(as_tuple=True)
        back = -turn[i, f]
        traced.light[i, f, r] = shade(shape, _turned(ground[i, f, r], back), _turned(sun[i], back))
    return traced


def _render_chunk(scenes: Sequence[Scene], clips: Sequence[_Nuisance], size: int, samples: int) -> Tensor:
    num, frames = len(scenes), len(clips[0].path)
    radius = _rows([clip.radius for clip in clips])
    lift = _rows([SOLIDS[scene.shape][1] for scene in scenes]) * radius
    centre = _rows([clip.path for clip in clips])
    centre[..., 2] += lift[:, None]
    turn = _rows([clip.turn for clip in clips])
    azimuth, elevation = _rows([clip.azimuth for clip in clips]), _rows([clip.elevation for clip in clips])
    sun_at = torch.stack(
        [elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], dim=1
    )
    camera, rays = torch.tensor(_CAMERA), _camera_rays(size, samples)
    falls = rays[:, 2] < -1e-3
    reach = torch.where(falls, -camera[2] / rays[:, 2].clamp_max(-1e-3), 0.0)
    below = camera + reach[:, None] * rays  # where each ray meets the ground

    # in the frame of each solid, in units of its radius; (clip, frame, ray)
    eye = (camera - centre) / radius[:, None, None]
    ground = (below[None, None] - centre[:, :, None]) / radius[:, None, None, None]
    traced = _trace_solids(scenes, eye, ground, rays, falls, turn, sun_at)

    def of_clip(values: Sequence[Colour]) -> Tensor:
        return _rows(values)[:, None, None]

    skies = [SKIES[clip.sky] for clip in clips]
    sun, ambient = of_clip([sky.sun for sky in skies]), of_clip([sky.ambient for sky in skies])
    horizon = of_clip([sky.horizon for sky in skies])

    height = (rays[:, 2] / 0.28).clamp(0, 1)[:, None] ** 0.7
    above = horizon + (of_clip([sky.zenith for sky in skies]) - horizon) * height
    away = (ground[..., :2].square().sum(-1)) + 0.6 * (centre[..., 2] / radius[:, None] - 0.7)[..., None] ** 2
    occlusion = 1 - 0.45 * torch.exp(-1.1 * away)
    earth = ambient * 1.3 * occlusion[..., None] + sun * (traced.light * sun_at[:, 2, None, None])[..., None]
    earth = of_clip([clip.ground for clip in clips]) * earth
    haze = (1 - torch.exp(-((reach / 26.0) ** 2)))[:, None]
    earth = earth + (horizon - earth) * haze
    colour = torch.where(falls[:, None], earth, above)

    i, f, r = traced.hit.nonzero(as_tuple=True)
    n, to_sun = traced.normal[i, f, r], sun_at[i]
    lambert = (n * to_sun).sum(1).clamp_min(0)
    half = torch.nn.functional.normalize(to_sun - rays[r], dim=1)
    highlight = 0.55 * _rows([clip.gloss for clip in clips])[i] * (n * half).sum(1).clamp_min(0) ** 30
    paint = _rows([COLOURS[said(scene.colour)] for scene in scenes])[i]
    soft = ambient[i, 0, 0] * (1.3 * (0.62 + 0.38 * n[:, 2]))[:, None]
    colour[i, f, r] = paint * (soft + sun[i, 0, 0] * lambert[:, None]) + sun[i, 0, 0] * highlight[:, None]

    pixels = colour.clamp(0, 1).view(num, frames, size, size, samples**2, 3).mean(4)
    return (pixels ** (1 / 1.6) * 255).round().to(torch.uint8)


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    seed: int,
    *,
    size: int = CLIP_SIZE,
    num_frames: int = NUM_FRAMES,
    samples: int = 2,
    chunk: int = 8,
) -> Tensor:
    """Draw clips; scene i always looks the same for the same (seed, i).

    Args:
        scenes: what to draw.
        seed: chooses what captions do not say.
        size: height and width in pixels.
        num_frames: of a clip; the motion takes as long whatever their number.
        samples: subsamples per pixel edge, for smooth outlines.
        chunk: clips drawn together; bounds the memory, changes nothing else.

    Returns:
        (N, num_frames, size, size, 3) uint8.
    """
    out = torch.empty(len(scenes), num_frames, size, size, 3, dtype=torch.uint8)
    for start in range(0, len(scenes), chunk):
        part = scenes[start : start + chunk]
        clips = [
            _draw_nuisance(scene, np.random.default_rng([seed, start + i]), num_frames)
            for i, scene in enumerate(part)
        ]
        out[start : start + chunk] = _render_chunk(part, clips, size, samples)
    return out
