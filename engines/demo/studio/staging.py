"""From scenes to numbers: where solids, camera and sun stand, what of it a caption leaves to chance.

The ground is the plane z = 0; x runs to the right, y away from the camera. Colours are linear RGB.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from engines.demo.scenes import COLOURS, SHAPES
from engines.demo.studio.scenes import GROUNDS, MATERIALS, SKIES, Scene
from engines.demo.studio.solids import Placed


@dataclass(frozen=True, slots=True)
class Look:
    """How a material takes light.

    Attributes:
        diffuse: share of the light that is scattered.
        shine: strength of the sun's reflection, `sharpness` its exponent.
        mirror: share that is reflected when seen from the front; `edge` when seen from the side.
        tint: how far reflections have the material's own colour.
    """

    diffuse: float
    shine: float
    sharpness: float
    mirror: float
    edge: float
    tint: float


LOOKS: dict[str, Look] = {
    "matte": Look(1.0, 0.03, 6, 0.0, 0.0, 0.0),
    "glossy": Look(0.92, 0.9, 120, 0.04, 0.55, 0.0),
    "metal": Look(0.20, 1.3, 45, 0.72, 0.85, 0.95),
    "checkered": Look(1.0, 0.12, 25, 0.0, 0.0, 0.0),
}


@dataclass(frozen=True, slots=True)
class Sky:
    """Light of one time of day: colours, and how high the sun (or moon) may stand, in radians."""

    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    sun: tuple[float, float, float]
    ambient: tuple[float, float, float]
    glow: tuple[float, float, float]
    elevation: tuple[float, float]


LIGHTS: dict[str, Sky] = {
    "day": Sky((0.07, 0.24, 0.72), (0.50, 0.73, 0.95), (1.75, 1.62, 1.42), (0.40, 0.48, 0.60),
               (0.25, 0.22, 0.16), (0.75, 1.10)),
    "sunset": Sky((0.16, 0.13, 0.36), (0.98, 0.44, 0.20), (1.95, 1.00, 0.50), (0.46, 0.34, 0.40),
                  (0.75, 0.40, 0.12), (0.42, 0.62)),
    "night": Sky((0.006, 0.010, 0.045), (0.045, 0.075, 0.19), (0.52, 0.60, 0.86), (0.105, 0.13, 0.23),
                 (0.06, 0.08, 0.14), (0.70, 1.05)),
}  # fmt: skip

_EARTH: dict[str, tuple[float, float, float]] = {
    "grass": (0.13, 0.27, 0.045),
    "sand": (0.62, 0.47, 0.27),
    "stone": (0.27, 0.275, 0.29),
    "wood": (0.36, 0.19, 0.085),
    "tiles": (0.60, 0.59, 0.57),
}
_CAMERA_HEIGHT = {"low": 1.0, "level": 2.05, "high": 3.9}
_LOOK_AT = {"low": (0.0, 0.92), "level": (0.0, 0.72), "high": (0.5, 0.55)}
_DISTANCE = {1: 5.7, 2: 6.4, 3: 7.5}
FIELD_OF_VIEW_DEG = 36.0
_SUN_RADIUS = 0.045


@dataclass(frozen=True, slots=True)
class Stage:
    """N scenes ready to be drawn. Fields without a note are (N, 3) colours.

    Attributes:
        solids: fields (K, N), as many slots as the fullest scene has solids.
        colour: (K, N, 3), first colour of each solid.
        second: (K, N, 3), the other squares of a checkered one.
        look: (K, N, 6), `Look` of each solid.
        checkered: (K, N).
        camera: (N, 3), where it is; `forward`, `right` and `up` (N, 3) are its axes.
        sun_at: (N, 3), the direction in which the sun stands.
        ground: (N,), index in `GROUNDS`.
        grain: (N, 8) in [0, 1], chance in the ground's texture.
    """

    solids: Placed
    colour: Tensor
    second: Tensor
    look: Tensor
    checkered: Tensor
    camera: Tensor
    forward: Tensor
    right: Tensor
    up: Tensor
    sun_at: Tensor
    zenith: Tensor
    horizon: Tensor
    sun: Tensor
    ambient: Tensor
    glow: Tensor
    ground: Tensor
    earth: Tensor
    grain: Tensor

    def __len__(self) -> int:
        return len(self.camera)

    def to(self, device: torch.device | str) -> "Stage":
        """The same on a device."""

        def moved(value: Tensor | Placed) -> Tensor | Placed:
            if isinstance(value, Placed):
                return Placed(*(getattr(value, field.name).to(device) for field in fields(value)))
            return value.to(device)

        return Stage(*(moved(getattr(self, field.name)) for field in fields(self)))  # type: ignore[arg-type]


def _spots(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Where the solids stand within what the caption allows."""

    def near(middle: float, reach: float) -> float:
        return float(rng.uniform(middle - reach, middle + reach))

    if scene.num_objects == 1:
        x = {"left": -0.8, "middle": 0.0, "right": 0.8}[scene.place or ""]
        return [(near(x, 0.11), near(0.1, 0.35))]
    if scene.place == "left of":
        return [(near(x, 0.1), near(0, 0.3)) for x in (-1.03, 1.03)]
    if scene.place == "row":
        return [(near(x, 0.08), near(0, 0.25)) for x in (-1.6, 0.0, 1.6)]
    side = 1.0 if rng.random() < 0.5 else -1.0
    return [(side * near(0.85, 0.15), near(1.9, 0.25)), (-side * near(0.6, 0.15), near(-0.9, 0.2))]


def _camera(scene: Scene, rng: np.random.Generator) -> dict[str, list[float]]:
    view = scene.view or ""
    distance = _DISTANCE[scene.num_objects] * rng.uniform(0.97, 1.03)
    height = _CAMERA_HEIGHT[view] * rng.uniform(0.93, 1.07)
    y, z = _LOOK_AT[view]
    at = np.array([rng.uniform(-0.25, 0.25), -math.sqrt(distance**2 - (height - z) ** 2), height])
    forward = np.array([0.0, y, z]) - at
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    axes = {"camera": at, "forward": forward, "right": right, "up": np.cross(right, forward)}
    return {name: axis.tolist() for name, axis in axes.items()}


def _sun_at(sky: Sky, rng: np.random.Generator) -> list[float]:
    """To either side: from behind the camera it would leave no shade on the solids."""
    side = 1.0 if rng.random() < 0.5 else -1.0
    azimuth = -math.pi / 2 + side * float(rng.uniform(0.5, 1.6))
    elevation = float(rng.uniform(*sky.elevation))
    across = math.cos(elevation)
    return [across * math.cos(azimuth), across * math.sin(azimuth), math.sin(elevation)]


def _dressed(scene: Scene, rng: np.random.Generator, num_slots: int) -> dict[str, list[list[float]]]:
    """One row for each slot; slots without a solid are zero, shape -1."""
    rows: dict[str, list[list[float]]] = {name: [] for name in ("placed", "colour", "second", "look")}
    scale = {1: 1.0, 2: 1.0, 3: 0.9}[scene.num_objects]
    for solid, (x, y) in zip(scene.solids, _spots(scene, rng), strict=True):
        turn = float(rng.uniform(0.2, 0.75)) * (1.0 if rng.random() < 0.5 else -1.0)
        large = rng.uniform(0.82, 0.90) * scale
        radius = large if solid.size == "large" else rng.uniform(0.49, 0.55) * scale
        shape = SHAPES.index(solid.shape)
        rows["placed"].append([shape, x, y, math.cos(turn), math.sin(turn), radius])
        colour = [channel**1.4 for channel in COLOURS[solid.colour]]
        rows["colour"].append([channel * float(rng.uniform(0.94, 1.06)) for channel in colour])
        rows["second"].append([0.06, 0.06, 0.07] if solid.colour == "white" else [0.80, 0.78, 0.72])
        look = LOOKS[solid.material or ""]
        rows["look"].append([look.diffuse, look.shine, look.sharpness, look.mirror, look.edge, look.tint])
    for _ in range(num_slots - scene.num_objects):
        rows["placed"].append([-1.0, 0.0, 0.0, 1.0, 0.0, 1.0])
        rows["colour"].append([0.0] * 3)
        rows["second"].append([0.0] * 3)
        rows["look"].append([0.0] * 6)
    return rows


def stage(scenes: Sequence[Scene], rngs: Sequence[np.random.Generator]) -> Stage:
    """Decide what captions leave to chance.

    Args:
        scenes: complete ones.
        rngs: one for each scene.
    Raises:
        ValueError: a scene is not complete.
    """
    columns: dict[str, list[list[float]]] = {}
    dressed = []
    num_slots = max(scene.num_objects for scene in scenes)
    for scene, rng in zip(scenes, rngs, strict=True):
        if not scene.is_complete():
            raise ValueError(f"the scene is not complete: {scene}")
        sky, ground = LIGHTS[scene.sky or ""], scene.ground or ""
        dressed.append(_dressed(scene, rng, num_slots))
        tint = rng.uniform(0.88, 1.12) * rng.uniform(0.97, 1.03, 3)
        row = _camera(scene, rng)
        row["sun_at"] = _sun_at(sky, rng)
        strength = float(rng.uniform(0.92, 1.08))
        row["sun"] = [strength * channel for channel in sky.sun]
        row |= {name: list(getattr(sky, name)) for name in ("zenith", "horizon", "ambient", "glow")}
        row["earth"] = (np.array(_EARTH[ground]) * tint).tolist()
        row["grain"] = rng.random(8).tolist()
        for name, value in row.items():
            columns.setdefault(name, []).append(value)

    def slots(name: str) -> Tensor:
        return torch.tensor([rows[name] for rows in dressed], dtype=torch.float32).transpose(0, 1)

    placed = slots("placed").unbind(2)
    materials = [[solid.material for solid in scene.solids] for scene in scenes]
    checkered = [[m == "checkered" for m in [*row, *[None] * num_slots][:num_slots]] for row in materials]
    return Stage(
        Placed(placed[0].long(), *placed[1:]),
        slots("colour"),
        slots("second"),
        slots("look"),
        torch.tensor(checkered).T,
        ground=torch.tensor([GROUNDS.index(scene.ground or "") for scene in scenes]),
        **{name: torch.tensor(value, dtype=torch.float32) for name, value in columns.items()},
    )


def sun_offsets(samples: int) -> Tensor:
    """(samples, 2) shifts of the sun, across and up: the samples of a pixel see different points of it."""
    turn = torch.arange(samples) * 2.399963  # the golden angle
    reach = _SUN_RADIUS * ((torch.arange(samples) + 0.5) / samples).sqrt()
    return torch.stack([reach * turn.cos(), reach * turn.sin()], 1)


assert len(LOOKS) == len(MATERIALS)
assert len(LIGHTS) == len(SKIES)
assert len(_EARTH) == len(GROUNDS)
