"""The student's own steps: which timesteps it visits, and where it stands at each."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engines.denoiser import x0_to_eps
from engines.distill import trajectory
from engines.distill.ring import conditioning
from engines.schedule import CLEAN, student_timesteps
from tests.engines.by_hand import SCHEDULE, STEP_WEIGHTS, Linear, grid, randn, rng


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_step_ends_are_the_sampling_timesteps(num_steps: int) -> None:
    step = torch.arange(num_steps)
    now, to = trajectory.step_ends(grid(torch.full_like(step, num_steps)), step)
    assert now.tolist() == student_timesteps(num_steps)
    assert to.tolist() == [*student_timesteps(num_steps)[1:], CLEAN]


def test_steps_are_drawn_by_weight_of_their_k_and_evenly_within() -> None:
    num_steps, step = trajectory.draw_steps(20_000, STEP_WEIGHTS, rng())
    for count, weight in STEP_WEIGHTS.items():
        assert (num_steps == count).float().mean().item() == pytest.approx(weight, abs=0.02)
        within = step[num_steps == count]
        assert torch.bincount(within, minlength=count).tolist() == pytest.approx(
            [len(within) / count] * count, rel=0.1
        )


def test_rollout_stops_where_the_sampler_would_be() -> None:
    student = Linear(0.3, 0.1)
    noise, num_steps, step = randn(4, 3, 4, 4), torch.tensor([4, 4, 2, 1]), torch.tensor([3, 1, 1, 0])
    latents = trajectory.rollout(student, noise, conditioning(num_steps), grid(num_steps), step)
    for row in range(4):
        expected = noise[row : row + 1]
        timesteps = student_timesteps(int(num_steps[row]))
        for now, to in list(itertools.pairwise(timesteps))[: int(step[row])]:
            at = torch.tensor([now])
            x0 = student(expected, at, conditioning(num_steps[row : row + 1]))
            eps = x0_to_eps(x0, expected, *SCHEDULE.at(at))
            alpha, sigma = SCHEDULE.at(torch.tensor([to]))
            expected = alpha * x0 + sigma * eps
        torch.testing.assert_close(latents[row], expected[0].detach(), atol=1e-5, rtol=1e-4)


def test_rollout_asks_only_for_rows_that_still_move() -> None:
    student = Linear(0.3, 0.1)
    num_steps = torch.tensor([4, 4, 2, 1])
    step = torch.tensor([3, 1, 1, 0])
    trajectory.rollout(student, randn(4, 3, 4, 4), conditioning(num_steps), grid(num_steps), step)
    assert student.rows == 3 + 1 + 1


def test_last_student_step_lands_on_its_x0() -> None:
    student = Linear(0.3, 0.1)
    num_steps, step = torch.tensor([1, 4]), torch.tensor([0, 3])
    at = trajectory.student_step(student, randn(2, 3, 4, 4), conditioning(num_steps), grid(num_steps), step)
    assert at.next_timesteps.tolist() == [CLEAN, CLEAN]
    torch.testing.assert_close(at.landing, at.x0.detach())


def test_table_holds_each_ks_timesteps_and_then_clean() -> None:
    table = trajectory.timestep_table({1: [999], 3: [999, 700, 300]})
    assert table[3].tolist() == [999, 700, 300, CLEAN]
    assert table[1].tolist() == [999, CLEAN, CLEAN, CLEAN]


@pytest.mark.parametrize("timesteps", [[999], [999, 999], [300, 999], [999, CLEAN]])
def test_table_refuses_what_is_no_trajectory(timesteps: list[int]) -> None:
    with pytest.raises(ValueError, match="2 strictly falling timesteps"):
        trajectory.timestep_table({2: timesteps})


@given(st.integers(0, 2**32), st.floats(0.0, 0.49))
def test_jittered_grids_start_at_the_noise_and_keep_falling(seed: int, share: float) -> None:
    num_steps = torch.tensor([1, 2, 3, 4, 8] * 4)
    visited = trajectory.jitter(grid(num_steps), num_steps, share, rng(seed))
    assert torch.equal(visited[:, 0], grid(num_steps)[:, 0])
    for row, count in zip(visited.tolist(), num_steps.tolist(), strict=True):
        assert all(t > s for t, s in itertools.pairwise(row[: count + 1]))
        assert row[count:] == [CLEAN] * (len(row) - count)


def test_jittered_timesteps_fill_their_share_of_the_way_to_both_neighbours() -> None:
    visited = trajectory.timestep_table({4: [999, 800, 500, 100]})[torch.full((4000,), 4)]
    moved = trajectory.jitter(visited, torch.full((4000,), 4), 0.4, rng())
    lowest, highest = (moved[:, 1:4].double().quantile(q, dim=0) for q in (0.01, 0.99))
    torch.testing.assert_close(lowest, torch.tensor([680.0, 340.0, 60.0]).double(), atol=4.0, rtol=0)
    torch.testing.assert_close(highest, torch.tensor([880.0, 620.0, 260.0]).double(), atol=4.0, rtol=0)


@given(st.integers(0, 2**32))
def test_random_landings_lie_between_the_grid_points(seed: int) -> None:
    now, to = trajectory.step_ends(grid(torch.full((64,), 4)), torch.arange(64) % 4)
    landing = trajectory.draw_landing(now, to, rng(seed))
    assert bool((landing >= to).all())
    assert bool((landing < now - 20).all())


def test_random_landings_are_spread_evenly() -> None:
    now, to = torch.full((4000,), 749), torch.full((4000,), 499)
    landing = trajectory.draw_landing(now, to, rng()).double()
    spread = landing.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]).double())
    torch.testing.assert_close(spread, torch.tensor([499, 556.5, 614, 671.5, 728]).double(), atol=6.0, rtol=0)
