"""The demo's tokenizer and text encoder: a word-level vocabulary under a small T5."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from engines.demo.scenes import vocabulary

MAX_TOKENS = 20
D_MODEL = 128
_SPECIAL = (_PAD, _END, _UNKNOWN) = ("<pad>", "</s>", "<unk>")
# What people type for the words the model knows.
_SYNONYMS = {
    "sphere": "ball|orb|globe|spheres|balls",
    "cube": "box|block|cubes|boxes",
    "cone": "pyramid|cones",
    "cylinder": "can|tube|barrel|pillar|cylinders",
    "torus": "donut|doughnut|ring|tori",
    "red": "crimson|scarlet",
    "cyan": "turquoise|teal|aqua",
    "purple": "violet|magenta",
    "white": "ivory",
    "yellow": "gold|golden",
    "small": "little|tiny|mini",
    "large": "big|huge|giant",
    "a": "an|one",
    "middle": "center|centre",
    "grass": "meadow|lawn",
    "sand": "beach|desert",
    "stone": "rock|concrete",
    "day": "daylight|noon",
    "sunset": "dusk|sundown|evening",
    "night": "midnight",
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of captions of scenes."""
    return build_tokenizer(vocabulary(), _SYNONYMS, MAX_TOKENS)


def build_tokenizer(
    vocabulary: Sequence[str], synonyms: Mapping[str, str], max_tokens: int
) -> PreTrainedTokenizerFast:
    """Lower-case words without punctuation, synonyms folded; `</s>` ends a prompt as in T5.

    Args:
        vocabulary: words that are told apart.
        synonyms: what people type instead of a word, alternatives between bars; folded in this order.
        max_tokens: the longest prompt, `</s>` included.
    """
    words = [*_SPECIAL, *vocabulary]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[^a-z]+"), " "),
            normalizers.Strip(),
        ]
        + [normalizers.Replace(Regex(rf"\b(?:{others})\b"), word) for word, others in synonyms.items()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_PAD,
        eos_token=_END,
        unk_token=_UNKNOWN,
        model_max_length=max_tokens,
        padding_side="right",
    )


def make_text_encoder(vocab_size: int = 64) -> T5EncoderModel:
    """An untrained one, 0.65 M parameters."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=D_MODEL,
        d_kv=32,
        d_ff=384,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def tokenize(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, both (B, max_tokens) int64."""
    batch = tokenizer(
        captions, padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    return batch["input_ids"], batch["attention_mask"]


def save_text(directory: Path, tokenizer: PreTrainedTokenizerFast, encoder: T5EncoderModel) -> None:
    tokenizer.save_pretrained(directory / "tokenizer")
    encoder.save_pretrained(directory / "text_encoder")
