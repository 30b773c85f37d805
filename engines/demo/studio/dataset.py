"""Rendered scenes on disk: pictures with their outlines, drawn once and read by every training stage."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engines.demo.dataset import SHARD_SIZE, render_set
from engines.demo.studio.renderer import render
from engines.demo.studio.scenes import MAX_OBJECTS, Scene, Split, sample_scenes

SHARES = (0.35, 0.4, 0.25)
"""Of scenes with one, two and three solids."""


def mixed_scenes(num: int, seed: int, split: Split) -> list[Scene]:
    """Complete scenes in the shares in which pictures are trained on, one solid first."""
    two, three = round(num * SHARES[1]), round(num * SHARES[2])
    counts = (num - two - three, two, three)
    return [
        scene
        for number, count in zip(range(1, MAX_OBJECTS + 1), counts, strict=True)
        for scene in sample_scenes(count, seed, num_objects=number, split=split)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudioSet:
    """A fixed set of scenes: the same recipe always gives the same scenes and pictures.

    Attributes:
        num_shards: of `shard_size` scenes each.
        seed: of the first shard; shard i uses seed + i.
        split: which (shape, colour) pairs may occur.
    """

    num_shards: int
    seed: int
    split: Split
    shard_size: int = SHARD_SIZE

    def __len__(self) -> int:
        return self.num_shards * self.shard_size

    def shard_scenes(self, shard: int) -> list[Scene]:
        return mixed_scenes(self.shard_size, self.seed + shard, self.split)

    def scenes(self) -> list[Scene]:
        return [scene for shard in range(self.num_shards) for scene in self.shard_scenes(shard)]

    def shard_name(self, shard: int) -> str:
        size = "" if self.shard_size == SHARD_SIZE else f"-{self.shard_size}"
        return f"studio-{self.split}-{self.seed + shard:06d}{size}"

    def draw_shard(self, shard: int) -> Tensor:
        """(shard_size, 96, 96, 4) uint8: red, green, blue, and which solid it is."""
        drawn = render(self.shard_scenes(shard), self.seed + shard)
        return torch.cat([drawn.images, drawn.masks[..., None]], dim=3)


@dataclass(frozen=True, slots=True)
class Pictures:
    """A set as the stages read it: (N, 96, 96, 3) and (N, 96, 96) uint8, and what was drawn."""

    images: Tensor
    masks: Tensor
    scenes: list[Scene]


def read_set(scenes: StudioSet, directory: Path, *, num_processes: int) -> Pictures:
    """Draw what is missing of a set and read all of it."""
    pictures = torch.from_numpy(render_set(scenes, directory, num_processes=num_processes))
    return Pictures(pictures[..., :3].contiguous(), pictures[..., 3].contiguous(), scenes.scenes())


def draw_set(scenes: StudioSet, device: str, *, chunk: int = 256) -> Pictures:
    """Draw a set on a GPU and leave it there; faster than reading it."""
    shards = [
        render(scenes.shard_scenes(shard), scenes.seed + shard, device=device, chunk=chunk, keep=True)
        for shard in range(scenes.num_shards)
    ]
    images, masks = torch.cat([s.images for s in shards]), torch.cat([s.masks for s in shards])
    return Pictures(images, masks, scenes.scenes())
