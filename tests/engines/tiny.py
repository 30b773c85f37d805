"""Tiny random directories of every family, built in a second; they stand in where quality is not asked.

They have all the parts of a real checkpoint, and `student.json`, and are written by diffusers itself. The
PixArt one is made like the demo student: word-level tokenizer, T5 encoder, 16-channel f8 AutoencoderKL.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiffusionPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from engines.families.pixart import make_step_aware
from engines.families.step_aware import make_step_aware as make_time_embedding_step_aware

MAX_TEXT_TOKENS = 20
CLIP_TEXT_TOKENS = 16
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
    return _write(directory, pipeline, STUDENT if student else None)


def _write(directory: Path, pipeline: DiffusionPipeline, student: dict[str, Any] | None) -> Path:
    """Save a pipeline in fp16, and beside it what `student` says, if anything."""
    directory = Path(directory)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float16)
    pipeline.save_pretrained(directory, safe_serialization=True)
    if student is not None:
        (directory / "student.json").write_text(json.dumps(student, indent=2) + "\n", encoding="utf-8")
    return directory


def _make_pipeline(
    transformer_config: dict[str, Any], scheduler_config: dict[str, Any], *, student: bool
) -> PixArtAlphaPipeline:
    tokenizer = make_tokenizer()
    text_encoder = _make_t5(len(tokenizer))
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
    vae = _make_image_vae(transformer.config.in_channels)
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


def _make_t5(vocab_size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocab_size,
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


def _make_image_vae(latent_channels: int, **config: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        **{"scaling_factor": 0.5, **config},
    )
    with torch.no_grad():
        # random decoders paint grey; a larger last layer gives every pixel something to disagree about
        vae.decoder.conv_out.weight.mul_(4.0)
    return vae


def make_clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """CLIP's tokenizer with its byte alphabet and no merges: a token per letter."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad_token, model_max_length=CLIP_TEXT_TOKENS)


def make_tiny_sdxl(
    directory: Path,
    *,
    student: bool = True,
    seed: int = 0,
    vae_config: dict[str, Any] | None = None,
) -> Path:
    """Write a random-weight `StableDiffusionXLPipeline` directory for 64x64 images.

    Args:
        directory: where to write; created if need be.
        student: add `student.json` and the step embedding (with non-zero rows 1 and 2).
        seed: of the weights.
        vae_config: entries that replace the default ones of the autoencoder.
    Returns:
        `directory`.
    """
    # as in the published model, the tokenizers differ in their padding
    tokenizers = [make_clip_tokenizer(pad_token) for pad_token in ("<|endoftext|>", "!")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # the published second encoder counts on the largest id being the end
        first, second = _clip_config("quick_gelu", len(tokenizers[0]) - 1), _clip_config("gelu", 2)
        text_encoder, text_encoder_2 = CLIPTextModel(first), CLIPTextModelWithProjection(second)
        unet = _make_unet()
        vae = _make_image_vae(4, **{"force_upcast": True, **(vae_config or {})})
        if student:
            make_time_embedding_step_aware(unet)
            with torch.no_grad():
                unet.time_embedding.steps_embedding.weight[1:3].normal_(std=0.5)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="epsilon",
            timestep_spacing="trailing",
            clip_sample=False,
        ),
        add_watermarker=False,
    )
    return _write(directory, pipeline, SDXL_STUDENT if student else None)


def _clip_config(activation: str, eos_token_id: int) -> CLIPTextConfig:
    vocab_size = len(make_clip_tokenizer("!"))
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TEXT_TOKENS,
        projection_dim=24,
        hidden_act=activation,
        bos_token_id=vocab_size - 2,
        eos_token_id=eos_token_id,
    )


def _make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=64,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
    )


def make_tiny_cogvideox(
    directory: Path,
    *,
    student: bool = True,
    seed: int = 0,
    transformer_config: dict[str, Any] | None = None,
) -> Path:
    """Write a random-weight `CogVideoXPipeline` directory for videos of 9 frames, 32x32.

    Args:
        directory: where to write; created if need be.
        student: add `student.json` and the step embedding (with non-zero rows 1 and 2).
        seed: of the weights.
        transformer_config: entries that replace the default ones of the transformer.
    Returns:
        `directory`.
    """
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = _make_t5(len(tokenizer))
        transformer = CogVideoXTransformer3DModel(**{**COGVIDEOX_TRANSFORMER, **(transformer_config or {})})
        vae = _make_video_vae()
        if student:
            make_time_embedding_step_aware(transformer)
            with torch.no_grad():
                transformer.time_embedding.steps_embedding.weight[1:3].normal_(std=0.5)
    pipeline = CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        # the published one, but for the spacing of its timesteps
        scheduler=CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
            clip_sample=False,
        ),
    )
    return _write(directory, pipeline, COGVIDEOX_STUDENT if student else None)


def _make_video_vae() -> AutoencoderKLCogVideoX:
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
        sample_height=32,
        sample_width=32,
    )
    with torch.no_grad():
        vae.decoder.conv_out.conv.weight.mul_(4.0)
    return vae


COGVIDEOX_TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 16,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 9,
    "patch_size": 2,
    "max_text_seq_length": MAX_TEXT_TOKENS,
}

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
    "gate": {"passed": True, "criteria": [{"text": "it is tiny", "passed": True}]},
}

SDXL_STUDENT: dict[str, Any] = {
    **STUDENT,
    "name": "tiny-sdxl",
    "family": "sdxl",
    "max_text_tokens": CLIP_TEXT_TOKENS,
}

COGVIDEOX_STUDENT: dict[str, Any] = {
    **STUDENT,
    "name": "tiny-cogvideox",
    "family": "cogvideox",
    "kind": "video",
    "height": 32,
    "width": 32,
    "frames": 9,
    "fps": 8,
}
