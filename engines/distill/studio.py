"""Pictures drawn with the networks of a run while it goes on, without a trace in what they learn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from engines.bundle.bucket import Bucket
from engines.denoiser import Conditioning, NetworkDenoiser
from engines.distill.checkpoint import TrainingState
from engines.distill.distributed import World, local
from engines.distill.roles import Roles
from engines.families.codec import Codec
from engines.noise import seeded_latents
from engines.sampler import sample
from engines.schedule import student_timesteps

DECODED_PIXELS = 2**22
"""Pixels that are decoded together: four images of 1024 x 1024."""


@contextlib.contextmanager
@torch.no_grad()
def averaged(state: TrainingState) -> Iterator[None]:
    """Have the student run with its averaged weights."""
    _exchange(state)
    try:
        yield
    finally:
        _exchange(state)


@torch.no_grad()
def _exchange(state: TrainingState) -> None:
    # in place and one by one: shards must stay where they are, and a second copy may not fit
    for key, parameter in state.parameters["student"].items():
        learned, average = local(parameter), local(state.average[key])
        kept = learned.clone()
        learned.copy_(average)
        average.copy_(kept)


class Studio:
    """Teacher and student of a run as samplers. All processes of the run have to ask for the same pictures.

    Args:
        teacher: its directory, which has the autoencoder.
        visited: per K the timesteps that the student visits.
        bucket, shape: of one picture or video, and of its latents.
        uncond: conditioning of the empty prompt, on the networks' device.
        batch: pictures that this process samples together.
    """

    def __init__(
        self,
        teacher: Path,
        roles: Roles,
        state: TrainingState,
        visited: dict[int, list[int]],
        bucket: Bucket,
        shape: tuple[int, ...],
        uncond: Conditioning,
        *,
        batch: int,
        device: torch.device,
        world: World,
    ) -> None:
        self.world = world
        self._directory, self._roles, self._state = teacher, roles, state
        self._visited, self._uncond = visited, uncond
        self._bucket, self._shape = bucket, shape
        self._batch, self._device = batch, device

    def student(self, cond: Conditioning, seeds: Sequence[int], num_steps: int) -> Tensor:
        """Draw with the averaged weights, K = `num_steps`, unguided.

        Args:
            cond, seeds: one per picture.
        Returns:
            (N, H, W, 3) images or (N, F, H, W, 3) videos, uint8 on the CPU.
        """
        cond = replace(cond, num_steps=torch.full((len(cond),), num_steps))
        with averaged(self._state):
            return self._draw(self._roles.student, cond, seeds, self._visited[num_steps], 1.0)

    def teacher(
        self, cond: Conditioning, seeds: Sequence[int], num_steps: int, guidance_scale: float
    ) -> Tensor:
        """Draw with the teacher; otherwise as `student`."""
        timesteps = student_timesteps(num_steps, self._roles.teacher.schedule.num_timesteps)
        return self._draw(self._roles.teacher, cond, seeds, timesteps, guidance_scale)

    @torch.no_grad()
    def _draw(
        self,
        denoiser: NetworkDenoiser,
        cond: Conditioning,
        seeds: Sequence[int],
        timesteps: Sequence[int],
        guidance_scale: float,
    ) -> Tensor:
        each = -(-len(seeds) // self.world.size)
        # as many for every process, the first ones again where there are too few: all make the same calls
        mine = torch.arange(self.world.rank * each, (self.world.rank + 1) * each) % len(seeds)
        drawn = []
        with _resting(denoiser), torch.random.fork_rng(devices=[]):  # decoders are made with random weights
            for rows in mine.split(self._batch):
                noise = seeded_latents([seeds[row] for row in rows.tolist()], self._shape)
                latents = sample(
                    denoiser,
                    noise.to(self._device),
                    timesteps,
                    cond.rows(rows).to(self._device),
                    guidance_scale=guidance_scale,
                    uncond=self._uncond,
                )
                drawn += [self._codec.decode(part) for part in latents.split(self._decoded_together)]
        return self.world.rows(torch.cat(drawn))[: len(seeds)]

    @property
    def _decoded_together(self) -> int:
        bucket = self._bucket
        return max(1, DECODED_PIXELS // (bucket.height * bucket.width * bucket.frames))

    @cached_property
    def _codec(self) -> Codec:
        return Codec(self._directory, self._device)


@contextlib.contextmanager
def _resting(denoiser: NetworkDenoiser) -> Iterator[None]:
    """Have a network do without what it does in training alone, such as dropout, which draws at random."""
    training = denoiser.network.training
    denoiser.network.eval()
    try:
        yield
    finally:
        denoiser.network.train(training)
