"""All of TDM where scores are known: the student's marginals become its teacher's."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engines.denoiser import Conditioning, Denoiser
from engines.distill import forward, tdm, trajectory
from engines.distill.objective import Objective
from engines.distill.ring import (
    RingDenoiser,
    Sampler,
    conditioning,
    diffused_data,
    distill_ring,
    draw,
    landings,
    points_of_data,
    sliced_wasserstein,
)
from engines.distill.trajectory import StudentStep
from engines.schedule import NoiseSchedule, student_timesteps
from tests.engines.by_hand import SCHEDULE, SCHEDULES, STEP_WEIGHTS, UNCOND, each_schedule, rng

# One Gaussian: everything but the student's eight numbers is known in closed form

MEAN, DEVIATION = 0.7, 0.4


class GaussianTeacher:
    """The exact denoiser of N(MEAN, DEVIATION^2)."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        alpha, sigma = self.schedule.at(timesteps)
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        return MEAN + alpha * DEVIATION**2 / variance * (latents - alpha * MEAN)


class AffineStudent(nn.Module):
    """x0 = gain x + shift with a gain and a shift for each step of a grid; starts as the teacher."""

    def __init__(self, schedule: NoiseSchedule, visited: list[int]) -> None:
        super().__init__()
        self.schedule, self.visited = schedule, torch.tensor(visited)
        alpha, sigma = (factor.flatten() for factor in schedule.at(self.visited))
        gain = alpha * DEVIATION**2 / ((alpha * DEVIATION) ** 2 + sigma**2)
        self.gain, self.shift = nn.Parameter(gain), nn.Parameter(MEAN * (1 - gain * alpha))

    def forward(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        index = (timesteps[:, None] == self.visited).int().argmax(1)
        return self.gain[index].view(-1, 1, 1, 1) * latents + self.shift[index].view(-1, 1, 1, 1)


class PerfectFakeScore:
    """Knows the mean and variance of every step's landing points, hence their score at any tau."""

    def __init__(self, schedule: NoiseSchedule, at: StudentStep) -> None:
        self.schedule, self.at = schedule, at
        mean, variance = torch.empty_like(at.landing), torch.empty_like(at.landing)
        for timestep in at.timesteps.unique():
            rows = at.timesteps == timestep
            mean[rows], variance[rows] = at.landing[rows].mean(), at.landing[rows].var()
        self.mean, self.variance = mean, variance

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        a, b = forward.transition_kernel(self.schedule, self.at.next_timesteps, timesteps)
        score = -(latents - a * self.mean) / (a**2 * self.variance + b**2)
        alpha, sigma = self.schedule.at(timesteps)
        return (latents + sigma**2 * score) / alpha


@each_schedule
def test_with_a_perfect_fake_score_the_students_marginals_become_exactly_the_teachers(
    schedule: NoiseSchedule,
) -> None:
    batch, visited = 4096, student_timesteps(4, 900)
    table = trajectory.timestep_table({4: visited})
    teacher, student = GaussianTeacher(schedule), AffineStudent(schedule, visited)
    generator, objective = rng(1), Objective(guidance_scale=1.0, huber_c=0.0)
    alpha_T, sigma_T = schedule.at(torch.tensor(visited[:1]))

    def start(generator: torch.Generator) -> Tensor:
        return alpha_T * MEAN + (sigma_T**2 + (alpha_T * DEVIATION) ** 2).sqrt() * torch.randn(
            batch, 1, 1, 1, generator=generator
        )

    def deviations(model: Denoiser) -> list[tuple[float, float]]:
        """Per step, by how much mean and standard deviation of the landing points are off, of the latter."""
        found = []
        for step in range(4):
            num_steps = torch.full((batch,), 4)
            at = trajectory.student_step(
                model, start(rng(7)), conditioning(num_steps), table[num_steps], torch.full((batch,), step)
            )
            alpha, sigma = (float(factor[0]) for factor in schedule.at(at.next_timesteps))
            expected = math.hypot(alpha * DEVIATION, sigma)
            found.append(
                (
                    (float(at.landing.mean()) - alpha * MEAN) / expected,
                    float(at.landing.std()) / expected - 1.0,
                )
            )
        return found

    assert max(abs(value) for step in deviations(teacher) for value in step) > 0.1
    adam = torch.optim.Adam(student.parameters(), lr=0.02, betas=(0.0, 0.99))
    for iteration in range(400):
        adam.param_groups[0]["lr"] = 0.02 * (1 - iteration / 400)
        num_steps, step = trajectory.draw_steps(batch, {4: 1.0}, generator)
        at = trajectory.student_step(
            student, start(generator), conditioning(num_steps), table[num_steps], step
        )
        adam.zero_grad()
        fake_score = PerfectFakeScore(schedule, at)
        tdm.student_loss(at, teacher, fake_score, UNCOND, objective, generator)[0].mean().backward()
        adam.step()
    assert max(abs(value) for step in deviations(student) for value in step) < 0.03


# All of it, on a mixture of Gaussians whose scores are known


def test_distilled_mixture_beats_its_teacher_at_equal_steps() -> None:
    num = 4096
    student = distill_ring(SCHEDULE, Objective(guidance_scale=1.0), num_steps=STEP_WEIGHTS, batch=256)
    for count in (4, 2, 1):
        distances = [
            sliced_wasserstein(landings(model, num, count)[-1][1], points_of_data(num, 7))
            for model in (student, RingDenoiser(SCHEDULE))
        ]
        assert distances[0] < 0.75 * distances[1], f"{count} steps"


@pytest.mark.parametrize("name", ["v_prediction", "flow, shift 3"])
def test_training_moves_the_students_trajectory_to_the_marginals_of_a_mixture(name: str) -> None:
    """Four steps, unguided, exact target: x_s comes to be distributed like the diffused data at each s."""
    schedule, num = SCHEDULES[name], 8192
    objective = Objective(guidance_scale=1.0, fake_target="exact")
    student = distill_ring(schedule, objective, num_steps={4: 1.0}, fake_updates=2)
    ours, teachers = (
        [sliced_wasserstein(points, diffused_data(schedule, s, num)) for s, points in landings(model, num, 4)]
        for model in (student, RingDenoiser(schedule))
    )
    # Euler's error grows along the teacher's trajectory; the first two points have hardly any to lose
    assert ours[3] < 0.7 * teachers[3]
    assert ours[2] < 0.6 * teachers[2]
    assert max(ours[:2]) < 0.05


def test_matching_clean_points_alone_leaves_the_trajectory_off_the_marginals() -> None:
    """What sets TDM apart from DMD2: without it only the last point is distributed rightly."""
    schedule, num = SCHEDULES["flow, shift 3"], 4096
    objective = Objective(guidance_scale=1.0, points="clean")
    student = distill_ring(schedule, objective, num_steps={4: 1.0}, fake_updates=2)
    ours, teachers = (
        [sliced_wasserstein(points, diffused_data(schedule, s, num)) for s, points in landings(model, num, 4)]
        for model in (student, RingDenoiser(schedule))
    )
    assert ours[3] < 0.7 * teachers[3]
    assert min(ours[:3]) > 2 * max(teachers[:2])


def test_the_rings_picture_is_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "ring.png"
    draw(picture, SCHEDULE, [Sampler("teacher", RingDenoiser(SCHEDULE))], num=64)
    assert picture.read_bytes().startswith(b"\x89PNG")
