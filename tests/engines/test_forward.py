"""Noise on a point of the trajectory: where the losses are asked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.distill import forward, tdm, trajectory
from engines.distill.objective import Intervals, Objective
from engines.distill.ring import conditioning
from engines.distill.trajectory import StudentStep
from engines.schedule import CLEAN, NoiseSchedule
from tests.engines.by_hand import (
    SCHEDULE,
    UNCOND,
    Linear,
    T,
    any_student_step,
    each_schedule,
    grid,
    randn,
    rng,
)

pairs = st.tuples(st.integers(CLEAN, T - 2), st.integers(0, T - 1)).filter(lambda pair: pair[0] < pair[1])


@each_schedule
@given(pair=pairs)
def test_transition_kernel_carries_one_marginal_to_the_other(
    schedule: NoiseSchedule, pair: tuple[int, int]
) -> None:
    source, tau = torch.tensor([pair[0]]), torch.tensor([pair[1]])
    a, b = forward.transition_kernel(schedule, source, tau)
    (alpha_s, sigma_s), (alpha, sigma) = schedule.at(source), schedule.at(tau)
    torch.testing.assert_close(a * alpha_s, alpha)
    torch.testing.assert_close((a * sigma_s) ** 2 + b**2, sigma**2, atol=1e-7, rtol=1e-5)
    assert b.item() > 0.0


@each_schedule
@pytest.mark.parametrize("intervals", ["separate", "overlapping"])
def test_query_of_noised_data_has_the_marginal_variance_of_tau(
    schedule: NoiseSchedule, intervals: Intervals
) -> None:
    batch = 4096
    x0, eps = torch.full((batch, 1, 2, 8, 8), 0.5), randn(batch, 1, 2, 8, 8)
    now, to = torch.full((batch,), 499), torch.full((batch,), 249)
    alpha_s, sigma_s = schedule.at(to, x0.ndim)
    at = StudentStep(
        x0, eps, alpha_s * x0 + sigma_s * eps, now, to, conditioning(torch.full((batch,), 4)), now < 0
    )
    query = forward.draw_query(at, schedule, Objective(intervals=intervals), rng(1))
    assert bool((query.tau > to).all())
    assert bool((query.tau < (now if intervals == "separate" else T)).all())
    assert (query.tau.max().item() > 499) == (intervals == "overlapping")
    alpha, sigma = schedule.at(query.tau, x0.ndim)
    standard = (query.latents - alpha * 0.5) / sigma
    assert standard.mean().item() == pytest.approx(0.0, abs=0.01)
    assert standard.var().item() == pytest.approx(1.0, abs=0.01)


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32))
def test_tau_stays_inside_its_own_step(num_steps: int, seed: int) -> None:
    step = torch.arange(num_steps).repeat(64)
    now, to = trajectory.step_ends(grid(torch.full_like(step, num_steps)), step)
    tau = forward.draw_tau(now, to, Objective(), rng(seed))
    assert bool((tau > to).all())
    assert bool((tau >= 20).all())
    assert bool((tau < now - 10).all())


def test_clean_points_are_predictions_noised_anew_at_any_level_of_their_step() -> None:
    student, at = any_student_step(batch=512)
    objective = Objective(points="clean")
    points = forward.matched(at, objective)
    query = forward.draw_query(points, SCHEDULE, objective, rng(2))
    alpha, sigma = SCHEDULE.at(query.tau)
    torch.testing.assert_close(query.latents, alpha * at.x0.detach() + sigma * query.noise)
    assert bool((query.tau < at.timesteps - 10).all())
    assert bool((query.tau <= at.next_timesteps).any())  # below where the step lands
    rows, _ = tdm.student_loss(at, Linear(0.2, 1.0), Linear(0.2, 0.0), UNCOND, objective, rng(3))
    rows.mean().backward()
    assert student.shift.grad is not None
    assert student.shift.grad.item() < 0.0


def test_trajectory_points_are_the_landing_points() -> None:
    _, at = any_student_step()
    assert forward.matched(at, Objective()) is at


def test_steps_too_short_for_a_tau_are_refused() -> None:
    with pytest.raises(ValueError, match="tau_gap 600"):
        forward.draw_tau(torch.tensor([499]), torch.tensor([CLEAN]), Objective(tau_gap=600), rng())
