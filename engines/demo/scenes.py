"""Captioned scenes: shaded solids standing on a plane under a sky.

The captioned attributes are a `Scene`; everything else (light, pose, exact place, gloss, tints) is
nuisance that `renderer.render` draws from its seed, so one caption has many pictures.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np

SHAPES = ("sphere", "cube", "cone", "cylinder", "torus")
SIZES = ("small", "large")
POSITIONS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
RELATIONS = ("left of", "behind")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.07, 0.07),
    "orange": (0.98, 0.42, 0.02),
    "yellow": (0.95, 0.83, 0.05),
    "green": (0.06, 0.55, 0.12),
    "cyan": (0.05, 0.72, 0.78),
    "blue": (0.07, 0.16, 0.82),
    "purple": (0.46, 0.08, 0.66),
    "white": (0.93, 0.93, 0.93),
}
GROUNDS: dict[str, tuple[float, float, float]] = {
    "grass": (0.30, 0.44, 0.17),
    "sand": (0.76, 0.62, 0.40),
    "stone": (0.36, 0.37, 0.40),
}


@dataclass(frozen=True, slots=True)
class Sky:
    """Colours of one time of day, linear RGB in [0, 1]."""

    phrase: str
    zenith: tuple[float, float, float]
    horizon: tuple[float, float, float]
    sun: tuple[float, float, float]
    ambient: tuple[float, float, float]


SKIES: dict[str, Sky] = {
    "day": Sky("by day", (0.16, 0.38, 0.82), (0.68, 0.83, 0.96), (0.78, 0.76, 0.72), (0.30, 0.32, 0.36)),
    "sunset": Sky(
        "at sunset", (0.30, 0.16, 0.42), (0.98, 0.52, 0.22), (0.80, 0.66, 0.54), (0.30, 0.26, 0.28)
    ),
    "night": Sky("at night", (0.01, 0.015, 0.06), (0.07, 0.09, 0.22), (0.56, 0.59, 0.66), (0.17, 0.18, 0.24)),
}

# Never seen together in training: (shape, colour) pairs that measure whether attributes are composed.
HELD_OUT_PAIRS = frozenset(
    {("sphere", "purple"), ("cube", "cyan"), ("cone", "red"), ("cylinder", "yellow"), ("torus", "blue")}
)

Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True, slots=True)
class Solid:
    """One object of a scene; a size of None is left unsaid."""

    shape: str
    colour: str
    size: str | None

    def phrase(self) -> str:
        if self.size is not None:
            return f"a {self.size} {self.colour} {self.shape}"
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"

    def is_held_out(self) -> bool:
        return (self.shape, self.colour) in HELD_OUT_PAIRS

    def shown_by(self, seen: "Solid") -> bool:
        """Whether what is seen has everything that is said of this solid."""
        return (self.shape, self.colour, self.size or seen.size) == (seen.shape, seen.colour, seen.size)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says; `place` is a position of one solid, or a relation of the first to the second.

    None is left unsaid; the relation of two solids never is. To be rendered, a scene has to be complete.
    """

    solids: tuple[Solid, ...]
    place: str | None
    ground: str | None
    sky: str | None

    @property
    def num_objects(self) -> int:
        return len(self.solids)

    def key(self) -> tuple[object, ...]:
        """Hashable identity of the captioned attributes."""
        return (self.solids, self.place, self.ground, self.sky)

    def is_held_out(self) -> bool:
        return any(solid.is_held_out() for solid in self.solids)

    def shown_by(self, seen: "Scene") -> bool:
        """Whether what is seen has everything that this scene says."""
        return (
            self.num_objects == seen.num_objects
            and all(solid.shown_by(other) for solid, other in zip(self.solids, seen.solids, strict=True))
            and self.place in (None, seen.place)
            and self.ground in (None, seen.ground)
            and self.sky in (None, seen.sky)
        )

    def mirrored(self) -> "Scene":
        """What the picture shows when left and right are exchanged."""
        if self.num_objects == 1:
            place = {"left": "right", "right": "left"}.get(self.place or "", self.place)
            return Scene(self.solids, place, self.ground, self.sky)
        solids = self.solids[::-1] if self.place == "left of" else self.solids
        return Scene(solids, self.place, self.ground, self.sky)

    def partly_said(self, rng: np.random.Generator) -> "Scene":
        """The scene with each attribute but shapes, colours and relation left unsaid every other time."""
        place, ground, sky, *sizes = rng.random(3 + self.num_objects) < 0.5
        return Scene(
            tuple(
                solid if keep else Solid(solid.shape, solid.colour, None)
                for solid, keep in zip(self.solids, sizes, strict=True)
            ),
            self.place if place or self.num_objects > 1 else None,
            self.ground if ground else None,
            self.sky if sky else None,
        )

    def caption(self) -> str:
        """Say it as people do: "a large red cube on the left, on grass by day", or "a red cube at night"."""
        phrases = [solid.phrase() for solid in self.solids]
        where = [POSITIONS[self.place]] if self.num_objects == 1 and self.place is not None else []
        subject = " ".join([f" {self.place} ".join(phrases), *where])
        setting = [f"on {self.ground}"] if self.ground is not None else []
        setting += [SKIES[self.sky].phrase] if self.sky is not None else []
        complete = None not in (self.place, self.ground, self.sky, *(solid.size for solid in self.solids))
        return (", " if complete else " ").join([subject, " ".join(setting)]).rstrip()


def said(attribute: str | None) -> str:
    """An attribute that has to be known.

    Raises:
        ValueError: it was left unsaid.
    """
    if attribute is None:
        raise ValueError("the scene is not complete: an attribute was left unsaid")
    return attribute


def vocabulary() -> list[str]:
    """All words that captions use, in a fixed order."""
    captions = itertools.chain(
        ("a of",),
        COLOURS,
        SHAPES,
        SIZES,
        POSITIONS.values(),
        RELATIONS,
        GROUNDS,
        (sky.phrase for sky in SKIES.values()),
    )
    return list(dict.fromkeys(word for caption in captions for word in caption.split()))


_PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS]
_TRAIN_PAIRS = [pair for pair in _PAIRS if pair not in HELD_OUT_PAIRS]
_HELD_OUT = [pair for pair in _PAIRS if pair in HELD_OUT_PAIRS]


def sample_scenes(
    num: int, seed: int, *, split: Split = "all", num_objects: Literal[1, 2] | None = None
) -> list[Scene]:
    """Draw scenes with uniform attributes.

    Args:
        num: how many.
        seed: same seed, same scenes.
        split: "train" has no held-out (shape, colour) pair, in "held_out" every scene has one, "all" has any.
        num_objects: 1 or 2 solids; None mixes them evenly.
    """
    rng = np.random.default_rng([seed, num_objects or 0, ("train", "held_out", "all").index(split)])

    def solid(pairs: list[tuple[str, str]]) -> Solid:
        shape, colour = pairs[rng.integers(len(pairs))]
        return Solid(shape, colour, SIZES[rng.integers(2)])

    def scene() -> Scene:
        count = num_objects or int(rng.integers(1, 3))
        pool = {"train": _TRAIN_PAIRS, "held_out": _HELD_OUT, "all": _PAIRS}[split]
        solids = [solid(pool)]
        if count == 2:
            other = _TRAIN_PAIRS if split == "held_out" else pool
            # two solids that differ in neither shape nor colour could not be told apart by their caption
            while (second := solid(other)).shape == solids[0].shape and second.colour == solids[0].colour:
                pass
            solids.insert(int(rng.integers(2)), second)
        places = tuple(POSITIONS) if count == 1 else RELATIONS
        return Scene(
            tuple(solids),
            places[rng.integers(len(places))],
            tuple(GROUNDS)[rng.integers(len(GROUNDS))],
            tuple(SKIES)[rng.integers(len(SKIES))],
        )

    return [scene() for _ in range(num)]


def sample_captions(
    num: int, seed: int, split: Split = "train", *, two_object_share: float = 0.3, partial_share: float = 0.75
) -> list[str]:
    """Captions of random scenes, mixed as the teacher sees them; in some, attributes are left unsaid."""
    rng = np.random.default_rng([seed, 1])
    num_two = round(num * two_object_share)
    scenes = [
        *sample_scenes(num - num_two, seed, split=split, num_objects=1),
        *sample_scenes(num_two, seed, split=split, num_objects=2),
    ]
    captions = [
        (scene.partly_said(rng) if rng.random() < partial_share else scene).caption() for scene in scenes
    ]
    return [captions[i] for i in rng.permutation(num)]
