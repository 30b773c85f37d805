"""PixArt-alpha: the parts of a diffusers `PixArtAlphaPipeline` directory and a wrapper per stage.

The same code serves the published PixArt-alpha (120 T5-XXL tokens, epsilon-prediction, learned sigma,
micro-conditions) and the small students of this project; everything that differs is read from the
directory's own configs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from engines.bundle import StageSpec, TensorSpec
from engines.denoiser import is_step_aware, size_conditions
from engines.errors import CheckpointError
from engines.families.checkpoint import read_config, read_json
from engines.families.spec import FamilySpec
from engines.families.student import Student
from engines.families.weights import fill, load_weights

STEPS_EMBEDDING_KEY = "adaln_single.emb.steps_embedding.weight"

PART_CLASSES = {
    "text_encoder": "T5EncoderModel",
    "transformer": "PixArtTransformer2DModel",
    "vae": "AutoencoderKL",
}


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
    if not isinstance(adaln.emb, StepAwareEmbeddings):
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
    transformer: Any = PixArtTransformer2DModel.from_config(read_part_config(part))
    weights = load_weights(part)
    if STEPS_EMBEDDING_KEY in weights:
        make_step_aware(transformer, max_num_steps=weights[STEPS_EMBEDDING_KEY].shape[0] - 1)
    return fill(transformer, weights, part, dtype)


def load_vae(directory: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Load `directory/vae`; raises as `load_transformer`."""
    part = Path(directory) / "vae"
    vae: Any = AutoencoderKL.from_config(read_part_config(part))
    return fill(vae, load_weights(part), part, dtype)


def load_text_encoder(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load `directory/text_encoder`, a T5 encoder; raises as `load_transformer`."""
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5EncoderModel

    part = Path(directory) / "text_encoder"
    encoder: nn.Module = T5EncoderModel(T5Config(**read_part_config(part)))
    return fill(encoder, load_weights(part), part, dtype)


def read_part_config(part: Path) -> dict[str, Any]:
    """Read `part/config.json` and check that it describes the class this family uses there.

    Raises:
        CheckpointError: the part is missing, or is of another class.
    """
    config = read_config(part)
    expected = PART_CLASSES[part.name]
    names = [config.get("_class_name"), *config.get("architectures", ())]
    if expected not in names:
        found = next((name for name in names if name), None)
        raise CheckpointError(f"{part.name}/config.json: {expected} is expected, not {found}")
    return config


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
    """One denoiser call, without the noise schedule: the network's own prediction.

    The second half of a learned-sigma network's channels is dropped; micro-conditions, which depend on the
    latents' shape alone, are made inside.
    """

    def __init__(self, transformer: PixArtTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.step_aware = is_step_aware(transformer)
        self.dtype = next(transformer.parameters()).dtype

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
        latents = latents.to(self.dtype)
        conditions = size_conditions(self.transformer, latents)
        if self.step_aware:
            conditions["num_steps"] = num_steps
        prediction: Tensor = self.transformer(
            latents,
            encoder_hidden_states=text.to(self.dtype),
            timestep=timestep,
            encoder_attention_mask=mask,
            added_cond_kwargs=conditions,
            return_dict=False,
        )[0]
        return prediction[:, : latents.shape[1]].float()


class DecodeStage(nn.Module):
    """Latents to pixels, scaling and rounding included."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scaling_factor = float(vae.config.scaling_factor)
        # only what decoding needs: the encoder is half of the weights
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder.to(memory_format=torch.channels_last)
        self.dtype = next(vae.decoder.parameters()).dtype

    def forward(self, latents: Tensor) -> Tensor:
        """Decode.

        Args:
            latents: (B, C, h, w) float32 clean latents.

        Returns:
            (B, H, W, 3) uint8.
        """
        latents = (latents / self.scaling_factor).to(self.dtype, memory_format=torch.channels_last)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        pixels: Tensor = self.decoder(latents)
        pixels = (pixels.float() * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def stages(directory: Path, student: Student) -> list[StageSpec]:
    """Describe the stages of a checkpoint at the student's bucket, from its configs alone.

    Raises:
        CheckpointError: a config is missing or lacks a field, or the parts do not fit each other.
    """
    text_config = read_part_config(directory / "text_encoder")
    config = read_part_config(directory / "transformer")
    vae_config = read_part_config(directory / "vae")
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    try:
        text_dim, vocab_size = int(text_config["d_model"]), int(text_config["vocab_size"])
        channels = int(config["in_channels"])
        h, w = _latent_size(student, vae_config, config)
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
        num_timesteps = int(scheduler["num_train_timesteps"])
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None
    length, bucket = student.max_text_tokens, student.bucket
    mask = TensorSpec(name="mask", dtype="int64", shape=(length,), maximum=1)
    latents = TensorSpec(name="latents", dtype="float32", shape=(channels, h, w))
    text = TensorSpec(name="text", dtype="float32", shape=(length, text_dim))
    return [
        StageSpec(
            name="text",
            part="text_encoder",
            bucket=None,
            inputs=(
                TensorSpec(name="input_ids", dtype="int64", shape=(length,), maximum=vocab_size - 1),
                mask,
            ),
            output=text,
        ),
        StageSpec(
            name="denoise",
            part="transformer",
            bucket=bucket,
            inputs=(
                latents,
                TensorSpec(name="timestep", dtype="int64", shape=(), maximum=num_timesteps - 1),
                text,
                mask,
                TensorSpec(name="num_steps", dtype="int64", shape=(), maximum=max(student.num_steps)),
            ),
            output=latents.model_copy(update={"name": "prediction"}),
        ),
        StageSpec(
            name="decode",
            part="vae",
            bucket=bucket,
            inputs=(latents,),
            output=TensorSpec(name="pixels", dtype="uint8", shape=(bucket.height, bucket.width, 3)),
        ),
    ]


def _latent_size(
    student: Student, vae_config: dict[str, Any], transformer_config: dict[str, Any]
) -> tuple[int, int]:
    """Latent cells of the student's picture; a picture must be whole patches of whole cells."""
    factor = 2 ** (len(vae_config["block_out_channels"]) - 1)
    unit = factor * int(transformer_config["patch_size"])
    for field in ("height", "width"):
        if getattr(student, field) % unit:
            raise CheckpointError(
                f"student.json: field {field}: {getattr(student, field)} is not a multiple of {unit}"
            )
    return student.height // factor, student.width // factor


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


FAMILY = FamilySpec(name="pixart", stages=stages, load_stage=load_stage)
