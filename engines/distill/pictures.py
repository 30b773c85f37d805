"""Captions to pictures, with a teacher or a student as they are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engines.denoiser import Conditioning, NetworkDenoiser
from engines.distill.prompts import TextEncoder
from engines.distill.student import latent_shape
from engines.families.checkpoint import read_json
from engines.families.pixart import DecodeStage, load_transformer, load_vae
from engines.noise import seeded_latents
from engines.sampler import sample
from engines.schedule import NoiseSchedule, student_timesteps


class Codec:
    """A directory's VAE.

    Args:
        directory: a diffusers pipeline directory.
        device: where it runs.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.vae = load_vae(directory).to(device)
        self.decode_stage = DecodeStage(self.vae)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Turn (B, C, h, w) latents into (B, H, W, 3) uint8 pictures on the CPU."""
        pictures: Tensor = self.decode_stage(latents)
        return pictures.cpu()

    @torch.no_grad()
    def round_trip(self, pictures: Tensor, batch: int = 250) -> Tensor:
        """Encode and decode (N, H, W, 3) uint8 pictures: what the VAE alone costs."""
        out = []
        for part in pictures.split(batch):
            pixels = part.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
            out.append(self.decode(latents))
        return torch.cat(out)


class Painter:
    """A directory's text encoder, transformer and VAE.

    Args:
        directory: a diffusers pipeline directory, of a teacher or a student.
        max_tokens: length of prompts.
        batch: pictures sampled together.
        autocast: run the transformer in this dtype.
        device: where everything runs.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_tokens: int,
        batch: int = 250,
        autocast: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch = batch
        self.device = device
        schedule = NoiseSchedule.from_config(read_json(directory / "scheduler" / "scheduler_config.json"))
        transformer = load_transformer(directory).to(device)
        self.denoiser = NetworkDenoiser(transformer, schedule.to(device), autocast=autocast)
        self.shape = latent_shape(transformer)
        self.encode = TextEncoder(directory, max_tokens=max_tokens, device=device)
        self.codec = Codec(directory, device)

    @torch.no_grad()
    def __call__(
        self, captions: list[str], seeds: Sequence[int], *, num_steps: int, guidance_scale: float = 1.0
    ) -> Tensor:
        """Sample pictures.

        Args:
            captions, seeds: one per picture; a seed fixes the starting noise.
            num_steps: a student is told of it, for a teacher it is the length of the sampling loop.
            guidance_scale: 1 for students.
        Returns:
            (N, H, W, 3) uint8.
        """
        timesteps = student_timesteps(num_steps, self.denoiser.schedule.num_timesteps)
        uncond, pictures = self.encode([""]), []
        for start in range(0, len(captions), self.batch):
            rows = slice(start, start + self.batch)
            cond = self.encode(captions[rows])
            if self.denoiser.step_aware:
                steps = torch.full((len(cond),), num_steps, device=self.device)
                cond = Conditioning(cond.text, cond.mask, steps)
            latents = seeded_latents(seeds[rows], self.shape).to(self.device)
            x0 = sample(self.denoiser, latents, timesteps, cond, guidance_scale=guidance_scale, uncond=uncond)
            pictures.append(self.codec.decode(x0))
        return torch.cat(pictures)
