"""The demo teacher: a small PixArt, its text encoder trained jointly, in the diffusers pipeline layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from engines.demo.codec import LATENT_CHANNELS, PatchCode
from engines.demo.fit import FitConfig, autocast, fit
from engines.demo.scenes import Scene
from engines.demo.text import D_MODEL, make_text_encoder, make_tokenizer, tokenize
from engines.schedule import NoiseSchedule

_TRAIN_TOKENS = 16  # the longest caption; the tokenizer's own limit leaves room for what people add


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """Size of the transformer. The defaults make 4.0 M parameters and 16 image tokens."""

    num_layers: int = 6
    num_heads: int = 6
    head_dim: int = 32
    patch_size: int = 2
    sample_size: int = 8
    latent_channels: int = LATENT_CHANNELS


def make_transformer(config: TeacherConfig) -> PixArtTransformer2DModel:
    """An untrained one; its first predictions are zero."""
    transformer = PixArtTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        num_layers=config.num_layers,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        cross_attention_dim=config.num_heads * config.head_dim,
        caption_channels=D_MODEL,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def make_scheduler() -> DDIMScheduler:
    """Cosine levels, v-prediction, trailing timesteps: how diffusers samples teacher and student.

    PixArt's linear betas suit many pixels. Here they would be kind to few steps, which decide everything
    while noise still hides their blur.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
    )


@dataclass(frozen=True, slots=True)
class Captioned:
    """Training set in memory: latents (N, 16, 8, 8) fp16, token ids and masks (N, captions per picture, 16).

    Rows `one_object` show one solid, `two_objects` two; both index the other fields.
    """

    latents: Tensor
    ids: Tensor
    mask: Tensor
    one_object: Tensor
    two_objects: Tensor


def encode_set(images: Tensor, scenes: Sequence[Scene], code: PatchCode, seed: int = 0) -> Captioned:
    """Latents and captions of (N, 64, 64, 3) uint8 pictures and of their mirror images.

    Every picture gets four captions: the full one, and three with attributes left unsaid. What is open to the
    sampler is what few steps blur.
    """
    tokenizer, rng = make_tokenizer(), np.random.default_rng(seed)
    both = [*scenes, *(scene.mirrored() for scene in scenes)]
    latents = [code.encode(view).half() for flip in (False, True) for part in images.split(1000)
               for view in [part.flip(2) if flip else part]]  # fmt: skip
    captions = [[scene.caption() for scene in both]]
    captions += [[scene.partly_said(rng).caption() for scene in both] for _ in range(3)]
    ids, mask = zip(*(tokenize(tokenizer, said, _TRAIN_TOKENS) for said in captions), strict=True)
    return Captioned(
        torch.cat(latents),
        torch.stack(ids, dim=1),
        torch.stack(mask, dim=1),
        torch.tensor([i for i, scene in enumerate(both) if scene.num_objects == 1]),
        torch.tensor([i for i, scene in enumerate(both) if scene.num_objects == 2]),
    )


def train_teacher(
    data: Captioned,
    config: TeacherConfig,
    fit_config: FitConfig,
    directory: Path,
    *,
    batch: int = 128,
    caption_dropout: float = 0.1,
    two_object_share: float = 0.3,
) -> tuple[PixArtTransformer2DModel, T5EncoderModel]:
    """Train transformer and text encoder with the v-prediction loss (Salimans & Ho, arXiv:2202.00512)."""
    torch.manual_seed(fit_config.seed)
    transformer, text_encoder = make_transformer(config), make_text_encoder()
    device = fit_config.device
    schedule = NoiseSchedule.from_config(dict(make_scheduler().config)).to(device)
    empty_ids, empty_mask = tokenize(make_tokenizer(), [""], _TRAIN_TOKENS)

    def loss(rng: torch.Generator) -> Tensor:
        num_two = round(batch * two_object_share)
        ones = data.one_object[torch.randint(len(data.one_object), (batch - num_two,), generator=rng)]
        twos = data.two_objects[torch.randint(len(data.two_objects), (num_two,), generator=rng)]
        rows = torch.cat([ones, twos])[torch.randperm(batch, generator=rng)]
        which = torch.randint(data.ids.shape[1], (batch,), generator=rng)
        dropped = torch.rand(batch, 1, generator=rng) < caption_dropout
        ids = torch.where(dropped, empty_ids, data.ids[rows, which])
        mask = torch.where(dropped, empty_mask, data.mask[rows, which])
        # stratified: each batch covers the timesteps evenly
        strata = (torch.arange(batch) + torch.rand(batch, generator=rng)) / batch
        timesteps = (strata * schedule.num_timesteps).long()
        timesteps, ids, mask = timesteps.to(device), ids.to(device), mask.to(device)
        alpha, sigma = schedule.at(timesteps)
        clean = data.latents[rows].float().to(device)
        noise = torch.randn(clean.shape, generator=rng).to(device)
        with autocast(device), sdpa_kernel(SDPBackend.MATH):  # 1.5 x flash at 16 tokens
            text = text_encoder(ids, attention_mask=mask).last_hidden_state
            prediction = transformer(
                alpha * clean + sigma * noise,
                encoder_hidden_states=text,
                timestep=timesteps,
                encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        return functional.mse_loss(prediction.float(), alpha * noise - sigma * clean)

    fit("teacher", {"transformer": transformer, "text_encoder": text_encoder}, loss, fit_config, directory)
    return transformer.eval(), text_encoder.eval()


def save_teacher(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKL,
    transformer: PixArtTransformer2DModel,
) -> None:
    """Write a `PixArtAlphaPipeline` directory with fp16 safetensors."""
    PixArtAlphaPipeline(tokenizer, text_encoder, vae, transformer, make_scheduler()).to(
        dtype=torch.float16
    ).save_pretrained(directory, safe_serialization=True)
