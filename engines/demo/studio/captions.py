"""Captions of scenes in several phrasings, and what a prompt in such words asks for."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from engines.demo.scenes import COLOURS, SHAPES, SIZES
from engines.demo.studio.scenes import GROUNDS, MATERIALS, SKIES, Scene, Solid
from engines.demo.text import build_tokenizer

MAX_TOKENS = 48

_AT = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
_WHEN = {"day": "by day", "sunset": "at sunset", "night": "at night"}
_SEEN = {"low": "seen from low down", "level": "at eye level", "high": "seen from above"}
_NUMBERS = {2: "two", 3: "three"}
_LEAD_INS = ("", "", "", "a picture of ", "a photo of ")
_SYNONYMS = {
    "sphere": "ball|orb|globe|spheres|balls",
    "cube": "box|block|cubes|boxes|blocks",
    "cone": "pyramid|cones",
    "cylinder": "can|tube|barrel|pillar|cylinders",
    "torus": "donut|doughnut|ring|rings|tori|donuts",
    "yellow metal": "gold|golden",
    "white metal": "silver|chrome",
    "red": "crimson|scarlet",
    "cyan": "turquoise|teal|aqua",
    "purple": "violet|magenta",
    "white": "ivory",
    "small": "little|tiny|mini",
    "large": "big|huge|giant",
    "metal": "metallic|steel|iron",
    "glossy": "shiny|polished|plastic",
    "matte": "dull|clay",
    "checkered": "checked|chequered|checkerboard",
    "a": "an|one",
    "middle": "center|centre",
    "grass": "meadow|lawn",
    "sand": "beach|desert",
    "stone": "rock|concrete|pavement",
    "wood": "wooden|planks|table",
    "tiles": "tile|chessboard|floor",
    "day": "daylight|noon",
    "sunset": "dusk|sundown|evening",
    "night": "midnight",
}
_OTHER_WORDS = (
    "a the of and with to on in at by picture photo two three left right middle behind front "
    "next side between row from one other seen low down eye level above"
)


def vocabulary() -> list[str]:
    """All words that captions use, in a fixed order."""
    words = [*_OTHER_WORDS.split(), *COLOURS, *SHAPES, *SIZES, *MATERIALS, *GROUNDS, *SKIES]
    return list(dict.fromkeys(words))


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of captions of scenes."""
    return build_tokenizer(vocabulary(), _SYNONYMS, MAX_TOKENS)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Say it as people do, in one of many ways.

    Args:
        scene: what to say, complete or not.
        rng: chooses the phrasing.
    """
    setting = [f"on {scene.ground}"] if scene.ground is not None else []
    setting += [_WHEN[scene.sky]] if scene.sky is not None else []
    if rng.random() < 0.3:
        setting.reverse()
    setting += [_SEEN[scene.view]] if scene.view is not None else []
    subject = _subject(scene, rng)
    if setting and rng.random() < 0.15:
        return f"{' '.join(setting)}, {subject}"
    if subject.split()[0] in ("a", "an", "two", "three"):
        subject = _choose(rng, _LEAD_INS) + subject
    if len(setting) > 1 and rng.random() < 0.5:
        return f"{subject}, {' '.join(setting)}"
    return " ".join([subject, *setting])


def _subject(scene: Scene, rng: np.random.Generator) -> str:
    if scene.twins():
        noun = f"{_NUMBERS[scene.num_objects]} {_noun(scene.solids[0], rng, plural=True)}"
        return noun + {"behind": " one behind the other", "left of": " side by side", "row": " in a row"}.get(
            {"beside": "left of", "between": "row"}.get(scene.place or "", scene.place or ""), ""
        )
    phrases = [_phrase(solid, rng) for solid in scene.solids]
    return {1: _one, 2: _two, 3: _three}[scene.num_objects](phrases, scene.place, rng)


def _noun(solid: Solid, rng: np.random.Generator, *, plural: bool = False) -> str:
    adjectives = [part for part in (solid.size, solid.colour, solid.material) if part is not None]
    if rng.random() < 0.2:
        adjectives = [adjectives[i] for i in rng.permutation(len(adjectives))]
    shape = {"torus": "tori"}.get(solid.shape, f"{solid.shape}s") if plural else solid.shape
    return " ".join([*adjectives, shape])


def _phrase(solid: Solid, rng: np.random.Generator) -> str:
    noun = _noun(solid, rng)
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _one(phrases: Sequence[str], place: str | None, rng: np.random.Generator) -> str:
    (a,) = phrases
    if place is None:
        return a.split(" ", 1)[1] if rng.random() < 0.2 else a
    return _choose(rng, (f"{a} {_AT[place]}", f"{a} {_AT[place]}", f"{_AT[place]} {a}"))


def _two(phrases: Sequence[str], place: str | None, rng: np.random.Generator) -> str:
    if place in (None, "beside"):
        a, b = (phrases[i] for i in rng.permutation(2))
        if place is None:
            return _choose(rng, (f"{a} and {b}", f"{a} and {b}", f"{a} with {b}"))
        return _choose(rng, (f"{a} next to {b}", f"{a} and {b} side by side"))
    a, b = phrases
    if place == "behind":
        return _choose(rng, (f"{a} behind {b}", f"{b} in front of {a}"))
    return _choose(
        rng,
        (
            f"{a} left of {b}",
            f"{a} to the left of {b}",
            f"{b} right of {a}",
            f"{a} on the left and {b} on the right",
        ),
    )


def _three(phrases: Sequence[str], place: str | None, rng: np.random.Generator) -> str:
    if place is None:
        a, b, c = (phrases[i] for i in rng.permutation(3))
        return _choose(rng, (f"{a}, {b} and {c}", f"{a} and {b} and {c}"))
    a, b, c = phrases
    if place == "between":
        a, c = (a, c) if rng.random() < 0.5 else (c, a)
        return f"{b} between {a} and {c}"
    return _choose(
        rng,
        (
            f"{a} on the left, {b} in the middle and {c} on the right",
            f"{b} in the middle, {a} on the left and {c} on the right",
            f"from left to right {a}, {b} and {c}",
        ),
    )


def words_of(prompt: str) -> list[str] | None:
    """The known words of a prompt, synonyms folded; None if it has others."""
    tokenizer = make_tokenizer()
    words = list(tokenizer.convert_ids_to_tokens(tokenizer(prompt)["input_ids"])[:-1])
    return None if tokenizer.unk_token in words else words


def scene_said_by(prompt: str) -> Scene | None:
    """What a prompt asks for; None if it is no scene or has words that captions do not know."""
    words = words_of(prompt)
    if words is None:
        return None
    setting = {
        "ground": _first(GROUNDS, words),
        "sky": _first(SKIES, words),
        "view": next((name for name, key in _VIEW_WORDS.items() if key in words), None),
    }
    solids, numbers, ends = _solids_said(words)
    if not solids or any(solid is None for solid in solids):
        return None
    known = [solid for solid in solids if solid is not None]
    if len(known) == 1 and numbers[0] > 1:
        place = "behind" if "behind" in words else "left of" if "side" in words else None
        place = "row" if "row" in words and numbers[0] == 3 else place
        return Scene((known[0],) * numbers[0], place, **setting)
    if len(known) > 3 or max(numbers) > 1:
        return None
    gaps = [words[a:b] for a, b in zip([0, *ends], [*ends, len(words)], strict=True)]
    scene = Scene(tuple(known), None, **setting)
    return {1: _place_one, 2: _place_two, 3: _place_three}[len(known)](scene, gaps)


_VIEW_WORDS = {"low": "low", "level": "eye", "high": "above"}


def _first(known: Iterable[str], words: Sequence[str]) -> str | None:
    return next((word for word in words if word in tuple(known)), None)


def _solids_said(words: Sequence[str]) -> tuple[list[Solid | None], list[int], list[int]]:
    """Solids in the order in which they are named, how many of each, and where the name of each ends."""
    solids: list[Solid | None] = []
    numbers, ends, start = [], [], 0
    for end, word in enumerate(words, 1):
        if word in SHAPES:
            before = words[start:end]
            colour = _first(COLOURS, before)
            said = Solid(word, colour or "", _first(SIZES, before), _first(MATERIALS, before))
            solids.append(said if colour else None)
            numbers.append(next((n for n, name in _NUMBERS.items() if name in before), 1))
            ends.append(end)
            start = end
    return solids, numbers, ends


def _place_one(scene: Scene, gaps: Sequence[Sequence[str]]) -> Scene:
    return replace(scene, place=_first(_AT, [word for gap in gaps for word in gap]))


def _place_two(scene: Scene, gaps: Sequence[Sequence[str]]) -> Scene:
    _, between, after = gaps
    a, b = scene.solids
    relations: dict[str, Callable[[], Scene]] = {
        "behind": lambda: replace(scene, place="behind"),
        "front": lambda: replace(scene, place="behind", solids=(b, a)),
        "next": lambda: replace(scene, place="beside"),
        "left": lambda: replace(scene, place="left of"),
        "right": lambda: replace(scene, place="left of", solids=(b, a)),
    }
    for word, placed in relations.items():
        if word in between:
            return placed()
    return replace(scene, place="beside") if "side" in after else scene


def _place_three(scene: Scene, gaps: Sequence[Sequence[str]]) -> Scene:
    first, second, third = scene.solids
    if "between" in gaps[1]:
        return replace(scene, place="between", solids=(second, first, third))
    if "left" in gaps[0] and "right" in gaps[0]:
        return replace(scene, place="row")
    spots = [_first(_AT, gap) for gap in gaps[1:]]
    if sorted(spot or "" for spot in spots) == sorted(_AT):
        order = dict(zip(spots, scene.solids, strict=True))
        return replace(scene, place="row", solids=tuple(order[spot] for spot in _AT))
    return scene
