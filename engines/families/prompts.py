"""Prompts to what a network is told of them, for sampling and training; serving runs the same text stage."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engines.denoiser import Conditioning, concat
from engines.families.tokenizer import PromptTokenizers


class PromptEncoder:
    """Tokenizers and text encoders of a checkpoint.

    Args:
        tokenizers: prompts to the inputs of `stage`.
        stage: the family's text stage: (B, L, D) embeddings, and in some families a pooled (B, P) after them.
        device: where the encoders run and their results stay.
        zero_uncond: the conditioning of no prompt is zeros, not what the encoders make of an empty one.
    """

    def __init__(
        self,
        tokenizers: PromptTokenizers,
        stage: nn.Module,
        *,
        device: torch.device | str = "cpu",
        zero_uncond: bool = False,
    ) -> None:
        self.max_tokens = tokenizers.max_tokens
        self.device = device
        self._tokenizers = tokenizers
        self._stage = stage.eval().to(device)
        self._zero_uncond = zero_uncond

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], batch_size: int = 256) -> Conditioning:
        """Encode prompts as the family's diffusers pipeline does.

        Returns:
            Conditioning of len(prompts) rows, fp32 text, int64 mask, without `num_steps`.
        """
        starts = range(0, len(prompts), batch_size)
        return concat([self._encode(prompts[start : start + batch_size]) for start in starts])

    def unconditional(self) -> Conditioning:
        """One row for classifier-free guidance: what the network is told when there is no prompt."""
        cond = self([""])
        if not self._zero_uncond:
            return cond
        pooled = None if cond.pooled is None else torch.zeros_like(cond.pooled)
        return Conditioning(torch.zeros_like(cond.text), cond.mask, pooled=pooled)

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = {name: tensor.to(self.device) for name, tensor in self._tokenizers(prompts).items()}
        outputs = self._stage(*tokens.values())
        text, *pooled = (outputs,) if isinstance(outputs, Tensor) else outputs
        mask = tokens.get("mask")
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.int64, device=self.device)
        return Conditioning(text, mask, pooled=pooled[0] if pooled else None)
