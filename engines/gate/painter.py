"""Captions to pictures or videos, with a teacher or a student of any family as they are on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engines.bundle.bucket import Bucket
from engines.denoiser import NetworkDenoiser
from engines.errors import CheckpointError
from engines.families.codec import Codec
from engines.families.scheduler import load_schedule
from engines.families.spec import FamilySpec, family_of
from engines.families.student import STUDENT, read_student
from engines.noise import seeded_latents
from engines.sampler import sample
from engines.schedule import student_timesteps


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

    def grid(self, num_steps: int) -> list[int]:
        """The timesteps that are visited: those that a student records, evenly spaced ones for a teacher.

        Raises:
            CheckpointError: a student records none for so many steps.
        """
        if not self.visited:
            return student_timesteps(num_steps, self.denoiser.schedule.num_timesteps)
        if num_steps not in self.visited:
            known = ", ".join(map(str, sorted(self.visited)))
            raise CheckpointError(f"{STUDENT}: field timesteps.{num_steps}: there are none, only for {known}")
        return self.visited[num_steps]

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
        timesteps = self.grid(num_steps)
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
