"""The student's trajectory: which timesteps it visits, and how it gets from one to the next, see `tdm`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from engines.denoiser import Conditioning, Denoiser, x0_to_eps
from engines.distill import draws
from engines.sampler import ddim_step
from engines.schedule import CLEAN


def draw_steps(batch: int, weights: Mapping[int, float], rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw what each row trains: a K, by weight, and one of its K steps, evenly.

    Returns:
        num_steps and step, each (B,) int64; step 0 starts from pure noise, step K - 1 ends at clean latents.
    """
    counts = torch.tensor(list(weights), dtype=torch.int64)
    odds = torch.tensor(list(weights.values()), dtype=torch.float64)
    num_steps = counts[torch.multinomial(odds, batch, replacement=True, generator=rng)]
    step = (torch.rand(batch, generator=rng, dtype=torch.float64) * num_steps).long()
    return num_steps, step


def timestep_table(visited: Mapping[int, Sequence[int]]) -> Tensor:
    """Timesteps of every K as one table: row K holds those that a K-step student visits, then `CLEAN`.

    Args:
        visited: K: its K timesteps, falling strictly; see `student_timesteps`.
    Returns:
        (max K + 1, max K + 1) int64.
    Raises:
        ValueError: a K does not have K falling timesteps.
    """
    size = max(visited) + 1
    table = torch.full((size, size), CLEAN, dtype=torch.int64)
    for count, timesteps in visited.items():
        ends = [*timesteps, CLEAN]
        if len(timesteps) != count or any(t <= s for t, s in pairwise(ends)):
            raise ValueError(f"{count} steps need {count} strictly falling timesteps, got {list(timesteps)}")
        table[count, :count] = torch.tensor(list(timesteps))
    return table


def jitter(visited: Tensor, num_steps: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Move the inner timesteps of each row at random, by at most `share` of the way to their neighbours.

    A student trained on such grids can be sampled on others than the even one (arXiv:2605.06376). The first
    timestep stays: sampling starts from pure noise. Below a share of 1/2 the order is kept.

    Args:
        visited: (B, n + 1) rows of `timestep_table`.
        num_steps: (B,) their K.
    """
    inner = torch.arange(visited.shape[1] - 1) < num_steps[:, None].cpu()
    inner[:, 0] = False
    now, after = visited[:, :-1].double().cpu(), visited[:, 1:].double().cpu()
    before = torch.cat([now[:, :1], now[:, :-1]], dim=1)
    uniform = 2.0 * share * torch.rand(now.shape, generator=rng, dtype=torch.float64) - share
    moved = now + torch.where(uniform > 0, uniform * (before - now), uniform * (now - after))
    jittered = visited.clone()
    jittered[:, :-1] = torch.where(inner, moved.round(), now).long().to(visited.device)
    return jittered


def step_ends(visited: Tensor, step: Tensor | int) -> tuple[Tensor, Tensor]:
    """Timesteps t and s of a step: entries `step` and `step + 1` of each row.

    Args:
        visited: (B, n + 1) rows of `timestep_table`.
        step: (B,), or one for all rows.
    Returns:
        t and s, each (B,) int64; s is `CLEAN` for the last step.
    """
    index = torch.as_tensor(step, device=visited.device).expand(len(visited))[:, None]
    return visited.gather(1, index).squeeze(1), visited.gather(1, index + 1).squeeze(1)


@torch.no_grad()
def rollout(
    student: Denoiser,
    noise: Tensor,
    cond: Conditioning,
    visited: Tensor,
    step: Tensor,
    *,
    num_calls: int | None = None,
) -> Tensor:
    """Sample each row with the student up to the input of its step: unguided, with the current weights.

    Rows drop out as they arrive, so a batch costs no more denoiser rows than its steps need.

    Args:
        noise: (B, C, ...), unit variance.
        cond: carries `num_steps`, (B,).
        visited: (B, n + 1) timesteps of each row's trajectory, from `timestep_table`.
        step: (B,) index of the step each row will train.
        num_calls: of the student, also once all rows have arrived: processes that hold shards of it have to
            make the same calls.
    Returns:
        (B, C, ...) latents x_t.
    """
    latents = noise.clone()
    for index in range(int(step.max()) if num_calls is None else num_calls):
        rows = (step > index).nonzero().squeeze(1)
        if len(rows) == 0:
            student(latents[:1], visited[:1, 0], cond.rows(slice(0, 1)))
            continue
        now, to = step_ends(visited[rows], index)
        x0 = student(latents[rows], now, cond.rows(rows))
        eps = x0_to_eps(x0, latents[rows], *student.schedule.at(now, noise.ndim))
        latents[rows] = ddim_step(x0, eps, student.schedule, to)
    return latents


@dataclass(frozen=True, slots=True)
class StudentStep:
    """One student step per row: from `timesteps` (t) to `next_timesteps` (s).

    Attributes:
        x0: the student's prediction at x_t; the only tensor with a gradient.
        eps: the noise that belongs to it, detached.
        landing: x_s, detached.
        first: (B,) bool: the step starts from pure noise.
    """

    x0: Tensor
    eps: Tensor
    landing: Tensor
    timesteps: Tensor
    next_timesteps: Tensor
    cond: Conditioning
    first: Tensor


def student_step(
    student: Denoiser,
    noise: Tensor,
    cond: Conditioning,
    visited: Tensor,
    step: Tensor,
    *,
    landing_rng: torch.Generator | None = None,
    num_calls: int | None = None,
) -> StudentStep:
    """Roll out to each row's step, then take that step with gradient.

    Args:
        noise, cond, visited, step, num_calls: as for `rollout`.
        landing_rng: draws where each step lands, see `Objective.random_landing`; None: at the next grid
            point.
    """
    latents = rollout(student, noise, cond, visited, step, num_calls=num_calls)
    timesteps, next_timesteps = step_ends(visited, step)
    if landing_rng is not None:
        next_timesteps = draw_landing(timesteps, next_timesteps, landing_rng)
    x0 = student(latents, timesteps, cond)
    eps = x0_to_eps(x0.detach(), latents, *student.schedule.at(timesteps, noise.ndim))
    landing = ddim_step(x0.detach(), eps, student.schedule, next_timesteps)
    return StudentStep(x0, eps, landing, timesteps, next_timesteps, cond, step == 0)


def clean_points(at: StudentStep) -> StudentStep:
    """The same steps, taken to land on their x0: what `Objective.points` "clean" matches.

    Its kernel is then the clean-data kernel alpha_tau x0 + sigma_tau n, and tau comes from the whole of
    [floor, t - gap).
    """
    return replace(at, landing=at.x0.detach(), next_timesteps=torch.full_like(at.next_timesteps, CLEAN))


def draw_landing(timesteps: Tensor, next_timesteps: Tensor, rng: torch.Generator) -> Tensor:
    """Draw where a step lands, evenly from the grid point s up to twenty timesteps before t.

    Clean latents count as one timestep among them, so the last step rarely lands there.
    """
    span = (timesteps - 20 - next_timesteps).clamp(min=1)
    uniform = draws.uniform(timesteps.shape, rng).to(timesteps.device)
    return next_timesteps + (uniform * span).long()
