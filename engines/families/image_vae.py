"""The image autoencoder that PixArt and SDXL share: loading it, and latents to pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from engines.families.checkpoint import read_part_config
from engines.families.weights import fill, load_weights


def load_vae(directory: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Load `directory/vae`.

    Raises:
        CheckpointError: config or weights are missing, damaged, or do not fit each other.
    """
    part = Path(directory) / "vae"
    vae: Any = AutoencoderKL.from_config(read_part_config(part, "AutoencoderKL"))
    return fill(vae, load_weights(part), part, dtype)


def pixels_per_cell(vae_config: dict[str, Any]) -> int:
    """How many pixels a latent cell is high and wide."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], any float dtype, to [0, 255]; rounded as diffusers does."""
    return ((pixels.float() * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


class DecodeStage(nn.Module):
    """Latents to pixels, scaling and rounding included."""

    mean: Tensor
    std: Tensor

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.scaling_factor = float(vae.config.scaling_factor)
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        # some SDXL checkpoints normalise each latent channel
        self.normalised = mean is not None and std is not None
        if self.normalised:
            self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
            self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
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
        if self.normalised:
            latents = latents * self.std / self.scaling_factor + self.mean
        else:
            latents = latents / self.scaling_factor
        latents = latents.to(self.dtype, memory_format=torch.channels_last)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        pixels: Tensor = self.decoder(latents)
        return to_uint8(pixels).permute(0, 2, 3, 1).contiguous()


class ImageDecoder(nn.Module):
    """`DecodeStage` for training and sampling: an image is a video of one frame."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.stage = DecodeStage(vae)

    def forward(self, latents: Tensor) -> Tensor:
        """Decode (B, C, h, w) latents to (B, 1, H, W, 3) uint8."""
        pixels: Tensor = self.stage(latents)
        return pixels[:, None]


def load_decoder(directory: Path) -> nn.Module:
    """Load the decoder: (B, C, h, w) clean latents to (B, 1, H, W, 3) uint8. Raises as `load_vae`."""
    return ImageDecoder(load_vae(directory)).eval()
