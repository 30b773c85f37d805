"""The only data distillation needs: prompts, and what the teacher's text encoder makes of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engines.denoiser import Conditioning
from engines.distill.config import DistillConfig
from engines.errors import ConfigError
from engines.families.pixart import TextStage, load_text_encoder
from engines.families.tokenizer import clean_prompt

PIXART_TEXT_TOKENS = 120
"""Length that published PixArt-alpha was trained with, far below its tokenizer's limit."""


def load_prompts(source: Literal["demo"] | Path, num_prompts: int, seed: int) -> list[str]:
    """Read prompts, one per line, blank lines ignored; or draw demo captions.

    Raises:
        ConfigError: the file is missing or holds no prompt.
    """
    if source == "demo":
        from engines.demo.scenes import sample_captions

        return sample_captions(num_prompts, seed, split="train")
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompts: cannot read {source}: {error}") from None
    prompts = [line.strip() for line in lines if line.strip()][:num_prompts]
    if not prompts:
        raise ConfigError(f"prompts: {source} holds no prompt; one per line is expected")
    return prompts


class TextEncoder:
    """Tokenizer and text encoder of a pipeline directory.

    Args:
        directory: a diffusers `PixArtAlphaPipeline` directory.
        max_tokens: length that prompts are padded or cut to; by default the tokenizer's limit, at most 120.
        device: where the encoder runs and its results stay.
    """

    def __init__(
        self, directory: Path, *, max_tokens: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory / "tokenizer")
        self.encoder = TextStage(load_text_encoder(directory)).to(device)
        self.max_tokens = max_tokens or min(int(self.tokenizer.model_max_length), PIXART_TEXT_TOKENS)
        self.device = device

    @torch.no_grad()
    def __call__(self, prompts: list[str], batch_size: int = 256) -> Conditioning:
        """Encode prompts as `PixArtAlphaPipeline` does: lower case, padded to one length, padding masked.

        Returns:
            Conditioning of len(prompts) rows, fp32 text, int64 mask.
        """
        texts, masks = [], []
        for start in range(0, len(prompts), batch_size):
            tokens = self.tokenizer(
                [clean_prompt(prompt) for prompt in prompts[start : start + batch_size]],
                padding="max_length",
                max_length=self.max_tokens,
                truncation=True,
                return_tensors="pt",
            ).to(self.device)
            texts.append(self.encoder(tokens.input_ids, tokens.attention_mask))
            masks.append(tokens.attention_mask)
        return Conditioning(torch.cat(texts), torch.cat(masks))


@dataclass(frozen=True, slots=True)
class PromptBank:
    """Encoded prompts to draw training batches from.

    Attributes:
        prompts: (N, L, D) text fp16 and mask, on the CPU.
        uncond: the empty prompt, one row.
        max_tokens: L.
    """

    prompts: Conditioning
    uncond: Conditioning
    max_tokens: int

    def draw(self, batch: int, rng: torch.Generator) -> Conditioning:
        """Draw rows evenly, with replacement; text is fp32."""
        rows = torch.randint(len(self.prompts), (batch,), generator=rng)
        return Conditioning(self.prompts.text[rows].float(), self.prompts.mask[rows])


def load_prompt_bank(config: DistillConfig, device: torch.device | str = "cpu") -> PromptBank:
    """Encode a run's prompts, or read them from `out/prompts.safetensors` if they were encoded before.

    The cache holds as long as prompts, length and the teacher's text encoder (files, sizes, times) are the
    same. A text encoder can be thousands of times the size of its embeddings; it is freed before training
    starts.
    """
    prompts = load_prompts(config.prompts, config.num_prompts, config.seed)
    path = config.out / "prompts.safetensors"
    key = _fingerprint(prompts, config)
    tensors = _read_cache(path, key)
    if tensors is None:
        encode = TextEncoder(config.teacher, max_tokens=config.max_text_tokens, device=device)
        bank, uncond = encode(prompts), encode([""])
        tensors = {
            "text": bank.text.half(),
            "mask": bank.mask,
            "uncond_text": uncond.text,
            "uncond_mask": uncond.mask,
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        config.out.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(tensors, partial, {"fingerprint": key})
        partial.replace(path)
    return PromptBank(
        Conditioning(tensors["text"], tensors["mask"]),
        Conditioning(tensors["uncond_text"], tensors["uncond_mask"]),
        max_tokens=tensors["text"].shape[1],
    )


def _fingerprint(prompts: list[str], config: DistillConfig) -> str:
    encoder = [
        (str(file.relative_to(config.teacher)), file.stat().st_size, file.stat().st_mtime_ns)
        for part in ("tokenizer", "text_encoder")
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
