"""TDM where everything is known: six Gaussians on a ring, whose denoiser is a formula.

`python -m engines.distill.ring OUT.png` draws the picture of this folder's README; the tests use the rest.
Points are latents of shape (B, 2, 1, 1), so that the objective runs on them as it runs on images.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from engines.denoiser import Conditioning, Denoiser
from engines.distill import tdm, trajectory
from engines.distill.objective import Objective
from engines.schedule import NoiseSchedule, flow_schedule, student_timesteps

CENTRES = 1.5 * torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(6) * (2 * math.pi / 6)])
SPREAD = 0.15
MAX_NUM_STEPS = 4
NO_PROMPT = Conditioning(torch.zeros(1, 1, 1), torch.ones(1, 1))


class RingDenoiser:
    """The exact x0 of the mixture: posterior mean, by Bayes' rule."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:  # noqa: ARG002
        alpha, sigma = self.schedule.at(timesteps, ndim=2)
        points = latents.view(-1, 2)
        variance = (alpha * SPREAD) ** 2 + sigma**2
        offset = points[:, None] - alpha[:, None] * CENTRES
        weights = torch.softmax(-0.5 * offset.square().sum(-1) / variance, dim=1)
        means = CENTRES + (alpha * SPREAD**2 / variance)[:, None] * offset
        return (weights[..., None] * means).sum(1).view(-1, 2, 1, 1)


class Corrected(nn.Module):
    """The exact denoiser plus a network that starts at zero: a student, or a fake score, before training."""

    def __init__(self, schedule: NoiseSchedule, seed: int) -> None:
        super().__init__()
        self.base, self.schedule = RingDenoiser(schedule), schedule
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(2 + 5 + MAX_NUM_STEPS, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU()
            )
            self.out = nn.Linear(128, 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        time = timesteps.float().view(-1, 1) / self.schedule.num_timesteps
        assert cond.num_steps is not None
        steps = nn.functional.one_hot(cond.num_steps, MAX_NUM_STEPS + 1).float()[:, 1:]
        waves = torch.cat([torch.sin(math.pi * k * time) for k in (1, 2, 4)] + [time, 1 - time], dim=1)
        hidden = self.net(torch.cat([latents.view(-1, 2), waves, steps], dim=1))
        correction: Tensor = self.out(hidden).view(-1, 2, 1, 1)
        return self.base(latents, timesteps, cond) + correction


def points_of_data(num: int, seed: int) -> Tensor:
    """Draw from the mixture, (num, 2), as many points from each Gaussian."""
    rng = torch.Generator().manual_seed(seed)
    return CENTRES[torch.arange(num) % len(CENTRES)] + SPREAD * torch.randn(num, 2, generator=rng)


def conditioning(num_steps: Tensor) -> Conditioning:
    """What the denoisers are told: K of each row, (B,); the prompt says nothing."""
    batch = num_steps.shape[0]
    return Conditioning(torch.ones(batch, 1, 1), torch.ones(batch, 1), num_steps)


def even_grids(schedule: NoiseSchedule) -> Tensor:
    """`trajectory.timestep_table` of the evenly spaced trajectories."""
    counts = range(1, MAX_NUM_STEPS + 1)
    return trajectory.timestep_table(
        {count: student_timesteps(count, schedule.num_timesteps) for count in counts}
    )


def distill_ring(
    schedule: NoiseSchedule,
    objective: Objective,
    *,
    num_steps: dict[int, float],
    iterations: int = 300,
    batch: int = 512,
    fake_updates: int = 1,
) -> Corrected:
    """Distil the exact denoiser; both learners start as it. Rates fall linearly over the last 40 %."""
    teacher, student, fake_score = RingDenoiser(schedule), Corrected(schedule, 0), Corrected(schedule, 0)
    table, rng = even_grids(schedule), torch.Generator().manual_seed(1)
    student_adam = torch.optim.Adam(student.parameters(), betas=(0.0, 0.99))
    fake_adam = torch.optim.Adam(fake_score.parameters(), betas=(0.0, 0.99))
    for iteration in range(iterations):
        for adam, lr in ((student_adam, 1e-3), (fake_adam, 3e-3)):
            adam.param_groups[0]["lr"] = lr * min(1.0, 2.5 * (1 - iteration / iterations))
        counts, step = trajectory.draw_steps(batch, num_steps, rng)
        noise = torch.randn(batch, 2, 1, 1, generator=rng)
        at = trajectory.student_step(student, noise, conditioning(counts), table[counts], step)
        for _ in range(fake_updates):
            fake_adam.zero_grad()
            tdm.fake_score_loss(fake_score, at, objective, rng).mean().backward()
            fake_adam.step()
        student_adam.zero_grad()
        tdm.student_loss(at, teacher, fake_score, NO_PROMPT, objective, rng)[0].mean().backward()
        student_adam.step()
    return student


@torch.no_grad()
def landings(model: Denoiser, num: int, num_steps: int, seed: int = 8) -> list[tuple[int, Tensor]]:
    """Sample from the same noise every time.

    Returns:
        After each step its timestep (`CLEAN` at the end) and the points there, (num, 2).
    """
    noise = torch.randn(num, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    counts, table = torch.full((num,), num_steps), even_grids(model.schedule)
    steps = (
        trajectory.student_step(model, noise, conditioning(counts), table[counts], torch.full((num,), index))
        for index in range(num_steps)
    )
    return [(int(at.next_timesteps[0]), at.landing.view(-1, 2)) for at in steps]


def diffused_data(schedule: NoiseSchedule, timestep: int, num: int) -> Tensor:
    """Draw from the teacher's marginal at a timestep, (num, 2)."""
    alpha, sigma = schedule.at(torch.tensor([timestep]), ndim=2)
    rng = torch.Generator().manual_seed(9)
    return alpha * points_of_data(num, 7) + sigma * torch.randn(num, 2, generator=rng)


def sliced_wasserstein(points: Tensor, others: Tensor) -> float:
    """Mean 1-Wasserstein distance of two equally large sets of points along 32 directions."""
    angles = torch.linspace(0, math.pi, 33)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((points @ directions).sort(0).values - (others @ directions).sort(0).values).abs().mean())


# The picture


@dataclass(frozen=True, slots=True)
class Sampler:
    """A row of the picture."""

    label: str
    model: Denoiser


def draw(path: Path, schedule: NoiseSchedule, samplers: Sequence[Sampler], num: int = 4096) -> None:
    """A row per sampler, a column per landing point of four steps, over the teacher's marginal there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 2.75 * len(samplers) + 0.4), layout="constrained")
    axes = figure.subplots(len(samplers), MAX_NUM_STEPS, sharex=True, sharey=True, squeeze=False)
    for row, sampler in zip(axes, samplers, strict=True):
        for axis, (timestep, points) in zip(row, landings(sampler.model, num, MAX_NUM_STEPS), strict=True):
            marginal = diffused_data(schedule, timestep, num)
            distance = sliced_wasserstein(points, marginal)
            axis.hist2d(*marginal.T.numpy(), bins=70, range=[[-2.8, 2.8]] * 2, cmap="Greys", alpha=0.9)
            axis.scatter(*points[:700].T.numpy(), s=2.0, color="#d9480f", linewidths=0)
            axis.set_title(f"distance {distance:.3f}", fontsize=9)
            axis.set(xticks=[], yticks=[], aspect="equal", xlim=(-2.8, 2.8), ylim=(-2.8, 2.8))
            if row is axes[-1]:
                axis.set_xlabel("clean" if timestep < 0 else f"timestep {timestep}")
        row[0].set_ylabel(sampler.label)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Distil twice, once as TDM does and once on clean points, and draw both beside the teacher."""
    parser = argparse.ArgumentParser(prog="python -m engines.distill.ring", description=main.__doc__)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("--iterations", type=int, default=1500, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    schedule = flow_schedule(3.0)
    objectives = {
        "TDM, 4 steps": Objective(guidance_scale=1.0, fake_target="exact"),
        "clean points noised anew\n(DMD2), 4 steps": Objective(guidance_scale=1.0, points="clean"),
    }
    samplers = [Sampler("teacher, 4 steps", RingDenoiser(schedule))]
    for label, objective in objectives.items():
        student = distill_ring(
            schedule, objective, num_steps={4: 1.0}, iterations=args.iterations, fake_updates=2
        )
        samplers.append(Sampler(label, student))
    draw(args.out, schedule, samplers)


if __name__ == "__main__":
    main()
