"""Sets of rendered clips, kept in shards as the image demo keeps its pictures."""

from dataclasses import dataclass

from torch import Tensor

from engines.demo.dataset import SHARD_SIZE
from engines.demo.video.scenes import Scene, Split, render, sample_scenes


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSet:
    """A recipe for a fixed set of clips: the same recipe always gives the same scenes and pixels.

    Attributes:
        num_shards: `SHARD_SIZE` clips each.
        seed: of the first shard; shard i uses seed + i.
        split: which (colour, motion) pairs may occur.
    """

    num_shards: int
    seed: int
    split: Split

    def shard_scenes(self, shard: int) -> list[Scene]:
        return sample_scenes(SHARD_SIZE, self.seed + shard, split=self.split)

    def scenes(self) -> list[Scene]:
        return [scene for shard in range(self.num_shards) for scene in self.shard_scenes(shard)]

    def shard_name(self, shard: int) -> str:
        return f"{self.split}-{self.seed + shard:06d}"

    def draw_shard(self, shard: int) -> Tensor:
        return render(self.shard_scenes(shard), self.seed + shard)
