"""Pictures and videos to latents and back, with the autoencoder of any family."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.families.spec import family_of


class Codec:
    """A directory's autoencoder.

    Args:
        directory: a diffusers pipeline directory.
        device: where it runs.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        self.directory = directory
        self.device = device
        self.family = family_of(directory)
        self.decoder = self.family.load_decoder(directory).to(device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn (B, ...) latents into (B, H, W, 3) images or (B, F, H, W, 3) videos, uint8 on the CPU."""
        pixels: Tensor = self.decoder(latents.to(self.device)).cpu()
        return pixels[:, 0] if self.family.kind == "image" else pixels

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """Turn images or videos, as `decode` makes them, into (B, ...) fp32 latents on the CPU."""
        pixels = pictures.to(self.device).float() / 127.5 - 1
        config, video = self._vae.config, self.family.kind == "video"
        channels_first = (0, 4, 1, 2, 3) if video else (0, 3, 1, 2)
        latents: Tensor = self._vae.encode(pixels.permute(*channels_first)).latent_dist.mode()
        mean, std = (config.get(field) for field in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:  # of some SDXL checkpoints
            mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            latents = (latents - mean) / std
        latents = latents * config.scaling_factor
        return (latents.permute(0, 2, 1, 3, 4) if video else latents).cpu()

    def round_trip(self, pictures: Tensor, batch: int = 250) -> Tensor:
        """Encode and decode images or videos: what the autoencoder alone costs."""
        return torch.cat([self.decode(self.encode(part)) for part in pictures.split(batch)])

    @cached_property
    def _vae(self) -> Any:
        # the decoder alone is enough for most, and the encoder is half of the weights
        if self.family.kind == "video":
            from engines.families.cogvideox import load_vae as load_video_vae

            return load_video_vae(self.directory).to(self.device)
        from engines.families.image_vae import load_vae

        return load_vae(self.directory).to(self.device)
