"""A stage that is none: four floats in, as many times some factor out."""

from __future__ import annotations

from torch import Tensor, nn

from engines.bundle.bucket import Bucket
from engines.bundle.stages import StageSpec, TensorSpec
from engines.runtime.stages import EagerEngine, Stage

BUCKET = Bucket(64, 64)


def doubling_spec(maximum: int | None = None) -> StageSpec:
    """A stage that is none: four floats in, four out."""
    return StageSpec(
        name="denoise",
        parts=("transformer",),
        bucket=BUCKET,
        inputs=(TensorSpec(name="latents", dtype="float32", shape=(4,), maximum=maximum),),
        outputs=(TensorSpec(name="prediction", dtype="float32", shape=(4,)),),
    )


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, latents: Tensor) -> Tensor:
        return latents * self.factor


def scaled_stage(factor: float) -> Stage:
    return Stage(doubling_spec(), [EagerEngine(Scaled(factor), 4)], 4)
