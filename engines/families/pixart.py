"""PixArt-alpha: the parts of a diffusers `PixArtAlphaPipeline` directory and a wrapper per stage.

The same code serves the published PixArt-alpha (120 T5-XXL tokens, epsilon-prediction, learned sigma,
micro-conditions) and the small students of this project; everything that differs is read from the
directory's own configs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from engines.bundle.bucket import Bucket
from engines.bundle.stages import StageSpec, TensorSpec
from engines.denoiser import Conditioning
from engines.errors import CheckpointError
from engines.families.checkpoint import read_json, read_part_config
from engines.families.image_vae import DecodeStage, load_decoder, load_vae, pixels_per_cell
from engines.families.prompts import PromptEncoder
from engines.families.spec import FamilySpec, check_multiples
from engines.families.student import Student
from engines.families.t5 import load_t5
from engines.families.tokenizer import PromptTokenizers
from engines.families.weights import fill, load_weights

__all__ = [
    "FAMILY",
    "STEPS_EMBEDDING_KEY",
    "DecodeStage",
    "StepAwareEmbeddings",
    "TextStage",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "make_step_aware",
    "predict",
    "size_conditions",
]

STEPS_EMBEDDING_KEY = "adaln_single.emb.steps_embedding.weight"

MAX_TEXT_TOKENS = 120
"""What published PixArt-alpha was trained with, far below its tokenizer's limit."""


class StepAwareEmbeddings(PixArtAlphaCombinedTimestepSizeEmbeddings):
    """Timestep (and size) embedding that also knows how many steps the student takes in all.

    Row K of `steps_embedding` is added to the embedding of a K-step student. It starts at zero; a row that
    stays zero leaves the network exactly what plain diffusers makes of it, which ignores the extra tensor.
    """

    def __init__(self, base: PixArtAlphaCombinedTimestepSizeEmbeddings, max_num_steps: int) -> None:
        weight = base.timestep_embedder.linear_2.weight
        super().__init__(
            weight.shape[0], base.outdim, use_additional_conditions=base.use_additional_conditions
        )
        for name, child in base.named_children():
            setattr(self, name, child)
        self.steps_embedding = nn.Embedding(
            max_num_steps + 1, weight.shape[0], device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.steps_embedding.weight)

    def forward(
        self,
        timestep: Tensor,
        resolution: Tensor | None = None,
        aspect_ratio: Tensor | None = None,
        batch_size: int | None = None,
        hidden_dtype: torch.dtype = torch.float32,
        num_steps: Tensor | None = None,
    ) -> Tensor:
        """Embed the timestep.

        Args:
            timestep: (B,) int64.
            resolution: (B, 2) pixels, or None where the network has no micro-conditions.
            aspect_ratio: (B, 1) height / width, or None likewise.
            batch_size: B.
            hidden_dtype: dtype of the result.
            num_steps: (B,) int64, steps the student takes in all; None adds nothing.

        Returns:
            (B, D) embedding.
        """
        embedding: Tensor = super().forward(timestep, resolution, aspect_ratio, batch_size, hidden_dtype)
        if num_steps is None:
            return embedding
        steps: Tensor = self.steps_embedding(num_steps)
        return embedding + steps.to(embedding.dtype)


def make_step_aware(transformer: PixArtTransformer2DModel, max_num_steps: int = 4) -> None:
    """Replace the timestep embedding by a `StepAwareEmbeddings`, in place; weights and their keys stay."""
    adaln = transformer.adaln_single
    if not hasattr(adaln.emb, "steps_embedding"):
        adaln.emb = StepAwareEmbeddings(adaln.emb, max_num_steps)


def load_transformer(directory: Path, dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    """Load `directory/transformer`, step-aware if its weights say so.

    Args:
        directory: a `PixArtAlphaPipeline` directory.
        dtype: dtype of the parameters in memory, whatever it is on disk.

    Returns:
        The transformer in eval mode.

    Raises:
        CheckpointError: config or weights are missing, damaged, or do not fit each other.
    """
    part = Path(directory) / "transformer"
    config = read_part_config(part, "PixArtTransformer2DModel")
    transformer: Any = PixArtTransformer2DModel.from_config(config)
    weights = load_weights(part)
    if STEPS_EMBEDDING_KEY in weights:
        make_step_aware(transformer, max_num_steps=weights[STEPS_EMBEDDING_KEY].shape[0] - 1)
    return fill(transformer, weights, part, dtype)


def load_text_encoder(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load `directory/text_encoder`, a T5 encoder; raises as `load_transformer`."""
    return load_t5(Path(directory) / "text_encoder", dtype)


def predict(network: nn.Module, latents: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
    """Call the transformer.

    Args:
        network: a `PixArtTransformer2DModel`, step-aware or not.
        latents: (B, C, h, w).
        times: (B,) timesteps.
        cond: B rows; `num_steps` reaches the network only if it is step-aware.

    Returns:
        (B, C, h, w) noise or velocity in the network's dtype, without a learned variance.
    """
    transformer: Any = network
    dtype = next(network.parameters()).dtype
    added = size_conditions(network, latents)
    if hasattr(transformer.adaln_single.emb, "steps_embedding"):
        added["num_steps"] = cond.num_steps
    sample: Tensor = transformer(
        latents.to(dtype),
        encoder_hidden_states=cond.text.to(dtype),
        timestep=times,
        encoder_attention_mask=cond.mask,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    # published PixArt-alpha also predicts a variance, in a second half of its channels; DDIM needs none
    return sample[:, : latents.shape[1]]


def size_conditions(network: nn.Module, latents: Tensor) -> dict[str, Tensor | None]:
    """PixArt's micro-conditions, the picture's size and shape, for the 1024-pixel models trained with them.

    Args:
        network: the transformer.
        latents: (B, C, h, w), of 8 pixels per cell.

    Returns:
        `resolution` (B, 2) and `aspect_ratio` (B, 1) in `latents`' dtype, or None for models without them.
    """
    config: Any = network.config
    enabled = config.use_additional_conditions
    if enabled is None:  # diffusers' own default
        enabled = config.sample_size == 128
    if not enabled:
        return {"resolution": None, "aspect_ratio": None}
    batch, _, h, w = latents.shape
    # not `new_tensor`: an exported program would hold it as a constant that the compiler renames
    sides = [latents.new_full((batch,), side * 8) for side in (h, w)]
    return {"resolution": torch.stack(sides, dim=1), "aspect_ratio": latents.new_full((batch, 1), h / w)}


class TextStage(nn.Module):
    """Token ids to caption embeddings."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Encode.

        Args:
            input_ids: (B, L) int64.
            mask: (B, L) int64, 1 for real tokens.

        Returns:
            (B, L, D) float32.
        """
        hidden: Tensor = self.text_encoder(input_ids=input_ids, attention_mask=mask, return_dict=False)[0]
        return hidden.float()


class DenoiseStage(nn.Module):
    """One denoiser call, without the noise schedule: the network's own prediction."""

    def __init__(self, transformer: PixArtTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, mask: Tensor, num_steps: Tensor
    ) -> Tensor:
        """Predict.

        Args:
            latents: (B, C, h, w) float32.
            timestep: (B,) int64.
            text: (B, L, D) float32.
            mask: (B, L) int64.
            num_steps: (B,) int64, steps that each row takes in all.

        Returns:
            (B, C, h, w) float32: noise or velocity, as the checkpoint's scheduler config says.
        """
        return predict(self.transformer, latents, timestep, Conditioning(text, mask, num_steps)).float()


class _Dimensions(NamedTuple):
    """What the stages' shapes and ranges follow from."""

    text_dim: int
    vocab_size: int
    num_timesteps: int


def _dimensions(directory: Path) -> _Dimensions:
    """Of parts that fit each other; raises as `stages`."""
    text_config = read_part_config(directory / "text_encoder", "T5EncoderModel")
    config = read_part_config(directory / "transformer", "PixArtTransformer2DModel")
    vae_config = read_part_config(directory / "vae", "AutoencoderKL")
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    try:
        text_dim, vocab_size = int(text_config["d_model"]), int(text_config["vocab_size"])
        channels = int(config["in_channels"])
        if config["caption_channels"] != text_dim:
            raise CheckpointError(
                f"transformer/config.json: caption_channels is {config['caption_channels']}, "
                f"the text encoder's d_model is {text_dim}"
            )
        if vae_config["latent_channels"] != channels:
            raise CheckpointError(
                f"vae/config.json: latent_channels is {vae_config['latent_channels']}, "
                f"the transformer's in_channels is {channels}"
            )
        return _Dimensions(text_dim, vocab_size, int(scheduler["num_train_timesteps"]))
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None


def stages(directory: Path, student: Student) -> list[StageSpec]:
    """Describe the stages of a checkpoint at the student's bucket, from its configs alone.

    Raises:
        CheckpointError: a config is missing or lacks a field, or the parts do not fit each other.
    """
    text_dim, vocab_size, num_timesteps = _dimensions(directory)
    length, bucket = student.max_text_tokens, student.bucket
    shape = latent_shape(directory, bucket)
    mask = TensorSpec(name="mask", dtype="int64", shape=(length,), maximum=1)
    latents = TensorSpec(name="latents", dtype="float32", shape=shape)
    text = TensorSpec(name="text", dtype="float32", shape=(length, text_dim))
    return [
        StageSpec(
            name="text",
            parts=("text_encoder",),
            bucket=None,
            inputs=(
                TensorSpec(name="input_ids", dtype="int64", shape=(length,), maximum=vocab_size - 1),
                mask,
            ),
            outputs=(text,),
        ),
        StageSpec(
            name="denoise",
            parts=("transformer",),
            bucket=bucket,
            inputs=(
                latents,
                TensorSpec(name="timestep", dtype="int64", shape=(), maximum=num_timesteps - 1),
                text,
                mask,
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
    """The picture size that the transformer was trained at; raises as `latent_shape`."""
    config = read_part_config(directory / "transformer", "PixArtTransformer2DModel")
    vae_config = read_part_config(directory / "vae", "AutoencoderKL")
    try:
        pixels = int(config["sample_size"]) * pixels_per_cell(vae_config)
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None
    return Bucket(pixels, pixels)


def latent_shape(directory: Path, bucket: Bucket) -> tuple[int, int, int]:
    """Shape of one row of latents, (C, h, w); a picture must be whole patches of whole cells.

    Raises:
        CheckpointError: it is not, or a config is missing or lacks a field.
    """
    config = read_part_config(directory / "transformer", "PixArtTransformer2DModel")
    vae_config = read_part_config(directory / "vae", "AutoencoderKL")
    try:
        channels, cell = int(config["in_channels"]), pixels_per_cell(vae_config)
        check_multiples(bucket, cell * int(config["patch_size"]))
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None
    return channels, bucket.height // cell, bucket.width // cell


def native_max_tokens(directory: Path) -> int:
    """The tokenizer's limit, at most 120, which is what PixArt-alpha was trained with."""
    return PromptTokenizers("pixart", directory, limit=MAX_TEXT_TOKENS, convert=True).max_tokens


def load_encoder(
    directory: Path, *, max_tokens: int | None = None, device: torch.device | str = "cpu"
) -> PromptEncoder:
    """Load tokenizer and text encoder; `max_tokens` is the tokenizer's limit by default, at most 120."""
    tokenizers = PromptTokenizers("pixart", directory, max_tokens, limit=MAX_TEXT_TOKENS, convert=True)
    return PromptEncoder(tokenizers, TextStage(load_text_encoder(directory)), device=device)


def load_stage(directory: Path, spec: StageSpec, dtype: torch.dtype) -> nn.Module:
    """Load the wrapper of one stage with its weights. Inputs and output are as `spec` in any `dtype`.

    Raises:
        CheckpointError: as `load_transformer`.
    """
    stage: nn.Module
    if spec.name == "text":
        stage = TextStage(load_text_encoder(directory, dtype))
    elif spec.name == "denoise":
        stage = DenoiseStage(load_transformer(directory, dtype))
    else:
        stage = DecodeStage(load_vae(directory, dtype))
    return stage.eval()


FAMILY = FamilySpec(
    name="pixart",
    kind="image",
    network_part="transformer",
    steps_key=STEPS_EMBEDDING_KEY,
    copied_parts=("tokenizer", "text_encoder", "vae", "scheduler"),
    stages=stages,
    load_stage=load_stage,
    load_network=load_transformer,
    make_step_aware=make_step_aware,
    predict=predict,
    native_bucket=native_bucket,
    latent_shape=latent_shape,
    native_max_tokens=native_max_tokens,
    load_encoder=load_encoder,
    load_decoder=load_decoder,
)
