"""CogVideoX: the parts of a diffusers `CogVideoXPipeline` directory and a wrapper per stage.

Latents are (B, F, C, h, w): one latent frame for the video's first frame and one for every four after it. The
2B model marks positions with a fixed table, the 5B model with rotary embeddings. CogVideoX 1.5, which puts
two latent frames into a patch, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from engines.bundle.bucket import Bucket
from engines.bundle.stages import StageSpec, TensorSpec
from engines.denoiser import Conditioning
from engines.errors import CheckpointError
from engines.families.checkpoint import read_json, read_part_config
from engines.families.image_vae import pixels_per_cell, to_uint8
from engines.families.prompts import PromptEncoder
from engines.families.spatial_norm import use_spatial_norms
from engines.families.spec import FamilySpec, check_multiples
from engines.families.step_aware import STEPS_EMBEDDING_KEY, has_steps_embedding, make_step_aware
from engines.families.student import Student
from engines.families.t5 import load_t5
from engines.families.tokenizer import PromptTokenizers
from engines.families.weights import fill, load_weights

CHUNK = 2
"""Latent frames that are decoded together; an odd one joins the first chunk. Norms see a chunk at a time, so
this is part of the model: diffusers decodes in the same chunks."""


def load_transformer(directory: Path, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    """Load `directory/transformer`, step-aware if its weights say so.

    Args:
        directory: a `CogVideoXPipeline` directory.
        dtype: dtype of the parameters in memory, whatever it is on disk.

    Returns:
        The transformer in eval mode.

    Raises:
        CheckpointError: config or weights are missing, damaged, or do not fit each other.
    """
    part = Path(directory) / "transformer"
    transformer: Any = CogVideoXTransformer3DModel.from_config(_transformer_config(part))
    weights = load_weights(part)
    if STEPS_EMBEDDING_KEY in weights:
        make_step_aware(transformer, max_num_steps=weights[STEPS_EMBEDDING_KEY].shape[0] - 1)
    return fill(transformer, weights, part, dtype)


def _transformer_config(part: Path) -> dict[str, Any]:
    config = read_part_config(part, "CogVideoXTransformer3DModel")
    for field in ("patch_size_t", "ofs_embed_dim"):
        if config.get(field) is not None:
            raise CheckpointError(f"transformer/config.json: {field}: CogVideoX 1.5 is not supported")
    return config


def load_vae(directory: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKLCogVideoX:
    """Load `directory/vae`; raises as `load_transformer`."""
    part = Path(directory) / "vae"
    vae: Any = AutoencoderKLCogVideoX.from_config(read_part_config(part, "AutoencoderKLCogVideoX"))
    return fill(vae, load_weights(part), part, dtype)


def predict(network: nn.Module, latents: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
    """Call the transformer.

    Args:
        network: a `CogVideoXTransformer3DModel`, step-aware or not.
        latents: (B, F, C, h, w).
        times: (B,) timesteps.
        cond: B rows; `num_steps` reaches the network only if it is step-aware. The mask is not used:
            CogVideoX looks at padding too.

    Returns:
        (B, F, C, h, w) velocity in the network's dtype.
    """
    dtype = next(network.parameters()).dtype
    prediction: Tensor = network(
        hidden_states=latents.to(dtype),
        encoder_hidden_states=cond.text.to(dtype),
        timestep=times,
        timestep_cond=cond.num_steps if has_steps_embedding(network) else None,
        image_rotary_emb=rotary_embeddings(network, latents),
        return_dict=False,
    )[0]
    return prediction


def rotary_embeddings(network: nn.Module, latents: Tensor) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines that mark positions, for networks trained with them.

    Args:
        network: the transformer.
        latents: (B, F, C, h, w).

    Returns:
        Two (patches, head size) fp32, or None where a table inside the network marks positions.
    """
    config: Any = network.config
    if not config.use_rotary_positional_embeddings:
        return None
    _, frames, _, h, w = latents.shape
    grid = (h // config.patch_size, w // config.patch_size)
    trained = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
    cosines, sines = get_3d_rotary_pos_embed(
        embed_dim=config.attention_head_dim,
        crops_coords=get_resize_crop_region_for_grid(grid, trained[1], trained[0]),
        grid_size=grid,
        temporal_size=frames,
        device=latents.device,
    )
    return cosines, sines


class TextStage(nn.Module):
    """Token ids to caption embeddings; padding counts."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        """Encode (B, L) int64 to (B, L, D) float32."""
        hidden: Tensor = self.text_encoder(input_ids=input_ids, return_dict=False)[0]
        return hidden.float()


class DenoiseStage(nn.Module):
    """One denoiser call, without the noise schedule: the network's own prediction."""

    def __init__(self, transformer: CogVideoXTransformer3DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, latents: Tensor, timestep: Tensor, text: Tensor, num_steps: Tensor) -> Tensor:
        """Predict.

        Args:
            latents: (B, F, C, h, w) float32.
            timestep: (B,) int64.
            text: (B, L, D) float32.
            num_steps: (B,) int64, steps that each row takes in all.

        Returns:
            (B, F, C, h, w) float32: velocity, or what else the checkpoint's scheduler config says.
        """
        cond = Conditioning(text, text, num_steps)  # nothing reads the mask
        return predict(self.transformer, latents, timestep, cond).float()


class DecodeStage(nn.Module):
    """Latents to pixels, a chunk of frames after the other, scaling and rounding included.

    Convolutions look back in time; what they need of the chunk before is handed on.
    """

    def __init__(self, vae: AutoencoderKLCogVideoX) -> None:
        super().__init__()
        self.scaling_factor = float(vae.config.scaling_factor)
        # only what decoding needs: the encoder is half of the weights
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder
        use_spatial_norms(self.decoder)
        self.dtype = next(vae.decoder.parameters()).dtype

    def forward(self, latents: Tensor) -> Tensor:
        """Decode.

        Args:
            latents: (B, F, C, h, w) float32 clean latents, F odd.

        Returns:
            (B, 4 F - 3, H, W, 3) uint8.
        """
        cells = (1 / self.scaling_factor * latents.permute(0, 2, 1, 3, 4)).to(self.dtype)
        handed_on: Any = None
        frames: list[Tensor] = []
        for start, end in chunks(cells.shape[2]):
            chunk = cells[:, :, start:end]
            if self.post_quant_conv is not None:
                chunk = self.post_quant_conv(chunk)
            pixels, handed_on = self.decoder(chunk, conv_cache=handed_on)
            # bytes at once: float pixels of a whole video are four times as large
            frames.append(to_uint8(pixels))
        return torch.cat(frames, dim=2).permute(0, 2, 3, 4, 1).contiguous()


def chunks(num_frames: int) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) latent frame of each chunk."""
    rest = num_frames % CHUNK if num_frames > CHUNK else 0
    ends = range(min(CHUNK + rest, num_frames), num_frames + 1, CHUNK)
    start = 0
    for end in ends:
        yield start, end
        start = end


def stages(directory: Path, student: Student) -> list[StageSpec]:
    """Describe the stages of a checkpoint at the student's bucket, from its configs alone.

    Raises:
        CheckpointError: a config is missing or lacks a field, or the parts do not fit each other.
    """
    text_config = read_part_config(directory / "text_encoder", "T5EncoderModel")
    config = _transformer_config(directory / "transformer")
    scheduler = read_json(directory / "scheduler" / "scheduler_config.json")
    length, bucket = student.max_text_tokens, student.bucket
    try:
        text_dim, vocab_size = int(text_config["d_model"]), int(text_config["vocab_size"])
        num_timesteps = int(scheduler["num_train_timesteps"])
        if config["text_embed_dim"] != text_dim:
            raise CheckpointError(
                f"transformer/config.json: text_embed_dim is {config['text_embed_dim']}, "
                f"the text encoder's d_model is {text_dim}"
            )
        # the table of positions starts after this many
        if config["max_text_seq_length"] != length:
            raise CheckpointError(
                f"student.json: field max_text_tokens: {length}, the transformer's max_text_seq_length is "
                f"{config['max_text_seq_length']}"
            )
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None
    latents = TensorSpec(name="latents", dtype="float32", shape=latent_shape(directory, bucket))
    text = TensorSpec(name="text", dtype="float32", shape=(length, text_dim))
    return [
        StageSpec(
            name="text",
            parts=("text_encoder",),
            bucket=None,
            inputs=(TensorSpec(name="input_ids", dtype="int64", shape=(length,), maximum=vocab_size - 1),),
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
                TensorSpec(name="num_steps", dtype="int64", shape=(), maximum=max(student.num_steps)),
            ),
            outputs=(latents.model_copy(update={"name": "prediction"}),),
        ),
        StageSpec(
            name="decode",
            parts=("vae",),
            bucket=bucket,
            inputs=(latents,),
            outputs=(
                TensorSpec(
                    name="pixels", dtype="uint8", shape=(bucket.frames, bucket.height, bucket.width, 3)
                ),
            ),
        ),
    ]


def native_bucket(directory: Path) -> Bucket:
    """The video size that the transformer was trained at; raises as `latent_shape`."""
    config = _transformer_config(directory / "transformer")
    vae_config = read_part_config(directory / "vae", "AutoencoderKLCogVideoX")
    try:
        cell = pixels_per_cell(vae_config)
        height, width = (int(config[field]) * cell for field in ("sample_height", "sample_width"))
        return Bucket(height, width, int(config["sample_frames"]))
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None


def latent_shape(directory: Path, bucket: Bucket) -> tuple[int, int, int, int]:
    """Shape of one row of latents, (F, C, h, w); a video must be whole patches of whole cells.

    Raises:
        CheckpointError: it is not, a config is missing or lacks a field, or the parts do not fit each other.
    """
    config = _transformer_config(directory / "transformer")
    vae_config = read_part_config(directory / "vae", "AutoencoderKLCogVideoX")
    try:
        channels, vae_channels = int(config["in_channels"]), int(vae_config["latent_channels"])
        cell, frames_per_cell = pixels_per_cell(vae_config), int(vae_config["temporal_compression_ratio"])
        unit = cell * int(config["patch_size"])
    except KeyError as error:
        raise CheckpointError(f"{directory}: a config lacks the field {error.args[0]}") from None
    if channels != vae_channels:
        raise CheckpointError(
            f"vae/config.json: latent_channels is {vae_channels}, the transformer's in_channels is {channels}"
        )
    check_multiples(bucket, unit)
    # an even number of latent frames decodes to a few frames too many
    step = CHUNK * frames_per_cell
    if bucket.frames % step != 1:
        raise CheckpointError(
            f"student.json: field frames: {bucket.frames} is not 1 more than a multiple of {step}"
        )
    return (bucket.frames - 1) // frames_per_cell + 1, channels, bucket.height // cell, bucket.width // cell


def native_max_tokens(directory: Path) -> int:
    """The length that the transformer takes, and no other."""
    return int(_transformer_config(Path(directory) / "transformer")["max_text_seq_length"])


def load_encoder(
    directory: Path, *, max_tokens: int | None = None, device: torch.device | str = "cpu"
) -> PromptEncoder:
    """Load tokenizer and text encoder; `max_tokens` is by default the one that the transformer takes."""
    tokenizers = PromptTokenizers(
        "cogvideox", directory, max_tokens or native_max_tokens(directory), convert=True
    )
    return PromptEncoder(tokenizers, _text_stage(directory, torch.float32), device=device)


def load_decoder(directory: Path) -> nn.Module:
    """Load the decoder: (B, F, C, h, w) clean latents to (B, frames, H, W, 3) uint8. Raises as `load_vae`."""
    return DecodeStage(load_vae(directory)).eval()


def _text_stage(directory: Path, dtype: torch.dtype) -> TextStage:
    return TextStage(load_t5(Path(directory) / "text_encoder", dtype))


def load_stage(directory: Path, spec: StageSpec, dtype: torch.dtype) -> nn.Module:
    """Load the wrapper of one stage with its weights. Inputs and outputs are as `spec` in any `dtype`.

    Raises:
        CheckpointError: as `load_transformer`.
    """
    stage: nn.Module
    if spec.name == "text":
        stage = _text_stage(directory, dtype)
    elif spec.name == "denoise":
        stage = DenoiseStage(load_transformer(directory, dtype))
    else:
        stage = DecodeStage(load_vae(directory, torch.float32 if dtype == torch.float16 else dtype))
    return stage.eval()


FAMILY = FamilySpec(
    name="cogvideox",
    kind="video",
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
