"""Rendered scenes on disk: shards that are drawn once and read by every training stage."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engines.demo.renderer import render
from engines.demo.scenes import Scene, Split, sample_scenes

SHARD_SIZE = 1000


class Shards(Protocol):
    """A fixed set of pictures or clips, drawn a shard at a time."""

    @property
    def num_shards(self) -> int: ...

    def shard_name(self, shard: int) -> str:
        """Name of the shard's file, without ending: the same only for the same pixels."""
        ...

    def draw_shard(self, shard: int) -> Tensor:
        """Draw (pictures of a shard, ...) uint8; all shards have the same number."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneSet:
    """A recipe for a fixed set of scenes: the same recipe always gives the same scenes and pictures.

    Attributes:
        num_shards: `SHARD_SIZE` scenes each.
        seed: of the first shard; shard i uses seed + i.
        split: which (shape, colour) pairs may occur.
        two_object_share: share of scenes with two solids.
    """

    num_shards: int
    seed: int
    split: Split
    two_object_share: float

    def __len__(self) -> int:
        return self.num_shards * SHARD_SIZE

    def shard_scenes(self, shard: int) -> list[Scene]:
        seed = self.seed + shard
        num_two = round(SHARD_SIZE * self.two_object_share)
        ones = sample_scenes(SHARD_SIZE - num_two, seed, split=self.split, num_objects=1)
        return ones + sample_scenes(num_two, seed, split=self.split, num_objects=2)

    def scenes(self) -> list[Scene]:
        return [scene for shard in range(self.num_shards) for scene in self.shard_scenes(shard)]

    def shard_name(self, shard: int) -> str:
        return f"{self.split}-{round(100 * self.two_object_share)}-{self.seed + shard:06d}"

    def draw_shard(self, shard: int) -> Tensor:
        return render(self.shard_scenes(shard), self.seed + shard)


def _render_shard(shards: Shards, shard: int, path: Path) -> None:
    torch.set_num_threads(1)
    pictures = shards.draw_shard(shard).numpy()
    partial = path.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as file:
        np.save(file, pictures)
    partial.replace(path)


def render_set(
    shards: Shards,
    directory: Path,
    *,
    num_processes: int,
    on_shard: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw what is missing of a set and read all of it.

    Args:
        shards: the set.
        directory: keeps the shards; finished ones are not drawn again.
        num_processes: single-threaded renderers side by side.
        on_shard: called with (done, total) shards.
    Returns:
        (N, ...) uint8, as the set draws them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{shards.shard_name(shard)}.npy" for shard in range(shards.num_shards)]
    missing = [shard for shard, path in enumerate(paths) if not path.exists()]
    done = len(paths) - len(missing)
    if missing:
        with ProcessPoolExecutor(num_processes) as pool:
            for future in as_completed(pool.submit(_render_shard, shards, s, paths[s]) for s in missing):
                future.result()
                done += 1
                if on_shard is not None:
                    on_shard(done, len(paths))
    first = np.load(paths[0], allow_pickle=False)
    size = len(first)
    pictures = np.empty((len(paths) * size, *first.shape[1:]), dtype=np.uint8)
    for shard, path in enumerate(paths):
        pictures[shard * size : (shard + 1) * size] = np.load(path, allow_pickle=False)
    return pictures
