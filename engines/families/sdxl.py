"""Stable Diffusion XL: parts of a diffusers `StableDiffusionXLPipeline` directory and a wrapper per stage.

Two CLIP encoders, a UNet that is also told one vector for the whole caption and the picture's size, and an
image autoencoder that overflows in float16 and is therefore never run in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from engines.bundle.bucket import Bucket
from engines.bundle.stages import StageSpec, TensorSpec
from engines.denoiser import Conditioning
from engines.errors import CheckpointError
from engines.families.checkpoint import read_json, read_part_config
from engines.families.image_vae import DecodeStage, load_decoder, load_vae, pixels_per_cell
from engines.families.prompts import PromptEncoder
from engines.families.spec import FamilySpec, check_multiples
from engines.families.step_aware import STEPS_EMBEDDING_KEY, has_steps_embedding, make_step_aware
from engines.families.student import Student
from engines.families.tokenizer import PromptTokenizers
from engines.families.weights import fill, load_weights

PIXELS_PER_CELL = 8
"""Of all SDXL autoencoders; the UNet is told sizes in pixels and sees cells."""

NUM_TIME_IDS = 6

ENCODERS = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}


def load_unet(directory: Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Load `directory/unet`, step-aware if its weights say so.

    Args:
        directory: a `StableDiffusionXLPipeline` directory.
        dtype: dtype of the parameters in memory, whatever it is on disk.

    Returns:
        The UNet in eval mode.

    Raises:
        CheckpointError: config or weights are missing, damaged, or do not fit each other.
    """
    part = Path(directory) / "unet"
    unet: Any = UNet2DConditionModel.from_config(_unet_config(part))
    weights = load_weights(part)
    if STEPS_EMBEDDING_KEY in weights:
        make_step_aware(unet, max_num_steps=weights[STEPS_EMBEDDING_KEY].shape[0] - 1)
    return fill(unet, weights, part, dtype)


def _unet_config(part: Path) -> dict[str, Any]:
    config = read_part_config(part, "UNet2DConditionModel")
    for field, expected in (("addition_embed_type", "text_time"), ("time_cond_proj_dim", None)):
        if config.get(field) != expected:
            raise CheckpointError(
                f"unet/config.json: {field}: {expected} is expected, not {config.get(field)}"
            )
    return config


def load_text_encoder(part: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load `text_encoder` or `text_encoder_2`; raises as `load_unet`."""
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    expected = ENCODERS[part.name]
    config = CLIPTextConfig(**read_part_config(part, expected))
    classes = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    encoder: nn.Module = classes[expected](config)
    # older versions of transformers stored a table of positions, and a prefix that the first lacks now
    weights = {name: tensor for name, tensor in load_weights(part).items() if "position_ids" not in name}
    prefix = "text_model."
    if not any(name.startswith(prefix) for name in encoder.state_dict()):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return fill(encoder, weights, part, dtype)


def predict(network: nn.Module, latents: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
    """Call the UNet.

    Args:
        network: a `UNet2DConditionModel`, step-aware or not.
        latents: (B, C, h, w).
        times: (B,) timesteps.
        cond: B rows with `pooled`; `num_steps` reaches the network only if it is step-aware. The mask is not
            used: SDXL looks at padding too.

    Returns:
        (B, C, h, w) noise or velocity in the network's dtype.

    Raises:
        ValueError: `cond` has no `pooled`.
    """
    if cond.pooled is None:
        raise ValueError("SDXL needs the pooled embedding of the caption")
    dtype = next(network.parameters()).dtype
    prediction: Tensor = network(
        latents.to(dtype),
        times,
        encoder_hidden_states=cond.text.to(dtype),
        timestep_cond=cond.num_steps if has_steps_embedding(network) else None,
        added_cond_kwargs={"text_embeds": cond.pooled.to(dtype), "time_ids": time_ids(latents)},
        return_dict=False,
    )[0]
    return prediction


def time_ids(latents: Tensor) -> Tensor:
    """SDXL's micro-conditions: original size, crop and target size of a picture that was never cropped.

    Args:
        latents: (B, C, h, w).

    Returns:
        (B, 6) fp32: height, width, 0, 0, height, width in pixels.
    """
    batch, _, h, w = latents.shape
    height, width = float(h * PIXELS_PER_CELL), float(w * PIXELS_PER_CELL)
    # not `new_tensor`: an exported program would hold it as a constant that the compiler renames
    columns = (height, width, 0.0, 0.0, height, width)
    return torch.stack([latents.new_full((batch,), value, dtype=torch.float32) for value in columns], dim=1)


class TextStage(nn.Module):
    """Token ids to caption embeddings: both encoders, one layer before their last."""

    def __init__(self, text_encoder: nn.Module, text_encoder_2: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2

    def forward(self, input_ids: Tensor, input_ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            input_ids: (B, L) int64, of the first tokenizer.
            input_ids_2: (B, L) int64, of the second.

        Returns:
            (B, L, D1 + D2) float32, and the second encoder's pooled (B, P) float32.
        """
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return text.float(), second.text_embeds.float()


class DenoiseStage(nn.Module):
    """One denoiser call, without the noise schedule: the network's own prediction."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor, num_steps: Tensor
    ) -> Tensor:
        """Predict.

        Args:
            latents: (B, C, h, w) float32.
            timestep: (B,) int64.
            text: (B, L, D) float32.
            pooled: (B, P) float32.
            num_steps: (B,) int64, steps that each row takes in all.

        Returns:
            (B, C, h, w) float32: noise or velocity, as the checkpoint's scheduler config says.
        """
        cond = Conditioning(text, text, num_steps, pooled)  # nothing reads the mask
        return predict(self.unet, latents, timestep, cond).float()


class _Dimensions(NamedTuple):
    """What the stages' shapes and ranges follow from."""

    text_dim: int
    pooled_dim: int
    vocab_sizes: list[int]
    num_timesteps: int


def _dimensions(directory: Path, length: int) -> _Dimensions:
    """Of parts that fit each other and take `length` tokens; raises as `stages`."""
    encoders = [read_part_config(directory / part, name) for part, name in ENCODERS.items()]
    config = _unet_config(directory / "unet")
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    try:
        text_dim = sum(int(encoder["hidden_size"]) for encoder in encoders)
        pooled_dim = int(encoders[1]["projection_dim"])
        vocab_sizes = [int(encoder["vocab_size"]) for encoder in encoders]
        num_timesteps = int(scheduler["num_train_timesteps"])
        longest = min(int(encoder["max_position_embeddings"]) for encoder in encoders)
        if length > longest:
            raise CheckpointError(
                f"student.json: field max_text_tokens: {length}, the text encoders take {longest}"
            )
        if config["cross_attention_dim"] != text_dim:
            raise CheckpointError(
                f"unet/config.json: cross_attention_dim is {config['cross_attention_dim']}, "
                f"the text encoders' hidden_size is {text_dim} together"
            )
        expected_dim = NUM_TIME_IDS * int(config["addition_time_embed_dim"]) + pooled_dim
        if config["projection_class_embeddings_input_dim"] != expected_dim:
            raise CheckpointError(
                "unet/config.json: projection_class_embeddings_input_dim is "
                f"{config['projection_class_embeddings_input_dim']}, sizes and caption have {expected_dim}"
            )
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None
    return _Dimensions(text_dim, pooled_dim, vocab_sizes, num_timesteps)


def stages(directory: Path, student: Student) -> list[StageSpec]:
    """Describe the stages of a checkpoint at the student's bucket, from its configs alone.

    Raises:
        CheckpointError: a config is missing or lacks a field, or the parts do not fit each other.
    """
    length, bucket = student.max_text_tokens, student.bucket
    text_dim, pooled_dim, vocab_sizes, num_timesteps = _dimensions(directory, length)
    latents = TensorSpec(name="latents", dtype="float32", shape=latent_shape(directory, bucket))
    text = TensorSpec(name="text", dtype="float32", shape=(length, text_dim))
    pooled = TensorSpec(name="pooled", dtype="float32", shape=(pooled_dim,))
    return [
        StageSpec(
            name="text",
            parts=tuple(ENCODERS),
            bucket=None,
            inputs=tuple(
                TensorSpec(name=name, dtype="int64", shape=(length,), maximum=vocab_size - 1)
                for name, vocab_size in zip(("input_ids", "input_ids_2"), vocab_sizes, strict=True)
            ),
            outputs=(text, pooled),
        ),
        StageSpec(
            name="denoise",
            parts=("unet",),
            bucket=bucket,
            inputs=(
                latents,
                TensorSpec(name="timestep", dtype="int64", shape=(), maximum=num_timesteps - 1),
                text,
                pooled,
                TensorSpec(name="num_steps", dtype="int64", shape=(), maximum=max(student.num_steps)),
            ),
            outputs=(latents.model_copy(update={"name": "prediction"}),),
        ),
        StageSpec(
            name="decode",
            parts=("vae",),
            bucket=bucket,
            inputs=(latents,),
            outputs=(TensorSpec(name="pixels", dtype="uint8", shape=(bucket.height, bucket.width, 3)),),
        ),
    ]


def native_bucket(directory: Path) -> Bucket:
    """The picture size that the UNet was trained at; raises as `latent_shape`."""
    config = _unet_config(directory / "unet")
    if "sample_size" not in config:
        raise CheckpointError(f"{directory}: a config lacks the field sample_size")
    pixels = int(config["sample_size"]) * PIXELS_PER_CELL
    return Bucket(pixels, pixels)


def latent_shape(directory: Path, bucket: Bucket) -> tuple[int, int, int]:
    """Shape of one row of latents, (C, h, w); a picture must be whole cells.

    Raises:
        CheckpointError: it is not, a config is missing or lacks a field, or the parts do not fit each other.
    """
    config = _unet_config(directory / "unet")
    vae_config = read_part_config(directory / "vae", "AutoencoderKL")
    try:
        channels, vae_channels = int(config["in_channels"]), int(vae_config["latent_channels"])
        cell = pixels_per_cell(vae_config)
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None
    if channels != vae_channels:
        raise CheckpointError(
            f"vae/config.json: latent_channels is {vae_channels}, the UNet's in_channels is {channels}"
        )
    if cell != PIXELS_PER_CELL:
        raise CheckpointError(f"vae/config.json: cells of {PIXELS_PER_CELL} pixels are expected, not {cell}")
    check_multiples(bucket, cell)
    return channels, bucket.height // cell, bucket.width // cell


def native_max_tokens(directory: Path) -> int:
    """The tokenizers' limit, 77 in the published models."""
    return PromptTokenizers("sdxl", directory, convert=True).max_tokens


def load_encoder(
    directory: Path, *, max_tokens: int | None = None, device: torch.device | str = "cpu"
) -> PromptEncoder:
    """Load both tokenizers and encoders; `max_tokens` is the tokenizers' limit by default, 77.

    What the UNet is told without a prompt is zeros, where the pipeline was trained so.
    """
    index = read_json(Path(directory) / "model_index.json")
    tokenizers = PromptTokenizers("sdxl", directory, max_tokens, convert=True)
    return PromptEncoder(
        tokenizers,
        _text_stage(directory, torch.float32),
        device=device,
        zero_uncond=bool(index.get("force_zeros_for_empty_prompt", True)),
    )


def _text_stage(directory: Path, dtype: torch.dtype) -> TextStage:
    return TextStage(*(load_text_encoder(Path(directory) / part, dtype) for part in ENCODERS))


def load_stage(directory: Path, spec: StageSpec, dtype: torch.dtype) -> nn.Module:
    """Load the wrapper of one stage with its weights. Inputs and outputs are as `spec` in any `dtype`.

    Raises:
        CheckpointError: as `load_unet`.
    """
    stage: nn.Module
    if spec.name == "text":
        stage = _text_stage(directory, dtype)
    elif spec.name == "denoise":
        stage = DenoiseStage(load_unet(directory, dtype))
    else:
        # published SDXL decoders overflow in float16 (`force_upcast` in their config)
        stage = DecodeStage(load_vae(directory, torch.float32 if dtype == torch.float16 else dtype))
    return stage.eval()


FAMILY = FamilySpec(
    name="sdxl",
    kind="image",
    network_part="unet",
    steps_key=STEPS_EMBEDDING_KEY,
    copied_parts=("tokenizer", "tokenizer_2", *ENCODERS, "vae", "scheduler"),
    stages=stages,
    load_stage=load_stage,
    load_network=load_unet,
    make_step_aware=make_step_aware,
    predict=predict,
    native_bucket=native_bucket,
    latent_shape=latent_shape,
    native_max_tokens=native_max_tokens,
    load_encoder=load_encoder,
    load_decoder=load_decoder,
)
