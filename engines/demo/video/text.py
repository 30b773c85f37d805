"""The video demo's tokenizer and text encoder: a word-level vocabulary under a small T5."""

from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from engines.demo.text import build_tokenizer
from engines.demo.video.scenes import vocabulary

MAX_TOKENS = 8
D_MODEL = 64
# What people type for the words the model knows; words that tell it nothing go first.
_SYNONYMS = {
    "": "a|an|one|the|to|us|me|it|is|of|up and down|camera|viewer",
    "ball": "sphere|orb|globe",
    "cube": "box|block",
    "cone": "pyramid",
    "ring": "torus|donut|doughnut|hoop",
    "red": "crimson|scarlet",
    "yellow": "gold|golden",
    "purple": "violet|magenta",
    "white": "ivory|silver",
    "rising": "floating|ascending|lifting off|(?:moving|going|flying) up|rises|floats",
    "bouncing": "jumping|hopping|bounces|jumps|hops",
    "moving": "rolling|sliding|driving|going|running|drifting|coming|moves|rolls|slides|goes|comes",
    "closer": "towards|toward|nearer|near|forward|forwards",
    "away": "backward|backwards|off",
    "left": "leftward|leftwards",
    "right": "rightward|rightwards",
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of captions of clips."""
    return build_tokenizer(vocabulary(), _SYNONYMS, MAX_TOKENS)


def make_text_encoder() -> T5EncoderModel:
    """An untrained text encoder of 0.12 M parameters. It looks at padding, as that of CogVideoX does."""
    config = T5Config(
        vocab_size=32,
        d_model=D_MODEL,
        d_kv=16,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)
