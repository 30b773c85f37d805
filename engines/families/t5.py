"""The T5 text encoder that PixArt and CogVideoX share."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from engines.families.checkpoint import read_part_config
from engines.families.weights import fill, load_weights


def load_t5(part: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a T5 encoder.

    Raises:
        CheckpointError: config or weights are missing, damaged, or do not fit each other.
    """
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    encoder: nn.Module = T5EncoderModel(T5Config(**read_part_config(part, "T5EncoderModel")))
    return fill(encoder, load_weights(part), part, dtype)
