"""The demo's scenes as a domain: what a gate asks for, renders, and has read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor

from engines.demo import scenes
from engines.demo.judge import Judge
from engines.demo.renderer import render
from engines.gate.domain import Judge as AnyJudge
from engines.gate.domain import PromptSet

CHECKPOINTS = Path(__file__).parent / "checkpoints"


class Scene(Protocol):
    """What a caption says; attributes that are None are left unsaid. A frozen dataclass."""

    def caption(self) -> str: ...
    def is_held_out(self) -> bool: ...
    def partly_said(self, rng: np.random.Generator) -> Self: ...
    def shown_by(self, seen: Any) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoDomain:
    """Scenes of a demo.

    Attributes:
        groups: kinds of prompts, and what the table calls them; the first is the one a student must keep.
        partial_share: share of prompts in which attributes are left unsaid.
        counts: how many of each kind there are among so many prompts.
        draw: so many complete scenes of a kind, from a seed.
        draw_like: so many complete scenes that could fill up a given one, from a seed.
        draw_pixels: render complete scenes, nuisances from a seed; (N, H, W, 3) or (N, F, H, W, 3) uint8.
        load_judge: from safetensors.
        judge_file: of the shipped judge.
        captions: so many prompts to distil with, from a seed.
        draw_training: so many complete scenes, mixed as those prompts are, from a seed.
        asked_by: what a prompt says, None if it has words that are no part of a scene.
    """

    groups: Mapping[str, str]
    partial_share: float
    counts: Callable[[int], dict[str, int]]
    draw: Callable[[str, int, int], Sequence[Scene]]
    draw_like: Callable[[Any, int, int], Sequence[Scene]]
    draw_pixels: Callable[[Sequence[Any], int], Tensor]
    load_judge: Callable[[Path], AnyJudge]
    judge_file: Path
    captions: Callable[[int, int], list[str]]
    draw_training: Callable[[int, int], Sequence[Scene]]
    asked_by: Callable[[str], Scene | None]

    def prompts(self, seed: int, num: int) -> PromptSet:
        """Draw scenes of every kind, and leave attributes unsaid in some of them.

        What makes a scene a held-out one is always said.
        """
        rng = np.random.default_rng([seed, 77])
        scenes, asked, groups = [], [], []
        for group, count in self.counts(num).items():
            for scene in self.draw(group, count, seed):
                partial = scene.partly_said(rng) if rng.random() < self.partial_share else scene
                scenes.append(scene)
                asked.append(partial if partial.is_held_out() == scene.is_held_out() else scene)
                groups.append(group)
        return PromptSet([said.caption() for said in asked], groups, seed, asked, scenes)

    def render(self, prompts: PromptSet) -> Tensor:
        """Real pictures or clips of them."""
        return self.draw_pixels(prompts.scenes, prompts.seed)

    def render_again(self, prompts: PromptSet, copies: int) -> Tensor:
        """Real pictures or clips, `copies` of each prompt in a row; what is unsaid is drawn anew."""
        scenes = []
        for row, asked in enumerate(prompts.asked):
            donors = self.draw_like(asked, copies, prompts.seed * 1000 + row)
            scenes += [complete(asked, donor) for donor in donors]
        return self.draw_pixels(scenes, prompts.seed + 1)

    def illustrated(self, num: int, seed: int) -> tuple[list[str], Tensor]:
        """Captions to distil with, attributes left unsaid in some, and a real picture of each."""
        rng = np.random.default_rng([seed, 2])
        scenes = self.draw_training(num, seed)
        captions = [
            (scene.partly_said(rng) if rng.random() < self.partial_share else scene).caption()
            for scene in scenes
        ]
        return captions, self.draw_pixels(scenes, seed)


def complete(asked: Any, donor: Any) -> Any:
    """Fill what a scene leaves unsaid from another one of its kind."""
    if asked is None:
        return donor
    if isinstance(asked, tuple):
        return tuple(complete(part, other) for part, other in zip(asked, donor, strict=True))
    if hasattr(asked, "__dataclass_fields__"):
        names = [field.name for field in fields(asked)]
        return replace(
            asked, **{name: complete(getattr(asked, name), getattr(donor, name)) for name in names}
        )
    return asked


def image_counts(num: int) -> dict[str, int]:
    """A fifth with held-out pairs, the rest half with one object and half with two."""
    held_out = num // 5
    one_object = (num - held_out) // 2
    return {"one_object": one_object, "two_objects": num - held_out - one_object, "held_out": held_out}


def _draw(group: str, num: int, seed: int) -> Sequence[Scene]:
    if group == "held_out":
        return scenes.sample_scenes(num, seed, split="held_out")
    return scenes.sample_scenes(num, seed, split="train", num_objects=1 if group == "one_object" else 2)


def _draw_like(asked: scenes.Scene, num: int, seed: int) -> Sequence[Scene]:
    return scenes.sample_scenes(num, seed, num_objects=1 if asked.num_objects == 1 else 2)


def _draw_training(num: int, seed: int) -> Sequence[Scene]:
    num_two = round(0.3 * num)
    return [
        *scenes.sample_scenes(num - num_two, seed, split="train", num_objects=1),
        *scenes.sample_scenes(num_two, seed, split="train", num_objects=2),
    ]


def scene_said_by(caption: str) -> scenes.Scene | None:
    """What a caption asks for, in the words that the tokenizer makes of it; None if it is no scene."""
    from engines.demo.text import make_tokenizer

    tokenizer = make_tokenizer()
    words = tokenizer.convert_ids_to_tokens(tokenizer(caption)["input_ids"])[:-1]
    if tokenizer.unk_token in words:
        return None
    text = " ".join(words)
    relation = next((one for one in scenes.RELATIONS if one in text), None)
    solids = []
    for part in text.split(relation) if relation else [text]:
        shape, colour = first_named(scenes.SHAPES, part), first_named(scenes.COLOURS, part)
        if shape is None or colour is None:
            return None
        solids.append(scenes.Solid(shape, colour, first_named(scenes.SIZES, part)))
    place = relation or first_named(scenes.POSITIONS, text)
    return scenes.Scene(
        tuple(solids), place, first_named(scenes.GROUNDS, text), first_named(scenes.SKIES, text)
    )


def first_named(known: Iterable[str], text: str) -> str | None:
    """The first of the known words that a text has."""
    return next((word for word in known if word in text.split()), None)


SCENES = DemoDomain(
    groups={"one_object": "one object", "two_objects": "two objects", "held_out": "held-out pairs"},
    partial_share=0.75,
    counts=image_counts,
    draw=_draw,
    draw_like=_draw_like,
    draw_pixels=render,
    load_judge=Judge.load,
    judge_file=CHECKPOINTS / "judge.safetensors",
    captions=scenes.sample_captions,
    draw_training=_draw_training,
    asked_by=scene_said_by,
)
