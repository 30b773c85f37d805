"""Scenes of one to three solids, and what of a scene a caption says.

A complete `Scene` is what a picture shows; the same class with attributes left out is what a caption asks
for. Everything that no caption names (light, pose, exact place, tints) is nuisance, which the renderer draws.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from engines.demo.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES

MATERIALS = ("matte", "glossy", "metal", "checkered")
GROUNDS = ("grass", "sand", "stone", "wood", "tiles")
SKIES = ("day", "sunset", "night")
VIEWS = ("low", "level", "high")
MAX_OBJECTS = 3

POSITIONS = ("left", "middle", "right")
ARRANGEMENTS: dict[int, tuple[str, ...]] = {1: POSITIONS, 2: ("left of", "behind"), 3: ("row",)}
"""How so many solids may stand: where the one is, how the first relates to the second, or left to right."""
LOOSE = {"beside": "left of", "between": "row"}
"""What a caption may ask for without saying the order, and the arrangement that answers it: two side by side
in any order; the second of three between the others."""

Split = Literal["train", "held_out", "all"]
SPLITS: tuple[Split, ...] = ("train", "held_out", "all")


@dataclass(frozen=True, slots=True)
class Solid:
    """One object; a size or material of None is left unsaid."""

    shape: str
    colour: str
    size: str | None
    material: str | None

    def is_held_out(self) -> bool:
        """Whether training never shows this shape in this colour."""
        return (self.shape, self.colour) in HELD_OUT_PAIRS

    def shown_by(self, seen: "Solid") -> bool:
        """Whether what is seen has everything that is said of this solid."""
        return (
            (self.shape, self.colour) == (seen.shape, seen.colour)
            and self.size in (None, seen.size)
            and self.material in (None, seen.material)
        )


@dataclass(frozen=True, slots=True)
class Scene:
    """Solids, how they stand, on what, when, and from how high they are seen.

    `place` is one of `ARRANGEMENTS`; what is asked for may also be one of `LOOSE`, or None. Two solids of
    "left of" and the three of a row are listed from left to right, of "behind" the far one comes first. To be
    rendered, a scene has to be complete: no None anywhere, no loose place.
    """

    solids: tuple[Solid, ...]
    place: str | None
    ground: str | None
    sky: str | None
    view: str | None

    @property
    def num_objects(self) -> int:
        return len(self.solids)

    def is_complete(self) -> bool:
        """Whether it can be rendered."""
        parts = (self.ground, self.sky, self.view, *(s.size for s in self.solids))
        return (
            self.place in ARRANGEMENTS[self.num_objects]
            and None not in parts
            and all(solid.material is not None for solid in self.solids)
        )

    def is_held_out(self) -> bool:
        return any(solid.is_held_out() for solid in self.solids)

    def shown_by(self, seen: "Scene") -> bool:
        """Whether what is seen, a complete scene, has everything that this one says."""
        return (
            self.num_objects == seen.num_objects
            and self.ground in (None, seen.ground)
            and self.sky in (None, seen.sky)
            and self.view in (None, seen.view)
            and LOOSE.get(self.place or "", self.place) in (None, seen.place)
            and any(
                all(solid.shown_by(other) for solid, other in zip(self.solids, order, strict=True))
                for order in self._orders(seen.solids)
            )
        )

    def _orders(self, seen: tuple[Solid, ...]) -> Sequence[tuple[Solid, ...]]:
        """The ways in which seen solids may answer those that are asked for, one by one."""
        if self.place is None or self.place == "beside":
            return list(itertools.permutations(seen))
        return [seen, seen[::-1]] if self.place == "between" else [seen]

    def mirrored(self) -> "Scene":
        """What the picture shows when left and right are exchanged."""
        if self.num_objects == 1:
            return replace(self, place={"left": "right", "right": "left"}.get(self.place or "", self.place))
        return replace(self, solids=self.solids[::-1]) if self.place in ("left of", "row") else self

    def twins(self) -> bool:
        """Whether several solids agree in everything that is said of them, so that they can be counted."""
        return self.num_objects > 1 and len(set(self.solids)) == 1

    def partly_said(self, rng: np.random.Generator) -> "Scene":
        """The scene with attributes left unsaid, at random; shapes, colours and number always are said."""
        keeps = dict(zip(("ground", "sky", "view", "place", "size", "material"), rng.random(6), strict=True))
        material = keeps["material"] < 0.5
        solids = tuple(
            replace(
                solid,
                size=solid.size if keeps["size"] < 0.5 else None,
                material=solid.material if material else None,
            )
            for solid in self.solids
        )
        return replace(
            self,
            solids=solids,
            ground=self.ground if keeps["ground"] < 0.5 else None,
            sky=self.sky if keeps["sky"] < 0.5 else None,
            view=self.view if keeps["view"] < 0.25 else None,
            place=self._looser(keeps["place"]),
        )

    def _looser(self, draw: float) -> str | None:
        if self.num_objects == 1:
            return self.place if draw < 0.5 else None
        if draw < 0.3:
            return None
        loose = {tight: name for name, tight in LOOSE.items()}
        return loose.get(self.place or "", self.place) if draw < 0.45 else self.place


_PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
_TRAIN_PAIRS = tuple(pair for pair in _PAIRS if pair not in HELD_OUT_PAIRS)
_HELD_OUT = tuple(pair for pair in _PAIRS if pair in HELD_OUT_PAIRS)
_TWIN_SHARE = 0.2


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _solid(rng: np.random.Generator, pairs: Sequence[tuple[str, str]]) -> Solid:
    shape, colour = pairs[int(rng.integers(len(pairs)))]
    return Solid(shape, colour, _pick(rng, SIZES), _pick(rng, MATERIALS))


def _solids(rng: np.random.Generator, count: int, split: Split) -> tuple[Solid, ...]:
    pool = {"train": _TRAIN_PAIRS, "held_out": _HELD_OUT, "all": _PAIRS}[split]
    first = _solid(rng, pool)
    if count > 1 and rng.random() < _TWIN_SHARE:
        return (first,) * count
    solids = [first]
    while len(solids) < count:
        other = _solid(rng, _TRAIN_PAIRS if split == "held_out" else pool)
        # captions tell solids apart by shape and colour
        if all((other.shape, other.colour) != (solid.shape, solid.colour) for solid in solids):
            solids.insert(int(rng.integers(len(solids) + 1)), other)
    return tuple(solids)


def sample_scenes(num: int, seed: int, *, num_objects: int, split: Split = "all") -> list[Scene]:
    """Draw complete scenes with uniform attributes.

    Of several solids a fifth are twins, which agree in everything; the others differ in shape or colour.

    Args:
        num: how many.
        seed: same seed, same scenes.
        num_objects: 1 to `MAX_OBJECTS`.
        split: "train" has no held-out (shape, colour) pair, in "held_out" every scene has one, "all" has any.
    """
    rng = np.random.default_rng([seed, num_objects, SPLITS.index(split)])
    return [
        Scene(
            _solids(rng, num_objects, split),
            _pick(rng, ARRANGEMENTS[num_objects]),
            _pick(rng, GROUNDS),
            _pick(rng, SKIES),
            _pick(rng, VIEWS),
        )
        for _ in range(num)
    ]
