"""Captions to pictures or videos, with a teacher or a student of any family as they are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engines.bucket import Bucket
from engines.denoiser import NetworkDenoiser
from engines.distill.student import load_schedule
from engines.families.spec import FamilySpec, family_of
from engines.families.student import STUDENT, read_student
from engines.noise import seeded_latents
from engines.sampler import sample
from engines.schedule import student_timesteps


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


class Painter:
    """A directory's text encoders, network and autoencoder.

    Args:
        directory: a diffusers pipeline directory, of a teacher or a student.
        max_tokens: length of prompts; by default the student's, or the family's own.
        bucket: what is drawn; by default what the student was made for, or the teacher trained at.
        batch: pictures or videos sampled together.
        autocast: run the network in this dtype.
        device: where everything runs.

    Raises:
        CheckpointError: a part is missing, damaged or unsupported, or cannot make such a bucket.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_tokens: int | None = None,
        bucket: Bucket | None = None,
        batch: int = 250,
        autocast: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.batch = batch
        self.device = device
        self.visited: dict[int, list[int]] = {}
        family = family_of(directory)
        if (directory / STUDENT).exists():
            student = read_student(directory)
            self.visited = {count: list(steps) for count, steps in student.timesteps.items()}
            bucket, max_tokens = bucket or student.bucket, max_tokens or student.max_text_tokens
        self.family: FamilySpec = family
        self.bucket = bucket or family.native_bucket(directory)
        self.shape = family.latent_shape(directory, self.bucket)
        network = family.load_network(directory, torch.float32).to(device)
        schedule = load_schedule(directory).to(device)
        self.denoiser = NetworkDenoiser(network, schedule, family.predict, autocast=autocast)
        self.encode = family.load_encoder(directory, max_tokens=max_tokens, device=device)
        self.codec = Codec(directory, device)

    @torch.no_grad()
    def __call__(
        self, captions: list[str], seeds: Sequence[int], *, num_steps: int, guidance_scale: float = 1.0
    ) -> Tensor:
        """Sample.

        Args:
            captions, seeds: one per picture or video; a seed fixes the starting noise.
            num_steps: a student is told of it, for a teacher it is the length of the sampling loop.
            guidance_scale: 1 for students.
        Returns:
            (N, H, W, 3) uint8 images or (N, F, H, W, 3) uint8 videos.
        """
        timesteps = self.visited.get(num_steps) or student_timesteps(
            num_steps, self.denoiser.schedule.num_timesteps
        )
        uncond, drawn = self.encode.unconditional(), []
        for start in range(0, len(captions), self.batch):
            rows = slice(start, start + self.batch)
            cond = self.encode(captions[rows])
            if self.denoiser.step_aware:
                cond = replace(cond, num_steps=torch.full((len(cond),), num_steps, device=self.device))
            latents = seeded_latents(seeds[rows], self.shape).to(self.device)
            x0 = sample(self.denoiser, latents, timesteps, cond, guidance_scale=guidance_scale, uncond=uncond)
            drawn.append(self.codec.decode(x0))
        return torch.cat(drawn)
