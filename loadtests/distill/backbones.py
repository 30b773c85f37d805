"""The networks that are measured: sizes as published, and shrunk ones of the same classes for the CPU.

A backbone is written out as the configs of a diffusers directory, because that is what families read. Weights
are random: time, FLOPs and memory do not depend on their values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.denoiser import Conditioning
from engines.distill.prompts import PromptBank
from engines.distill.student import Teacher
from engines.families.published import (
    COGVIDEOX_NETWORK,
    COGVIDEOX_SCHEDULER,
    PIXART_NETWORK,
    PIXART_SCHEDULER,
    SDXL_NETWORK,
    SDXL_SCHEDULER,
)
from engines.families.scheduler import load_schedule
from engines.families.spec import FAMILIES, family_of

NUM_PROMPTS = 64
CONFIGS = Path(__file__).resolve().parents[2] / "engines" / "distill" / "configs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """One size of a backbone.

    Attributes:
        network: `config.json` of the network.
        vae: of its autoencoder's `config.json` what shapes of latents depend on.
        text_tokens, text_width: shape of a prompt's embedding.
        pooled_width: of its pooled embedding, in families that have one.
        settings: `key=value` over the backbone's config.
    """

    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_tokens: int
    text_width: int
    pooled_width: int | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A network and the settings it is distilled with.

    Attributes:
        name: also of its file in `engines/distill/configs`.
        scheduler: the noise levels it was trained with.
        paper_iterations: how many the paper takes; None where it does not say.
    """

    name: str
    title: str
    family: str
    scheduler: Mapping[str, Any]
    paper_iterations: int | None
    full: Size
    toy: Size

    @property
    def config(self) -> Path:
        return CONFIGS / f"{self.name}.yaml"

    def size(self, *, toy: bool) -> Size:
        return self.toy if toy else self.full


PIXART_TOY: dict[str, Any] = {
    **PIXART_NETWORK,
    "caption_channels": 256,
    "cross_attention_dim": 432,
    "num_attention_heads": 6,
    "num_layers": 6,
}


SDXL_TOY: dict[str, Any] = {
    **SDXL_NETWORK,
    "addition_time_embed_dim": 32,
    "attention_head_dim": [1, 2, 4],
    "block_out_channels": [64, 128, 256],
    "cross_attention_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 32 + 128,
    "sample_size": 32,
    "transformer_layers_per_block": [1, 2, 4],
}


COGVIDEOX_TOY: dict[str, Any] = {
    **COGVIDEOX_NETWORK,
    "max_text_seq_length": 32,
    "num_attention_heads": 6,
    "num_layers": 6,
    "sample_frames": 9,
    "sample_height": 16,
    "sample_width": 24,
    "text_embed_dim": 256,
    "time_embed_dim": 128,
}

IMAGE_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 4,
}
VIDEO_VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLCogVideoX",
    "block_out_channels": [128, 256, 256, 512],
    "latent_channels": 16,
    "temporal_compression_ratio": 4,
}


def _pixart(pixels: int, toy_pixels: int, toy_batch: int) -> Backbone:
    micro_conditions = pixels == 1024
    return Backbone(
        name=f"pixart-{pixels}",
        title="PixArt-alpha",
        family="pixart",
        scheduler=PIXART_SCHEDULER,
        paper_iterations=500,
        full=Size(
            network={**PIXART_NETWORK, "sample_size": pixels // 8},
            vae=IMAGE_VAE,
            text_tokens=120,
            text_width=4096,
        ),
        toy=Size(
            network={
                **PIXART_TOY,
                "sample_size": toy_pixels // 8,
                "use_additional_conditions": micro_conditions,
            },
            vae=IMAGE_VAE,
            text_tokens=24,
            text_width=256,
            settings=(f"batch_size={toy_batch}",),
        ),
    )


def _sdxl(pixels: int, toy_pixels: int, toy_batch: int) -> Backbone:
    return Backbone(
        name=f"sdxl-{pixels}",
        title="SDXL",
        family="sdxl",
        scheduler=SDXL_SCHEDULER,
        paper_iterations=1000,
        full=Size(
            network=SDXL_NETWORK,
            vae=IMAGE_VAE,
            text_tokens=77,
            text_width=2048,
            pooled_width=1280,
        ),
        toy=Size(
            network=SDXL_TOY,
            vae=IMAGE_VAE,
            text_tokens=24,
            text_width=256,
            pooled_width=128,
            settings=(f"batch_size={toy_batch}", f"height={toy_pixels}", f"width={toy_pixels}"),
        ),
    )


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        _pixart(512, 128, toy_batch=32),
        _pixart(1024, 256, toy_batch=8),
        _sdxl(512, 128, toy_batch=32),
        _sdxl(1024, 256, toy_batch=8),
        Backbone(
            name="cogvideox-2b",
            title="CogVideoX-2B",
            family="cogvideox",
            scheduler=COGVIDEOX_SCHEDULER,
            paper_iterations=None,
            full=Size(
                network=COGVIDEOX_NETWORK,
                vae=VIDEO_VAE,
                text_tokens=226,
                text_width=4096,
            ),
            toy=Size(
                network=COGVIDEOX_TOY,
                vae=VIDEO_VAE,
                text_tokens=32,
                text_width=256,
                settings=("batch_size=4", "height=128", "width=192", "frames=9"),
            ),
        ),
    )
}
"""By name."""


def write_directory(backbone: Backbone, size: Size, directory: Path) -> Path:
    """Write the configs of a diffusers directory, without weights.

    Returns:
        `directory`.
    """
    network_part = "unet" if backbone.family == "sdxl" else "transformer"
    files: dict[str, Mapping[str, Any]] = {
        "model_index.json": {"_class_name": FAMILIES[backbone.family]},
        f"{network_part}/config.json": size.network,
        "vae/config.json": size.vae,
        "scheduler/scheduler_config.json": backbone.scheduler,
    }
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return directory


def random_teacher(
    directory: Path, *, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> Teacher:
    """A teacher with the weights that its class starts training with.

    Args:
        directory: as `write_directory` leaves it.
        device: "meta" gives a network without memory, on which FLOPs can be counted.
    """
    import diffusers

    family = family_of(directory)
    config = json.loads((directory / family.network_part / "config.json").read_text(encoding="utf-8"))
    torch.manual_seed(seed)
    with torch.device(device):
        network: Any = getattr(diffusers, config["_class_name"]).from_config(config)
    # not the model's own `to`, which logs advice for users of pipelines
    torch.nn.Module.to(network, device, dtype).eval().requires_grad_(False)
    schedule = load_schedule(directory)
    return Teacher(family, network, schedule if str(device) == "meta" else schedule.to(device))


def random_prompts(size: Size, seed: int = 0) -> PromptBank:
    """Embeddings that nobody wrote, of the right shapes; no padding."""
    rng = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Conditioning:
        text = torch.randn(count, size.text_tokens, size.text_width, generator=rng).half()
        mask = torch.ones(count, size.text_tokens, dtype=torch.int64)
        pooled = None
        if size.pooled_width is not None:
            pooled = torch.randn(count, size.pooled_width, generator=rng).half()
        return Conditioning(text, mask, pooled=pooled)

    return PromptBank(rows(NUM_PROMPTS), rows(1), max_tokens=size.text_tokens)
