"""Latent consistency distillation, the baseline that TDM is compared with.

Luo et al., "Latent Consistency Models", arXiv:2310.04378. A consistency function f says of every point of one
trajectory of the teacher's ODE where it ends. It is trained on neighbouring points: noise clean latents to
t, take one guided DDIM step of the teacher from t to t - k, and ask that f be the same at both ends. The
far end is answered by a slowly moving average of the student, the target. f is made of the network's own x0,

    f(x, t) = c_skip(t) x + c_out(t) x0(x, t),  c_skip = s^2 / (u^2 + s^2),  c_out = u / sqrt(u^2 + s^2)

with u = 10 t and s = 0.5, so that f(x, 0) = x. From t = 100 on, c_skip is below 1e-6 and c_out one within
1e-6: the x0 of a student made here *is* its consistency function wherever a few-step sampler looks.

What differs from the paper. One guidance scale is distilled instead of a range that the student is told. The
students of this project are sampled by a deterministic DDIM step on f's x0; the paper adds fresh noise
between steps, which often does better with more than one step. Unlike TDM this needs clean latents:
`latents_of_scenes` renders the demo's own pictures, or a file holds latents of a teacher or an autoencoder
(`write_latents`), see `latents`. A comparison with TDM, which sees no pictures, favours this baseline there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from engines.denoiser import Conditioning, Denoiser, x0_to_eps
from engines.distill.forward import Query, row_mean
from engines.distill.tdm import guided_x0
from engines.sampler import ddim_step
from engines.schedule import CLEAN


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsistencyObjective:
    """What the method leaves open; defaults are those of the authors.

    Attributes:
        skip: k, timesteps between the ends of a teacher step.
        loss: "huber": `sqrt(d^2 + c^2) - c` per element; "l2": `d^2`.
        huber_c: its c.
        sigma_data: s of the boundary condition.
        timestep_scale: u per timestep.
    """

    skip: int = 20
    loss: Literal["huber", "l2"] = "huber"
    huber_c: float = 1e-3
    sigma_data: float = 0.5
    timestep_scale: float = 10.0

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.skip < 1 or min(self.huber_c, self.sigma_data, self.timestep_scale) <= 0.0:
            raise ValueError(
                "skip must be at least 1, huber_c, sigma_data and timestep_scale positive, got "
                f"{self.skip}, {self.huber_c}, {self.sigma_data} and {self.timestep_scale}"
            )


def boundary(timesteps: Tensor, objective: ConsistencyObjective, ndim: int) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at `timesteps` (B,), each (B, 1, ...) fp32 with `ndim` dimensions; clean is t = 0."""
    u = timesteps.clamp(min=0).float() * objective.timestep_scale
    total = u.square() + objective.sigma_data**2
    shape = (-1, *[1] * (ndim - 1))
    return (objective.sigma_data**2 / total).view(shape), (u / total.sqrt()).view(shape)


def consistency(
    denoiser: Denoiser,
    latents: Tensor,
    timesteps: Tensor,
    cond: Conditioning,
    objective: ConsistencyObjective,
) -> Tensor:
    """f: where the trajectory through `latents` (B, ...) at `timesteps` (B,) ends, (B, ...) fp32."""
    c_skip, c_out = boundary(timesteps, objective, latents.ndim)
    # no network knows the timestep of clean latents; its answer counts for nothing there
    return c_skip * latents + c_out * denoiser(latents, timesteps.clamp(min=0), cond)


def draw_ends(
    batch: int, num_timesteps: int, objective: ConsistencyObjective, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw teacher steps evenly from a grid of `skip` timesteps: where they start and end, each (B,) int64.

    The noisiest starts at the last of `num_timesteps`; the cleanest ends at `CLEAN`.
    """
    index = torch.randint(num_timesteps // objective.skip, (batch,), generator=rng)
    start = num_timesteps - 1 - index * objective.skip
    end = start - objective.skip
    return start, torch.where(end < 0, CLEAN, end)


@torch.no_grad()
def teacher_step(
    teacher: Denoiser,
    latents: Tensor,
    start: Tensor,
    end: Tensor,
    cond: Conditioning,
    uncond: Conditioning,
    guidance_scale: float,
) -> Tensor:
    """One guided DDIM step along the teacher's probability-flow ODE, (B, ...)."""
    nothing = torch.zeros_like(latents)
    at = Query(latents, start, nothing, nothing, nothing)
    x0 = guided_x0(teacher, at, cond, uncond, guidance_scale)
    eps = x0_to_eps(x0, latents, *teacher.schedule.at(start, latents.ndim))
    return ddim_step(x0, eps, teacher.schedule, end)


def consistency_loss(
    student: Denoiser,
    target: Denoiser,
    teacher: Denoiser,
    noised: tuple[Tensor, Tensor, Tensor],
    cond: Conditioning,
    uncond: Conditioning,
    guidance_scale: float,
    objective: ConsistencyObjective,
) -> tuple[Tensor, Tensor]:
    """Distance of f at both ends of a teacher step (Eq. 14).

    Args:
        target: the student's moving average.
        noised: (B, ...) latents at the start of the steps, and their (B,) starts and ends.
        uncond: the empty prompt, one row.
    Returns:
        (B,) loss per row, with a gradient for the student alone, and the (B,) mean absolute distance.
    """
    latents, start, end = noised
    plain = replace(cond, num_steps=None)
    moved = teacher_step(teacher, latents, start, end, plain, uncond, guidance_scale)
    with torch.no_grad():
        expected = consistency(target, moved, end, cond, objective)
    difference = consistency(student, latents, start, cond, objective) - expected
    if objective.loss == "l2":
        loss = difference.square()
    else:
        loss = (difference.square() + objective.huber_c**2).sqrt() - objective.huber_c
    return row_mean(loss), row_mean(difference.detach().abs())


# Latents
