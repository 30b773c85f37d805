"""Where teacher and fake score are asked: a trajectory point, carried by the forward process, see `tdm`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engines.distill import draws
from engines.distill.objective import Objective
from engines.distill.trajectory import StudentStep, clean_points
from engines.schedule import NoiseSchedule


def draw_tau(
    timesteps: Tensor,
    next_timesteps: Tensor,
    objective: Objective,
    rng: torch.Generator,
    *,
    noisiest: int | None = None,
) -> Tensor:
    """Draw tau evenly from the inside of each row's step: [max(floor, s + 1), t - gap).

    Starting above s keeps the kernel's b positive; the floor and the gap are those of the authors' script.

    Args:
        noisiest: for overlapping intervals: the timestep that takes t's place.
    Raises:
        ValueError: a step is too short for floor and gap.
    """
    low = (next_timesteps + 1).clamp(min=objective.tau_floor)
    span = (timesteps if noisiest is None else noisiest) - objective.tau_gap - low
    if bool((span < 1).any()):
        row = int(span.argmin())
        raise ValueError(
            f"no room for tau between timesteps {int(next_timesteps[row])} and {int(timesteps[row])} with "
            f"tau_floor {objective.tau_floor} and tau_gap {objective.tau_gap}: use fewer steps"
        )
    uniform = draws.uniform(timesteps.shape, rng).to(timesteps.device)
    return low + (uniform * span).long()


def transition_kernel(
    schedule: NoiseSchedule, source: Tensor, tau: Tensor, ndim: int = 4
) -> tuple[Tensor, Tensor]:
    """The forward process from `source` to the noisier `tau`: q(x_tau | x_s) = N(a x_s, b^2).

    Not the clean-data kernel alpha_tau x + sigma_tau n, which would count the noise already in x_s twice.

    Args:
        source, tau: (B,) timesteps, `source` less noisy.
        ndim: of the latents.
    Returns:
        a and b, each (B, 1, ...).
    """
    alpha_s, sigma_s = schedule.at(source, ndim)
    alpha, sigma = schedule.at(tau, ndim)
    a = alpha / alpha_s
    return a, (sigma**2 - (a * sigma_s) ** 2).clamp(min=0.0).sqrt()


def matched(at: StudentStep, objective: Objective) -> StudentStep:
    """The points of these steps that the objective compares with the teacher."""
    return clean_points(at) if objective.points == "clean" else at


@dataclass(frozen=True, slots=True)
class Query:
    """Where teacher and fake score are compared: `latents = a x_s + b noise`, at noise level tau."""

    latents: Tensor
    tau: Tensor
    noise: Tensor
    a: Tensor
    b: Tensor


def draw_query(
    at: StudentStep,
    schedule: NoiseSchedule,
    objective: Objective,
    rng: torch.Generator,
    *,
    later: bool = False,
) -> Query:
    """Carry each row's landing point to a random tau of its step. No gradient passes through it.

    Args:
        at: the steps as `matched` returns them.
        later: up to the noisiest timestep, whatever the objective's intervals.
    """
    overlapping = later or objective.intervals == "overlapping"
    noisiest = schedule.num_timesteps - 1 if overlapping else None
    tau = draw_tau(at.timesteps, at.next_timesteps, objective, rng, noisiest=noisiest)
    a, b = transition_kernel(schedule, at.next_timesteps, tau, at.landing.ndim)
    noise = draws.normal(at.landing.shape, rng).to(at.landing.device)
    return Query(a * at.landing + b * noise, tau, noise, a, b)


def row_mean(values: Tensor) -> Tensor:
    """Mean of each row over all its dimensions, (B,)."""
    return values.flatten(1).mean(1)
