"""PixArt-alpha: the parts of a diffusers `PixArtAlphaPipeline` directory, a wrapper per stage.

The same code serves the published PixArt-alpha (120 T5-XXL tokens, epsilon-prediction, learned sigma,
micro-conditions) and the small students of this project; everything that differs is read from the
directory's own configs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from engines.families.checkpoint import fill, load_weights, read_config

STEPS_EMBEDDING_KEY = "adaln_single.emb.steps_embedding.weight"


class StepAwareEmbeddings(PixArtAlphaCombinedTimestepSizeEmbeddings):
    """Timestep (and size) embedding that also knows how many steps the student takes in all.

    Row K of `steps_embedding` is added to the embedding of a K-step student. It starts at zero; a row that
    stays zero leaves the network exactly what plain diffusers makes of it, which ignores the extra tensor.
    """

    def __init__(self, base: PixArtAlphaCombinedTimestepSizeEmbeddings, max_num_steps: int) -> None:
        weight = base.timestep_embedder.linear_2.weight
        super().__init__(
            weight.shape[0], base.outdim, use_additional_conditions=base.use_additional_conditions
        )
        for name, child in base.named_children():
            setattr(self, name, child)
        self.steps_embedding = nn.Embedding(
            max_num_steps + 1, weight.shape[0], device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.steps_embedding.weight)

    def forward(
        self,
        timestep: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype = torch.float32,
        num_steps: Tensor | None = None,
    ) -> Tensor:
        """Embed the timestep.

        Args:
            timestep: (B,) int64.
            resolution: (B, 2) pixels, or None where the network has no micro-conditions.
            aspect_ratio: (B, 1) height / width, or None likewise.
            batch_size: B.
            hidden_dtype: dtype of the result.
            num_steps: (B,) int64, steps the student takes in all; None adds nothing.

        Returns:
            (B, D) embedding.
        """
        embedding: Tensor = super().forward(timestep, resolution, aspect_ratio, batch_size, hidden_dtype)
        if num_steps is None:
            return embedding
        steps: Tensor = self.steps_embedding(num_steps)
        return embedding + steps.to(embedding.dtype)


def make_step_aware(transformer: PixArtTransformer2DModel, max_num_steps: int = 4) -> None:
    """Replace the timestep embedding by a `StepAwareEmbeddings`, in place; weights and their keys stay."""
    adaln = transformer.adaln_single
    if not isinstance(adaln.emb, StepAwareEmbeddings):
        adaln.emb = StepAwareEmbeddings(adaln.emb, max_num_steps)


def load_transformer(directory: Path, dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    """Load `directory/transformer`, step-aware if its weights say so.

    Args:
        directory: a `PixArtAlphaPipeline` directory.
        dtype: dtype of the parameters in memory, whatever it is on disk.

    Returns:
        The transformer in eval mode.

    Raises:
        CheckpointError: config or weights are missing, damaged, or do not fit each other.
    """
    part = Path(directory) / "transformer"
    transformer: Any = PixArtTransformer2DModel.from_config(read_config(part))
    weights = load_weights(part)
    if STEPS_EMBEDDING_KEY in weights:
        make_step_aware(transformer, max_num_steps=weights[STEPS_EMBEDDING_KEY].shape[0] - 1)
    return fill(transformer, weights, part, dtype)
