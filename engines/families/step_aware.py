"""The number of steps as a condition of networks whose timestep embedding is a `TimestepEmbedding`.

These are SDXL's UNet and CogVideoX's transformer; PixArt's is another class (see `families.pixart`).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

STEPS_EMBEDDING_KEY = "time_embedding.steps_embedding.weight"


class StepAwareTimeEmbedding(TimestepEmbedding):
    """Timestep embedding that also knows how many steps the student takes in all.

    Row K of `steps_embedding` is added to the embedding of a K-step student. It starts at zero; a row that
    stays zero leaves the network exactly what plain diffusers makes of it, which ignores the extra tensor.
    Networks hand their argument `timestep_cond` to this module, and use it for nothing else.
    """

    def __init__(self, base: TimestepEmbedding, max_num_steps: int) -> None:
        if base.cond_proj is not None:
            raise ValueError("time_cond_proj_dim: this network's timestep has another condition already")
        nn.Module.__init__(self)
        self.linear_1, self.act, self.linear_2 = base.linear_1, base.act, base.linear_2
        self.cond_proj, self.post_act = None, base.post_act
        weight = base.linear_2.weight
        self.steps_embedding = nn.Embedding(
            max_num_steps + 1, weight.shape[0], device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.steps_embedding.weight)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Embed the timestep.

        Args:
            sample: (B, E) sinusoids of the timestep.
            condition: (B,) int64, steps the student takes in all; None adds nothing.

        Returns:
            (B, D) embedding.
        """
        embedding: Tensor = super().forward(sample)
        if condition is None:
            return embedding
        steps: Tensor = self.steps_embedding(condition)
        return embedding + steps.to(embedding.dtype)


def make_step_aware(network: nn.Module, max_num_steps: int = 4) -> None:
    """Replace `network.time_embedding` by a step-aware one, in place; weights and their keys stay.

    Raises:
        ValueError: the network's timestep has a condition of its own.
    """
    if not has_steps_embedding(network):
        embedding: Any = network.time_embedding
        network.time_embedding = StepAwareTimeEmbedding(embedding, max_num_steps)


def has_steps_embedding(network: nn.Module) -> bool:
    """Whether `make_step_aware` was here."""
    return hasattr(network.time_embedding, "steps_embedding")
