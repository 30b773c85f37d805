"""How well a teacher draws what it is asked for: what an `Eye` sees in its pictures, group by group."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from engines.demo.studio.captions import caption
from engines.demo.studio.dataset import Pictures
from engines.demo.studio.outlines import crispness
from engines.demo.studio.reader import Eye, Look, deform
from engines.demo.studio.scenes import Scene, sample_scenes
from engines.demo.studio.text import PARTLY_SAID
from engines.gate.frechet import Reference

GROUPS = {
    "one": (1, "train"),
    "two": (2, "train"),
    "three": (3, "train"),
    "held_out_one": (1, "held_out"),
    "held_out_two": (2, "held_out"),
}
"""Kinds of prompts: how many solids, and whether their pairs of shape and colour were ever shown."""


class Draws(Protocol):
    """Whatever turns captions into pictures."""

    def __call__(
        self, captions: list[str], seeds: Sequence[int], *, num_steps: int, guidance_scale: float = 1.0
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Questions:
    """Prompts of all groups.

    Attributes:
        captions: what samplers are told.
        asked: what that asks for.
        scenes: a complete scene of each, as they are rendered.
        groups: of `GROUPS`.
        seed: they were drawn with.
    """

    captions: list[str]
    asked: list[Scene]
    scenes: list[Scene]
    groups: list[str]
    seed: int

    def __len__(self) -> int:
        return len(self.captions)


def ask(per_group: int, seed: int) -> Questions:
    """Draw prompts; what makes a scene a held-out one is always said."""
    rng = np.random.default_rng([seed, 31])
    asked, scenes, groups = [], [], []
    for group, (number, split) in GROUPS.items():
        for scene in sample_scenes(per_group, seed, num_objects=number, split=split):  # type: ignore[arg-type]
            scenes.append(scene)
            groups.append(group)
            asked.append(scene.partly_said(rng) if rng.random() < PARTLY_SAID else scene)
    return Questions([caption(scene, rng) for scene in asked], asked, scenes, groups, seed)


def reference(eye: Eye, reals: Tensor) -> Reference:
    """Real pictures as Fréchet distances see them."""
    return Reference.fit(eye.features(reals))


def _share(hits: Sequence[bool]) -> float:
    return round(100 * sum(hits) / max(1, len(hits)), 2)


def marks_of(questions: Questions, looks: Sequence[Look]) -> dict[str, dict[str, float]]:
    """Percent of each group that shows all that was asked ("said"), is sound as a `Look`, both ("exact")."""
    table: dict[str, dict[str, float]] = {}
    pairs = list(zip(questions.groups, questions.asked, looks, strict=True))
    for group in dict.fromkeys(questions.groups):
        mine = [(asked.shown_by(look.scene), look.is_sound) for name, asked, look in pairs if name == group]
        table[group] = {
            "said": _share([said for said, _ in mine]),
            "sound": _share([sound for _, sound in mine]),
            "exact": _share([said and sound for said, sound in mine]),
        }
    return table


def examine(eye: Eye, questions: Questions, images: Tensor, real: Reference) -> dict[str, Any]:
    """Everything that is measured of one sampler's pictures.

    Args:
        eye: who looks.
        questions: what was asked.
        images: (N, 96, 96, 3) uint8, one for each.
        real: from pictures of the same number of prompts.
    """
    looks = eye.look(images)
    return {
        "groups": marks_of(questions, looks),
        "crispness": round(crispness(images, eye.marks(images)), 4),
        "frechet": round(real.distance(eye.features(images)), 3),
    }


def paint(draws: Draws, questions: Questions, *, num_steps: int, guidance_scale: float) -> Tensor:
    """One picture of each prompt; the same noise for every sampler."""
    seeds = [questions.seed * 1_000_003 + row for row in range(len(questions))]
    return draws(questions.captions, seeds, num_steps=num_steps, guidance_scale=guidance_scale)


def psnr(images: Tensor, reals: Tensor) -> float:
    """Peak signal to noise ratio of uint8 pictures, in decibels."""
    error = (images.float() - reals.float()).square().mean().clamp_min(1e-6)
    return float(10 * torch.log10(255.0**2 / error))


def inspect_eye(eye: Eye, fresh: Pictures) -> dict[str, Any]:
    """What an eye sees in pictures it does not know, and in the same pictures deformed.

    Returns:
        Of fresh pictures and each kind of `spoilt_pictures`, `marks_of` by number of solids, and crispness.
    """
    images, masks = fresh.images.cpu(), fresh.masks.cpu()
    asked = Questions([], fresh.scenes, fresh.scenes, [f"{s.num_objects}" for s in fresh.scenes], 0)
    rows: dict[str, Any] = {}
    for name, spoilt in {"fresh": images, **spoilt_pictures(images, masks)}.items():
        looks = eye.look(spoilt)
        table = marks_of(asked, looks)
        rows[name] = table | {"crispness": round(crispness(spoilt, eye.marks(spoilt)), 4)}
    read = eye.marks(images)
    both, either = ((read > 0) & (masks > 0)).sum(), ((read > 0) | (masks > 0)).sum()
    rows["marks_iou"] = round(float(both / either), 4)
    return rows


def spoilt_pictures(images: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Renders (N, 96, 96, 3) that are wrong in one way each, which a judge has to notice."""
    pictures = images.permute(0, 3, 1, 2).float()
    drawn = torch.Generator().manual_seed(0)
    melted, _ = deform(pictures, masks, torch.full((len(images),), 4.0), drawn)
    padded = functional.pad(pictures, (2, 2, 2, 2), mode="replicate")
    lower = functional.interpolate(pictures[:, :, 4:], size=(58, 96), mode="bilinear", antialias=True)
    squashed = torch.cat([pictures[:, :, :1].expand(-1, -1, 38, -1), lower], dim=2)
    last = masks.flatten(1).amax(1)[:, None, None]
    hole = (functional.max_pool2d((masks == last).float()[:, None], 5, 1, 2) > 0).expand(-1, 3, -1, -1)
    ground = pictures[:, :, -1:, :].expand_as(pictures)
    spoilt = {
        "blurred": functional.avg_pool2d(padded, 5, 1),
        "melted": melted,
        "squashed": squashed,
        "one_missing": torch.where(hole, ground, pictures),
    }
    return {
        name: picture.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        for name, picture in spoilt.items()
    }


def save_sheet(columns: Sequence[Tensor], path: Path, *, every: int = 1, scale: int = 2) -> None:
    """Pictures side by side: a row for every so many prompts, a column for each sampler."""
    rows = [torch.cat([column[row] for column in columns], dim=1) for row in range(0, len(columns[0]), every)]
    sheet = Image.fromarray(torch.cat(rows, dim=0).numpy())
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.LANCZOS).save(path)
