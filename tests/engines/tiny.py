"""A tiny random PixArt directory, built in a second; stands in for a checkpoint where quality is not asked.

It has every part of the demo student (word-level tokenizer, T5 encoder, transformer, 16-channel f8
AutoencoderKL, scheduler, `student.json`), written by diffusers itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from engines.families.pixart import make_step_aware

MAX_TEXT_TOKENS = 20
# fmt: off
WORDS = [
    "a", "an", "the", "and", "of", "on", "in", "to", "left", "right", "above", "below", "next", "behind",
    "front", "small", "large", "red", "green", "blue", "yellow", "purple", "orange", "cyan", "white", "black",
    "gray", "matte", "shiny", "sphere", "cube", "cone", "cylinder", "torus", "sky", "ground",
]
# fmt: on


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS`; an unknown word becomes `<unk>`, the end is `</s>`."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_TEXT_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_tiny_checkpoint(
    directory: Path,
    *,
    student: bool = True,
    seed: int = 0,
    transformer_config: dict[str, Any] | None = None,
    scheduler_config: dict[str, Any] | None = None,
) -> Path:
    """Write a random-weight `PixArtAlphaPipeline` directory for 64x64 images.

    Args:
        directory: where to write; created if need be.
        student: add `student.json` and the step embedding (with non-zero rows 1 and 2).
        seed: of the weights.
        transformer_config: entries that replace the default ones of the transformer.
        scheduler_config: entries that replace the default ones of the scheduler.
    Returns:
        `directory`.
    """
    directory = Path(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _make_pipeline(transformer_config or {}, scheduler_config or {}, student=student)
    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        torch.nn.Module.to(part, torch.float16)
    pipeline.save_pretrained(directory, safe_serialization=True)
    if student:
        (directory / "student.json").write_text(json.dumps(STUDENT, indent=2) + "\n", encoding="utf-8")
    return directory


def _make_pipeline(
    transformer_config: dict[str, Any], scheduler_config: dict[str, Any], *, student: bool
) -> PixArtAlphaPipeline:
    tokenizer = make_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    transformer = PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "num_layers": 2,
            "in_channels": 16,
            "out_channels": 16,
            "sample_size": 8,
            "patch_size": 2,
            "cross_attention_dim": 64,
            "caption_channels": 32,
            "use_additional_conditions": False,
            **transformer_config,
        }
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=transformer.config.in_channels,
        sample_size=64,
        scaling_factor=0.5,
    )
    with torch.no_grad():
        # random decoders paint grey; a larger last layer gives every pixel something to disagree about
        vae.decoder.conv_out.weight.mul_(4.0)
    if student:  # last, so that teacher and student of one seed share all other weights
        make_step_aware(transformer)
        with torch.no_grad():
            transformer.adaln_single.emb.steps_embedding.weight[1:3].normal_(std=0.5)
    scheduler = DDIMScheduler(
        **{
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            "clip_sample": False,
            **scheduler_config,
        }
    )
    return PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


STUDENT: dict[str, Any] = {
    "schema_version": 1,
    "name": "tiny",
    "family": "pixart",
    "kind": "image",
    "num_steps": [1, 2, 4],
    "default_num_steps": 4,
    "timesteps": {"1": [999], "2": [999, 499], "4": [999, 749, 499, 249]},
    "solver": "ddim",
    "guidance_scale": 1.0,
    "max_text_tokens": MAX_TEXT_TOKENS,
    "height": 64,
    "width": 64,
    "teacher": {"name": "tiny-teacher"},
    "training": {"iterations": 0},
    "gate": None,
}
