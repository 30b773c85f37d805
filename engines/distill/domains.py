"""What a gate asks for: scenes of the demos, which can be rendered and read back, or a file's prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from torch import Tensor

from engines.demo import scenes as images
from engines.demo.judge import Judge
from engines.demo.video import scenes as videos
from engines.demo.video.judge import VideoJudge


class Scene(Protocol):
    """What a caption says; attributes that are None are left unsaid. A frozen dataclass."""

    def caption(self) -> str: ...
    def is_held_out(self) -> bool: ...
    def partly_said(self, rng: np.random.Generator) -> Self: ...
    def shown_by(self, seen: Any) -> bool: ...


class Reader(Protocol):
    """A judge: says what pictures show, and gives the features that distances are taken between."""

    def read(self, images: Tensor, *, batch: int = 250) -> Sequence[Any]: ...
    def features(self, images: Tensor, *, batch: int = 250) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of one seed.

    Attributes:
        captions: what samplers are told.
        groups: which kind each is; empty if there are no kinds.
        seed: they were drawn with.
        asked: what the captions say, and `scenes` a complete scene for each; both empty for prompts from a
            file, which nobody can render.
    """

    captions: list[str]
    groups: list[str]
    seed: int
    asked: list[Any]
    scenes: list[Any]

    def take(self, rows: Sequence[int]) -> PromptSet:
        """Some of them, in this order."""

        def of(values: list[Any]) -> list[Any]:
            return [values[row] for row in rows] if values else []

        return PromptSet(of(self.captions), of(self.groups), self.seed, of(self.asked), of(self.scenes))


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
        judge_name: of the shipped judge's file.
    """

    groups: Mapping[str, str]
    partial_share: float
    counts: Callable[[int], dict[str, int]]
    draw: Callable[[str, int, int], Sequence[Scene]]
    draw_like: Callable[[Any, int, int], Sequence[Scene]]
    draw_pixels: Callable[[Sequence[Any], int], Tensor]
    load_judge: Callable[[Path], Reader]
    judge_name: str

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


@dataclass(frozen=True, slots=True)
class FileDomain:
    """Prompts that somebody wrote; nobody can render them or read them back.

    Attributes:
        captions: all of them.
    """

    captions: tuple[str, ...]

    @property
    def groups(self) -> Mapping[str, str]:
        """There are no kinds."""
        return {}

    def counts(self, num: int) -> dict[str, int]:
        return {"prompts": num}

    def prompts(self, seed: int, num: int) -> PromptSet:
        """Draw prompts, each as often as the others when more are wanted than there are."""
        rng = np.random.default_rng([seed, 77])
        rounds = -(-num // len(self.captions))
        order = np.concatenate([rng.permutation(len(self.captions)) for _ in range(rounds)])[:num]
        return PromptSet([self.captions[row] for row in order], [], seed, [], [])


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


def _draw_images(group: str, num: int, seed: int) -> Sequence[Scene]:
    if group == "held_out":
        return images.sample_scenes(num, seed, split="held_out")
    return images.sample_scenes(num, seed, split="train", num_objects=1 if group == "one_object" else 2)


def _draw_images_like(asked: images.Scene, num: int, seed: int) -> Sequence[Scene]:
    return images.sample_scenes(num, seed, num_objects=1 if asked.num_objects == 1 else 2)


def video_counts(num: int) -> dict[str, int]:
    """A fifth with held-out pairs."""
    return {"seen": num - num // 5, "held_out": num // 5}


def _draw_videos(group: str, num: int, seed: int) -> Sequence[Scene]:
    return videos.sample_scenes(num, seed, split="held_out" if group == "held_out" else "train")


def _draw_videos_like(asked: videos.Scene, num: int, seed: int) -> Sequence[Scene]:
    return videos.sample_scenes(num, seed, split="held_out" if asked.is_held_out() else "train")


DEMOS: Mapping[str, DemoDomain] = {
    "image": DemoDomain(
        groups={"one_object": "one object", "two_objects": "two objects", "held_out": "held-out pairs"},
        partial_share=0.75,
        counts=image_counts,
        draw=_draw_images,
        draw_like=_draw_images_like,
        draw_pixels=images.render,
        load_judge=Judge.load,
        judge_name="judge.safetensors",
    ),
    "video": DemoDomain(
        groups={"seen": "seen pairs", "held_out": "held-out pairs"},
        partial_share=0.75,
        counts=video_counts,
        draw=_draw_videos,
        draw_like=_draw_videos_like,
        draw_pixels=videos.render,
        load_judge=VideoJudge.load,
        judge_name="video-judge.safetensors",
    ),
}
"""By the kind of student."""
