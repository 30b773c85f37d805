"""Prompts to token ids, with the `tokenizers` library alone: transformers takes seconds to import."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from engines.errors import CheckpointError
from engines.families.checkpoint import read_json

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class TokenizerRules:
    """How a family's diffusers pipeline tokenizes.

    Attributes:
        folders: the checkpoint's tokenizers; the input of the text stage that each fills has the same ending.
        masked: the network does not look at padding, so its encoder and it get a mask.
        cleaned: prompts are stripped and in lower case.
    """

    folders: tuple[str, ...]
    masked: bool
    cleaned: bool


RULES = {
    "pixart": TokenizerRules(("tokenizer",), masked=True, cleaned=True),
    "sdxl": TokenizerRules(("tokenizer", "tokenizer_2"), masked=False, cleaned=False),
    "cogvideox": TokenizerRules(("tokenizer",), masked=False, cleaned=False),
}
"""By family name. They stand here, and not in the families, because a worker does without diffusers."""


def clean_prompt(prompt: str) -> str:
    """What `PixArtAlphaPipeline` does to every prompt, its optional caption cleaning aside."""
    return prompt.lower().strip()


class PromptTokenizers:
    """All tokenizers of a checkpoint: prompts to the inputs of its text stage.

    Args:
        family: as in `student.json`.
        checkpoint: a diffusers directory.
        max_tokens: length of every row; by default what the tokenizers say.
        limit: of that default.
        convert: read a folder without `tokenizer.json` through transformers.

    Raises:
        CheckpointError: as `PromptTokenizer`.
    """

    def __init__(
        self,
        family: str,
        checkpoint: Path,
        max_tokens: int | None = None,
        *,
        limit: int | None = None,
        convert: bool = False,
    ) -> None:
        self._rules = RULES[family]
        folders = [Path(checkpoint) / name for name in self._rules.folders]
        if max_tokens is None:
            lengths = [_model_max_length(folder) for folder in folders]
            max_tokens = min([*lengths, *([] if limit is None else [limit])])
        self.max_tokens = max_tokens
        self._tokenizers = [PromptTokenizer(folder, max_tokens, convert=convert) for folder in folders]

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize.

        Returns:
            `input_ids`, then `input_ids_2` or `mask` where the family has it; each (B, L) int64, `mask` 1 for
            real tokens.
        """
        if self._rules.cleaned:
            prompts = [clean_prompt(prompt) for prompt in prompts]
        inputs: dict[str, Tensor] = {}
        for folder, tokenizer in zip(self._rules.folders, self._tokenizers, strict=True):
            ids, mask = tokenizer(prompts)
            inputs[folder.replace("tokenizer", "input_ids")] = ids
            if self._rules.masked:
                inputs["mask"] = mask
        return inputs

    def unheard(self, prompt: str) -> list[str]:
        """What of a prompt the text encoders will not hear, in words for its author; empty for nothing."""
        if self._rules.cleaned:
            prompt = clean_prompt(prompt)
        return list(dict.fromkeys(one for tokenizer in self._tokenizers for one in tokenizer.unheard(prompt)))


class PromptTokenizer:
    """Pads and truncates every prompt to one length, as diffusers pipelines do.

    Args:
        directory: a checkpoint's `tokenizer/` folder.
        max_tokens: length of every row, end-of-sequence token included.
        convert: read a folder without `tokenizer.json` through transformers.

    Raises:
        CheckpointError: the folder lacks `tokenizer.json`, or names no padding token.
    """

    def __init__(self, directory: Path, max_tokens: int, *, convert: bool = False) -> None:
        path = directory / TOKENIZER_FILE
        if not path.is_file() and not convert:
            raise CheckpointError(f"{directory.name}/{TOKENIZER_FILE}: file is missing from {directory}")
        text = path.read_text(encoding="utf-8") if path.is_file() else fast_tokenizer(directory)
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001  (the library raises bare Exception)
            raise CheckpointError(f"{directory.name}/{TOKENIZER_FILE}: {error}") from None
        pad_token = _special_token(directory, "pad_token", "<pad>")
        pad_id = self._tokenizer.token_to_id(pad_token)
        if pad_id is None:
            raise CheckpointError(f"{directory.name}/{TOKENIZER_FILE}: no padding token {pad_token!r} in it")
        self._unknown_id = self._tokenizer.token_to_id(_special_token(directory, "unk_token", "<unk>"))
        self._tokenizer.enable_truncation(max_tokens)
        self._tokenizer.enable_padding(length=max_tokens, pad_id=pad_id, pad_token=pad_token)

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize.

        Returns:
            input_ids and mask, both (B, L) int64; mask is 1 for real tokens.
        """
        encodings = self._tokenizer.encode_batch(list(prompts))
        input_ids = torch.tensor([encoding.ids for encoding in encodings], dtype=torch.int64)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], dtype=torch.int64)
        return input_ids, mask

    def unheard(self, prompt: str) -> list[str]:
        """Words that are no token of their own, and what lies beyond the last token, each as one sentence."""
        encoding = self._tokenizer.encode(prompt)
        found = []
        unknown = [prompt[start:end] for start, end in self._places(encoding, self._unknown_id)]
        words = dict.fromkeys(word for word in unknown if any(letter.isalnum() for letter in word))
        if words:
            found.append("the model does not know: " + ", ".join(words))
        cut = [start for rest in encoding.overflowing for start, _ in self._places(rest)]
        if cut:
            num_heard = sum(1 for _ in self._places(encoding))
            found.append(
                f"the model reads {num_heard} tokens of this prompt and not the rest: {prompt[min(cut) :]}"
            )
        return found

    @staticmethod
    def _places(encoding: Encoding, wanted: int | None = None) -> Iterator[tuple[int, int]]:
        """Start and end in the text of each token, or of each that has the id `wanted`."""
        marks = zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
        for token, place, special in marks:
            if not special and (wanted is None or token == wanted):
                yield place


def _special_token(directory: Path, name: str, default: str) -> str:
    token = read_json(directory / "tokenizer_config.json").get(name) or default
    return str(token["content"] if isinstance(token, dict) else token)


def _model_max_length(directory: Path) -> int:
    length = read_json(directory / "tokenizer_config.json").get("model_max_length")
    if length is None:
        raise CheckpointError(f"{directory.name}/tokenizer_config.json: field model_max_length is missing")
    return int(length)


def fast_tokenizer(directory: Path) -> str:
    """Content of a `tokenizer.json` for a folder that has only a sentencepiece model or a word list.

    Raises:
        CheckpointError: there is no tokenizer in the folder that transformers can read.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return str(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise CheckpointError(f"{directory.name}: {str(error).splitlines()[0]}") from None


def write_fast_tokenizer(directory: Path) -> None:
    """Write `tokenizer.json` beside a tokenizer of another form, so that nobody needs transformers later.

    The published PixArt-alpha and CogVideoX have `spiece.model` only, SDXL `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: as `fast_tokenizer`.
    """
    text = json.dumps(json.loads(fast_tokenizer(directory)), ensure_ascii=False)
    (directory / TOKENIZER_FILE).write_text(text, encoding="utf-8")
