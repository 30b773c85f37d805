"""The only data distillation needs: prompts, and what the teacher's text encoder makes of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.captions import read_captions
from engines.denoiser import Conditioning, concat
from engines.distill.config import DistillConfig, PromptSource
from engines.distill.disk import room_for
from engines.domains import load_domain
from engines.families.spec import FamilySpec, family_of

CHUNK = 256
"""Prompts encoded together."""


def load_prompts(source: PromptSource, num_prompts: int, seed: int) -> list[str]:
    """Draw captions of the demo's scenes or videos, or read a file's prompts.

    Raises:
        ConfigError: as `captions.read_captions`.
    """
    if isinstance(source, str):
        return load_domain(source).captions(num_prompts, seed)
    return read_captions(source, num_prompts)


@dataclass(frozen=True, slots=True)
class PromptBank:
    """Encoded prompts to draw training batches from.

    Attributes:
        prompts: N rows, text (N, L, D) and pooled in fp16, on the CPU.
        uncond: what the network is told when there is no prompt, one row.
        max_tokens: L.
        captions: the prompts' texts, if known.
    """

    prompts: Conditioning
    uncond: Conditioning
    max_tokens: int
    captions: tuple[str, ...] = ()

    def draw(self, batch: int, rng: torch.Generator, share: slice = slice(None)) -> Conditioning:
        """Draw rows evenly, with replacement, and keep a share of them; text and pooled are fp32."""
        return self.rows(torch.randint(len(self.prompts), (batch,), generator=rng)[share])

    def rows(self, index: Tensor) -> Conditioning:
        """Select prompts; text and pooled are fp32."""
        rows = self.prompts.rows(index)
        pooled = None if rows.pooled is None else rows.pooled.float()
        return Conditioning(rows.text.float(), rows.mask, pooled=pooled)


def load_prompt_bank(
    config: DistillConfig,
    device: torch.device | str = "cpu",
    prompts: list[str] | None = None,
    *,
    file: str = "prompts.safetensors",
) -> PromptBank:
    """Encode a run's prompts, or read them from `out/FILE` if they were encoded before.

    The cache holds as long as prompts, length and the teacher's text encoders (files, sizes, times) are the
    same. Text encoders can be thousands of times the size of their embeddings; they are freed before training
    starts.

    Args:
        prompts: instead of those that the settings name.
    Raises:
        CheckpointError: the teacher's tokenizers or text encoders cannot be used.
        ConfigError: prompts cannot be read.
        TrainingError: there is no room for the cache.
    """
    if prompts is None:
        prompts = load_prompts(config.prompts, config.num_prompts, config.seed)
    family = family_of(config.teacher)
    path = config.out / file
    key = _fingerprint(prompts, config, family)
    tensors = _read_cache(path, key)
    if tensors is None:
        tensors = _encode(prompts, config, family, device)
        partial = path.with_suffix(".partial")
        with room_for(
            path, sum(tensor.nbytes for tensor in tensors.values()), "Nothing has been trained yet"
        ):
            config.out.mkdir(parents=True, exist_ok=True)
            try:
                save_file(tensors, partial, {"fingerprint": key})
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        partial.replace(path)
    return PromptBank(
        Conditioning(tensors["text"], tensors["mask"], pooled=tensors.get("pooled")),
        Conditioning(tensors["uncond_text"], tensors["uncond_mask"], pooled=tensors.get("uncond_pooled")),
        max_tokens=tensors["text"].shape[1],
        captions=tuple(prompts),
    )


def _encode(
    prompts: list[str], config: DistillConfig, family: FamilySpec, device: torch.device | str
) -> dict[str, Tensor]:
    encode = family.load_encoder(config.teacher, max_tokens=config.max_text_tokens, device=device)
    starts = range(0, len(prompts), CHUNK)
    # a large encoder's embeddings of all prompts would not fit beside it
    bank = concat([_half(encode(prompts[start : start + CHUNK])) for start in starts])
    uncond = encode.unconditional()
    tensors = {
        "text": bank.text,
        "mask": bank.mask,
        "pooled": bank.pooled,
        "uncond_text": uncond.text,
        "uncond_mask": uncond.mask,
        "uncond_pooled": uncond.pooled,
    }
    return {name: value.cpu().contiguous() for name, value in tensors.items() if value is not None}


def _half(cond: Conditioning) -> Conditioning:
    pooled = None if cond.pooled is None else cond.pooled.half()
    return Conditioning(cond.text.half(), cond.mask, pooled=pooled).to("cpu")


def _fingerprint(prompts: list[str], config: DistillConfig, family: FamilySpec) -> str:
    encoder = [
        (str(file.relative_to(config.teacher)), file.stat().st_size, file.stat().st_mtime_ns)
        for part in family.copied_parts
        if part.startswith(("tokenizer", "text_encoder"))
        for file in sorted((config.teacher / part).rglob("*"))
    ]
    parts = json.dumps([prompts, config.max_text_tokens, encoder])
    return hashlib.sha256(parts.encode()).hexdigest()


def _read_cache(path: Path, fingerprint: str) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        if file.metadata() != {"fingerprint": fingerprint}:
            return None
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
