"""Prompts to token ids, with the `tokenizers` library alone: transformers takes seconds to import."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engines.errors import CheckpointError
from engines.families.checkpoint import read_json

TOKENIZER_FILE = "tokenizer.json"


def clean_prompt(prompt: str) -> str:
    """What `PixArtAlphaPipeline` does to every prompt, its optional caption cleaning aside."""
    return prompt.lower().strip()


class PromptTokenizer:
    """Pads and truncates every prompt to one length, as the diffusers pipeline does.

    Args:
        directory: a checkpoint's `tokenizer/` folder.
        max_tokens: length of every row, end-of-sequence token included.

    Raises:
        CheckpointError: the folder lacks `tokenizer.json`, or names no padding token.
    """

    def __init__(self, directory: Path, max_tokens: int) -> None:
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise CheckpointError(f"{directory.name}/{TOKENIZER_FILE}: file is missing from {directory}")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
            raise CheckpointError(f"{directory.name}/{TOKENIZER_FILE}: {error}") from None
        pad_token = _pad_token(directory)
        pad_id = self._tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise CheckpointError(f"{directory.name}/{TOKENIZER_FILE}: no padding token {pad_token!r} in it")
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(length=max_tokens, pad_id=pad_id, pad_token=pad_token)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize.

        Returns:
            input_ids and mask, both (B, L) int64; mask is 1 for real tokens.
        """
        encodings = self._tokenizer.encode_batch([clean_prompt(prompt) for prompt in prompts])
        input_ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.int64)
        return input_ids, mask


def _pad_token(directory: Path) -> str:
    config = read_json(directory / "tokenizer_config.json")
    token = config.get("pad_token", "<pad>")
    return str(token["content"] if isinstance(token, dict) else token)


def write_fast_tokenizer(directory: Path) -> None:
    """Write `tokenizer.json` beside a sentencepiece model, once, so that nobody needs transformers later.

    The published PixArt-alpha has `spiece.model` only.

    Raises:
        CheckpointError: there is no tokenizer in the folder that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        text = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{directory.name}: {str(error).splitlines()[0]}") from None
    (directory / TOKENIZER_FILE).write_text(
        json.dumps(json.loads(text), ensure_ascii=False), encoding="utf-8"
    )
