"""The video demo's teacher: a small CogVideoX, its text encoder trained jointly, in the diffusers layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import AutoencoderKLCogVideoX
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXBlock, CogVideoXTransformer3DModel
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from diffusers.schedulers.scheduling_ddim_cogvideox import CogVideoXDDIMScheduler
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5EncoderModel

from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.text import tokenize
from engines.demo.video.codec import FRAMES_PER_CELL, LATENT_CHANNELS, PATCH, ClipCode
from engines.demo.video.scenes import CLIP_SIZE, NUM_FRAMES, Scene
from engines.demo.video.text import D_MODEL, MAX_TOKENS, make_text_encoder, make_tokenizer
from engines.schedule import NoiseSchedule

_CELLS = CLIP_SIZE // PATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Size of the transformer. The defaults make 2.2 M parameters; a clip is 48 tokens, a caption 8."""

    num_layers: int = 6
    num_heads: int = 3
    head_dim: int = 48


def make_transformer(config: TeacherConfig) -> CogVideoXTransformer3DModel:
    """An untrained transformer: a table of positions as in CogVideoX-2B, and one latent cell to a token."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        time_embed_dim=64,
        text_embed_dim=D_MODEL,
        num_layers=config.num_layers,
        sample_width=_CELLS,
        sample_height=_CELLS,
        sample_frames=NUM_FRAMES,
        patch_size=1,
        temporal_compression_ratio=FRAMES_PER_CELL,
        max_text_seq_length=MAX_TOKENS,
        spatial_interpolation_scale=1.0,
    )
    blocks: Any = transformer.transformer_blocks
    for block in blocks:
        assert isinstance(block, CogVideoXBlock)
        _zero(block.norm1.linear)  # closed gates: every block starts as the identity (DiT, arXiv:2212.09748)
        _zero(block.norm2.linear)
    _zero(transformer.proj_out)
    return transformer


def _zero(layer: Any) -> None:
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)


def make_scheduler() -> CogVideoXDDIMScheduler:
    """Cosine noise levels, with timesteps spaced as a few-step student visits them.

    CogVideoX-2B shifts its levels towards noise, which suits many pixels. At this size that would be too kind
    to few steps: they would decide everything while noise still hides their blur. On this grid the first of
    four, which sees noise alone and can only guess the mean of what the caption leaves open, leads straight
    to a level where that guess shows.
    """
    return CogVideoXDDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=False,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


@dataclass(frozen=True, slots=True)
class Captioned:
    """Training set in memory: latents (N, F, C, h, w) fp16, token ids (N, captions per clip, L)."""

    latents: Tensor
    ids: Tensor


def encode_set(videos: Tensor, scenes: Sequence[Scene], code: ClipCode, seed: int = 0) -> Captioned:
    """Latents and captions of (N, 9, 32, 32, 3) uint8 clips and of their mirror images.

    Every clip gets three captions: twice the full one, and one with attributes left unsaid at random.
    """
    tokenizer, rng = make_tokenizer(), np.random.default_rng(seed)
    both = [*scenes, *(scene.mirrored() for scene in scenes)]
    latents = [
        code.encode(part.flip(3) if flip else part).transpose(1, 2).half()
        for flip in (False, True)
        for part in videos.split(500)
    ]
    full, _ = tokenize(tokenizer, [scene.caption() for scene in both], MAX_TOKENS)
    partial, _ = tokenize(tokenizer, [scene.partly_said(rng).caption() for scene in both], MAX_TOKENS)
    return Captioned(torch.cat(latents), torch.stack([full, full, partial], dim=1))


def train_teacher(
    data: Captioned,
    config: TeacherConfig,
    fit_config: FitConfig,
    directory: Path,
    *,
    batch: int = 64,
    caption_dropout: float = 0.1,
) -> tuple[CogVideoXTransformer3DModel, T5EncoderModel]:
    """Train transformer and text encoder with the v-prediction loss (Salimans & Ho, arXiv:2202.00512)."""
    torch.manual_seed(fit_config.seed)
    transformer, text_encoder = make_transformer(config), make_text_encoder()
    device = fit_config.device
    schedule = NoiseSchedule.from_config(dict(make_scheduler().config)).to(device)
    empty, _ = tokenize(make_tokenizer(), [""], MAX_TOKENS)

    def loss(rng: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.latents), (batch,), generator=rng)
        which = torch.randint(data.ids.shape[1], (batch,), generator=rng)
        dropped = torch.rand(batch, 1, generator=rng) < caption_dropout
        ids = torch.where(dropped, empty, data.ids[rows, which]).to(device)
        # stratified: each batch covers the timesteps evenly
        strata = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        timesteps = (strata * schedule.num_timesteps).long().to(device)
        clean = data.latents[rows].float().to(device)
        alpha, sigma = schedule.at(timesteps, clean.ndim)
        noise = torch.randn(clean.shape, generator=rng).to(device)
        with autocast(device), sdpa_kernel(SDPBackend.MATH):  # fastest at 56 tokens
            text = text_encoder(ids).last_hidden_state
            prediction = transformer(
                hidden_states=alpha * clean + sigma * noise,
                encoder_hidden_states=text,
                timestep=timesteps,
                return_dict=False,
            )[0]
        return functional.mse_loss(prediction.float(), alpha * noise - sigma * clean)

    fit("teacher", {"transformer": transformer, "text_encoder": text_encoder}, loss, fit_config, directory)
    return transformer.eval(), text_encoder.eval()


def save_teacher(
    directory: Path,
    transformer: CogVideoXTransformer3DModel,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKLCogVideoX,
) -> None:
    """Write a `CogVideoXPipeline` directory with fp16 safetensors."""
    CogVideoXPipeline(make_tokenizer(), text_encoder, vae, transformer, make_scheduler()).to(
        dtype=torch.float16
    ).save_pretrained(directory, safe_serialization=True)
