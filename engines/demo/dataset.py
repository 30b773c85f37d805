"""Rendered scenes on disk: shards of pictures that are drawn once and read by every training stage."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from engines.demo.scenes import IMAGE_SIZE, Scene, Split, render, sample_scenes

SHARD_SIZE = 1000


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


def _shard_path(directory: Path, scene_set: SceneSet, shard: int) -> Path:
    share = round(100 * scene_set.two_object_share)
    return directory / f"{scene_set.split}-{share}-{scene_set.seed + shard:06d}.npy"


def _render_shard(scene_set: SceneSet, shard: int, path: Path) -> None:
    torch.set_num_threads(1)
    pictures = render(scene_set.shard_scenes(shard), scene_set.seed + shard).numpy()
    partial = path.with_suffix(f".{os.getpid()}.part")
    with partial.open("wb") as file:
        np.save(file, pictures)
    partial.replace(path)


def render_set(
    scene_set: SceneSet,
    directory: Path,
    *,
    num_processes: int,
    on_shard: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw what is missing of a set and read all of it.

    Args:
        scene_set: the recipe.
        directory: keeps the shards; finished ones are not drawn again.
        num_processes: single-threaded renderers side by side.
        on_shard: called with (done, total) shards.
    Returns:
        (N, 64, 64, 3) uint8.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [_shard_path(directory, scene_set, shard) for shard in range(scene_set.num_shards)]
    missing = [shard for shard, path in enumerate(paths) if not path.exists()]
    done = len(paths) - len(missing)
    if missing:
        with ProcessPoolExecutor(num_processes) as pool:
            for future in as_completed(pool.submit(_render_shard, scene_set, s, paths[s]) for s in missing):
                future.result()
                done += 1
                if on_shard is not None:
                    on_shard(done, len(paths))
    pictures = np.empty((len(scene_set), IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    for shard, path in enumerate(paths):
        pictures[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE] = np.load(path, allow_pickle=False)
    return pictures
