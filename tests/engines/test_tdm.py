import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engines.denoiser import Conditioning, x0_to_eps
from engines.distill import tdm
from engines.distill.tdm import Objective, Query, StudentStep
from engines.sampler import sample
from engines.schedule import CLEAN, NoiseSchedule, student_timesteps

SCHEDULE = NoiseSchedule.from_config({"prediction_type": "v_prediction"})
T = SCHEDULE.num_timesteps
UNCOND = Conditioning(torch.zeros(1, 1, 1), torch.ones(1, 1))
STEP_WEIGHTS = {4: 0.6, 2: 0.25, 1: 0.15}


def conditioning(num_steps: Tensor) -> Conditioning:
    batch = num_steps.shape[0]
    return Conditioning(torch.ones(batch, 1, 1), torch.ones(batch, 1), num_steps)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """A denoiser with two weights: x0 = gain x + shift, plus a constant for prompted rows."""

    def __init__(self, gain: float, shift: float, prompt_shift: float = 0.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.shift = nn.Parameter(torch.tensor(shift))
        self.prompt_shift = prompt_shift
        self.schedule = SCHEDULE
        self.rows = 0

    def forward(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        self.rows += len(timesteps)
        prompted = cond.text.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return self.gain * latents + self.shift + self.prompt_shift * prompted


def any_student_step(batch: int = 6) -> tuple[Linear, StudentStep]:
    student = Linear(0.3, 0.1)
    num_steps, step = tdm.draw_steps(batch, STEP_WEIGHTS, rng())
    return student, tdm.student_step(student, randn(batch, 3, 4, 4), conditioning(num_steps), step)


# Trajectory


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
def test_step_ends_are_the_sampling_timesteps(num_steps: int) -> None:
    step = torch.arange(num_steps)
    now, to = tdm.step_ends(torch.full_like(step, num_steps), step, T)
    assert now.tolist() == student_timesteps(num_steps)
    assert to.tolist() == [*student_timesteps(num_steps)[1:], CLEAN]


def test_steps_are_drawn_by_weight_of_their_k_and_evenly_within() -> None:
    num_steps, step = tdm.draw_steps(20_000, STEP_WEIGHTS, rng())
    for count, weight in STEP_WEIGHTS.items():
        assert (num_steps == count).float().mean().item() == pytest.approx(weight, abs=0.02)
        within = step[num_steps == count]
        assert torch.bincount(within, minlength=count).tolist() == pytest.approx(
            [len(within) / count] * count, rel=0.1
        )


def test_rollout_stops_where_the_sampler_would_be() -> None:
    student = Linear(0.3, 0.1)
    noise, num_steps, step = randn(4, 3, 4, 4), torch.tensor([4, 4, 2, 1]), torch.tensor([3, 1, 1, 0])
    latents = tdm.rollout(student, noise, conditioning(num_steps), step)
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
    tdm.rollout(
        student, randn(4, 3, 4, 4), conditioning(torch.tensor([4, 4, 2, 1])), torch.tensor([3, 1, 1, 0])
    )
    assert student.rows == 3 + 1 + 1


def test_last_student_step_lands_on_its_x0() -> None:
    student = Linear(0.3, 0.1)
    at = tdm.student_step(
        student, randn(2, 3, 4, 4), conditioning(torch.tensor([1, 4])), torch.tensor([0, 3])
    )
    assert at.next_timesteps.tolist() == [CLEAN, CLEAN]
    torch.testing.assert_close(at.landing, at.x0.detach())


# Forward process from a trajectory point

pairs = st.tuples(st.integers(CLEAN, T - 2), st.integers(0, T - 1)).filter(lambda pair: pair[0] < pair[1])


@given(pairs)
def test_transition_kernel_carries_one_marginal_to_the_other(pair: tuple[int, int]) -> None:
    source, tau = torch.tensor([pair[0]]), torch.tensor([pair[1]])
    a, b = tdm.transition_kernel(SCHEDULE, source, tau)
    (alpha_s, sigma_s), (alpha, sigma) = SCHEDULE.at(source), SCHEDULE.at(tau)
    torch.testing.assert_close(a * alpha_s, alpha)
    torch.testing.assert_close((a * sigma_s) ** 2 + b**2, sigma**2)
    assert b.item() > 0.0


def test_query_of_noised_data_has_the_marginal_variance_of_tau() -> None:
    batch = 4096
    x0, eps = torch.full((batch, 1, 8, 8), 0.5), randn(batch, 1, 8, 8)
    now, to = torch.full((batch,), 499), torch.full((batch,), 249)
    alpha_s, sigma_s = SCHEDULE.at(to)
    at = StudentStep(x0, eps, alpha_s * x0 + sigma_s * eps, now, to, conditioning(torch.full((batch,), 4)))
    query = tdm.draw_query(at, SCHEDULE, Objective(), rng(1))
    alpha, sigma = SCHEDULE.at(query.tau)
    standard = (query.latents - alpha * 0.5) / sigma
    assert standard.mean().item() == pytest.approx(0.0, abs=0.01)
    assert standard.var().item() == pytest.approx(1.0, abs=0.01)


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**32))
def test_tau_stays_inside_its_own_step(num_steps: int, seed: int) -> None:
    step = torch.arange(num_steps).repeat(64)
    now, to = tdm.step_ends(torch.full_like(step, num_steps), step, T)
    tau = tdm.draw_tau(now, to, Objective(), rng(seed))
    assert bool((tau > to).all())
    assert bool((tau >= 20).all())
    assert bool((tau < now - 10).all())


def test_steps_too_short_for_a_tau_are_refused() -> None:
    with pytest.raises(ValueError, match="tau_gap 600"):
        tdm.draw_tau(torch.tensor([499]), torch.tensor([CLEAN]), Objective(tau_gap=600), rng())


# Fake score


def test_exact_target_at_a_clean_landing_is_the_students_x0() -> None:
    _, at = any_student_step()
    at = replace(at, next_timesteps=torch.full_like(at.timesteps, CLEAN), landing=at.x0.detach())
    query = tdm.draw_query(at, SCHEDULE, Objective(), rng(2))
    target = tdm.fake_target(at, query, SCHEDULE, "exact")
    assert torch.equal(tdm.fake_target(at, query, SCHEDULE, "student_x0"), at.x0)
    alpha, sigma = SCHEDULE.at(query.tau)
    torch.testing.assert_close(
        x0_to_eps(target, query.latents, alpha, sigma), query.noise, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(alpha * target, alpha * at.x0.detach(), atol=1e-5, rtol=0)


def test_only_the_exact_target_learns_the_score_of_points_off_the_marginal() -> None:
    """Landing points N(0, 0.2^2), which no x0 with independent noise could have made: sigma_s is larger."""
    batch, now, to, tau = 400_000, 499, 249, 320
    landing = 0.2 * randn(batch, 1, 1, 1, seed=3)
    alpha_s, sigma_s = SCHEDULE.at(torch.tensor([to]))
    x0 = landing / (alpha_s + sigma_s)  # a student whose eps equals its x0
    ends = torch.full((batch,), now), torch.full((batch,), to)
    at = StudentStep(x0, x0, landing, *ends, conditioning(torch.full((batch,), 4)))
    a, b = tdm.transition_kernel(SCHEDULE, ends[1], torch.full((batch,), tau))
    noise = randn(batch, 1, 1, 1, seed=4)
    query = Query(a * landing + b * noise, torch.full((batch,), tau), noise, a, b)

    def fitted_score(kind: tdm.FakeTarget) -> float:
        target = tdm.fake_target(at, query, SCHEDULE, kind)
        gain = (
            target * query.latents
        ).mean() / query.latents.square().mean()  # least squares, linear in x_tau
        alpha, sigma = SCHEDULE.at(torch.tensor([tau]))
        return float((alpha * gain - 1.0) / sigma**2)

    true_score = -1.0 / float((a[0] * 0.2) ** 2 + b[0] ** 2)
    assert fitted_score("exact") == pytest.approx(true_score, rel=0.02)
    assert fitted_score("student_x0") != pytest.approx(true_score, rel=0.2)


def test_v_weight_turns_an_x0_error_into_a_v_error() -> None:
    tau = torch.tensor([30, 500, 980])
    alpha, sigma = SCHEDULE.at(tau)
    v, wrong_v, latents = randn(3, 3, 1, 2, 2)
    x0, wrong_x0 = alpha * latents - sigma * v, alpha * latents - sigma * wrong_v
    weighted = tdm.fake_weight(SCHEDULE, tau, "v") * (x0 - wrong_x0) ** 2
    torch.testing.assert_close(weighted, (v - wrong_v) ** 2, atol=1e-4, rtol=1e-3)
    snr = (SCHEDULE.alphas[tau] / SCHEDULE.sigmas[tau]) ** 2
    torch.testing.assert_close(tdm.fake_weight(SCHEDULE, tau, "x0").flatten(), snr.clamp(max=5.0))


def test_importance_weight_is_one_when_eps_is_noise() -> None:
    batch = 4
    x0, eps = randn(batch, 16, 32, 32), randn(batch, 16, 32, 32, seed=5)
    now, to = torch.full((batch,), 499), torch.full((batch,), 249)
    alpha_s, sigma_s = SCHEDULE.at(to)
    at = StudentStep(x0, eps, alpha_s * x0 + sigma_s * eps, now, to, conditioning(torch.full((batch,), 4)))
    weight = tdm.importance_weight(at, tdm.draw_query(at, SCHEDULE, Objective(), rng(6)), SCHEDULE)
    torch.testing.assert_close(weight, torch.ones(batch, 1, 1, 1), atol=0.03, rtol=0)


@pytest.mark.parametrize("target", ["student_x0", "exact"])
@pytest.mark.parametrize("loss", ["x0", "v"])
def test_fake_score_loss_trains_the_fake_score_alone(target: tdm.FakeTarget, loss: tdm.FakeLoss) -> None:
    student, at = any_student_step()
    fake_score = Linear(0.2, 0.0)
    rows = tdm.fake_score_loss(fake_score, at, Objective(fake_target=target, fake_loss=loss), rng(3))
    assert rows.shape == (6,)
    rows.mean().backward()
    assert fake_score.gain.grad is not None
    assert student.gain.grad is None


# Student


def test_student_has_no_gradient_when_fake_score_equals_an_unguided_teacher() -> None:
    student, at = any_student_step()
    twin = Linear(0.2, 0.4)
    rows, _ = tdm.student_loss(at, twin, twin, UNCOND, Objective(guidance_scale=1.0), rng(3))
    rows.mean().backward()
    assert student.gain.grad is not None
    assert student.gain.grad.item() == 0.0
    assert student.shift.grad is not None
    assert student.shift.grad.item() == 0.0


def test_guidance_moves_the_student_even_where_fake_score_equals_teacher() -> None:
    student, at = any_student_step()
    twin = Linear(0.2, 0.4, prompt_shift=1.0)
    rows, _ = tdm.student_loss(at, twin, twin, UNCOND, Objective(guidance_scale=3.0), rng(3))
    rows.mean().backward()
    assert student.shift.grad is not None
    assert student.shift.grad.item() < 0.0  # descending raises the shift, towards the prompt


@pytest.mark.parametrize("teacher_shift", [-1.0, 1.0])
def test_student_update_moves_from_fake_score_to_teacher(teacher_shift: float) -> None:
    student, at = any_student_step()
    teacher, fake_score = Linear(0.2, teacher_shift), Linear(0.2, 0.0)
    rows, _ = tdm.student_loss(at, teacher, fake_score, UNCOND, Objective(guidance_scale=1.0), rng(3))
    rows.mean().backward()
    assert student.shift.grad is not None
    assert math.copysign(1.0, -student.shift.grad.item()) == teacher_shift
    assert teacher.shift.grad is None
    assert fake_score.shift.grad is None


def test_one_step_student_has_the_gradient_of_dmd() -> None:
    """K = 1: x_tau is x0 re-noised with fresh noise and the gradient is DMD's (arXiv:2311.18828)."""
    student, teacher, fake_score = Linear(0.3, 0.1), Linear(0.2, 0.5, prompt_shift=0.3), Linear(0.25, 0.0)
    batch, guidance_scale = 5, 3.0
    noise, num_steps = randn(batch, 3, 4, 4), torch.ones(batch, dtype=torch.int64)
    cond, objective = conditioning(num_steps), Objective(guidance_scale=guidance_scale, huber_c=0.0)
    at = tdm.student_step(student, noise, cond, torch.zeros_like(num_steps))
    at.x0.retain_grad()
    tdm.student_loss(at, teacher, fake_score, UNCOND, objective, rng(9))[0].sum().backward()

    generator = rng(9)
    tau = 20 + (torch.rand(batch, generator=generator, dtype=torch.float64) * (999 - 10 - 20)).long()
    x0 = student(noise, torch.full((batch,), 999), cond).detach()
    alpha, sigma = SCHEDULE.at(tau)
    noisy = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
    prompted, empty = teacher(noisy, tau, cond), teacher(noisy, tau, UNCOND.expand(batch))
    real = (empty + guidance_scale * (prompted - empty)).detach()
    fake = fake_score(noisy, tau, cond).detach()
    expected = (fake - real) / (x0 - real).abs().mean(dim=(1, 2, 3), keepdim=True) / x0[0].numel()
    assert at.x0.grad is not None
    torch.testing.assert_close(at.x0.grad, expected, atol=1e-5, rtol=1e-4)


def test_normaliser_is_bounded_below() -> None:
    x0 = torch.ones(2, 1, 2, 2, requires_grad=True)
    rows, normaliser = tdm.surrogate_loss(x0, x0.detach(), x0.detach() + 1e-3, Objective(min_normaliser=0.05))
    assert normaliser.tolist() == pytest.approx([0.05, 0.05])
    assert bool(rows.isfinite().all())


# All of it, on a mixture of Gaussians whose scores are known

CENTRES = 1.5 * torch.tensor([[math.cos(a), math.sin(a)] for a in torch.arange(6) * (2 * math.pi / 6)])
SPREAD = 0.15


class MixtureDenoiser:
    """The exact denoiser of six equal Gaussians on a ring."""

    schedule = SCHEDULE

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        alpha, sigma = (factor.view(-1, 1) for factor in self.schedule.at(timesteps))
        points = latents.view(-1, 2)
        variance = (alpha * SPREAD) ** 2 + sigma**2
        offset = points[:, None] - alpha[:, None] * CENTRES
        weights = torch.softmax(-0.5 * offset.square().sum(-1) / variance, dim=1)
        means = CENTRES + (alpha * SPREAD**2 / variance)[:, None] * offset
        return (weights[..., None] * means).sum(1).view(-1, 2, 1, 1)


class Corrected(nn.Module):
    """The exact denoiser plus a network that starts at zero: a student, or a fake score, before training."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base, self.schedule = MixtureDenoiser(), SCHEDULE
        self.net = nn.Sequential(nn.Linear(11, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.out = nn.Linear(128, 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        time = timesteps.float().view(-1, 1) / T
        assert cond.num_steps is not None
        steps = nn.functional.one_hot(cond.num_steps, 5).float()[:, 1:]
        waves = torch.cat([torch.sin(math.pi * k * time) for k in (1, 2, 4)] + [time, 1 - time], dim=1)
        hidden = self.net(torch.cat([latents.view(-1, 2), waves, steps], dim=1))
        correction: Tensor = self.out(hidden)
        return self.base(latents, timesteps, cond) + correction.view(-1, 2, 1, 1)


def sliced_wasserstein(points: Tensor, others: Tensor) -> float:
    angles = torch.linspace(0, math.pi, 33)[:-1]
    directions = torch.stack([angles.cos(), angles.sin()])
    return float(((points @ directions).sort(0).values - (others @ directions).sort(0).values).abs().mean())


def test_distilled_mixture_beats_its_teacher_at_equal_steps() -> None:
    batch, iterations = 256, 300
    with torch.random.fork_rng(devices=[]):
        teacher, student, fake_score = MixtureDenoiser(), Corrected(0), Corrected(0)
    generator, objective = rng(1), Objective(guidance_scale=1.0)
    student_adam = torch.optim.Adam(student.parameters(), lr=1e-3, betas=(0.0, 0.99))
    fake_adam = torch.optim.Adam(fake_score.parameters(), lr=3e-3, betas=(0.0, 0.99))
    for iteration in range(iterations):
        for adam, lr in ((student_adam, 1e-3), (fake_adam, 3e-3)):
            adam.param_groups[0]["lr"] = lr * min(1.0, 2.5 * (1 - iteration / iterations))
        num_steps, step = tdm.draw_steps(batch, STEP_WEIGHTS, generator)
        noise = torch.randn(batch, 2, 1, 1, generator=generator)
        at = tdm.student_step(student, noise, conditioning(num_steps), step)
        fake_adam.zero_grad()
        tdm.fake_score_loss(fake_score, at, objective, generator).mean().backward()
        fake_adam.step()
        student_adam.zero_grad()
        tdm.student_loss(at, teacher, fake_score, UNCOND, objective, generator)[0].mean().backward()
        student_adam.step()

    num = 4096
    truth = CENTRES[torch.arange(num) % 6] + SPREAD * randn(num, 2, seed=7)
    noise = randn(num, 2, 1, 1, seed=8)
    for count in (4, 2, 1):
        cond = conditioning(torch.full((num,), count))
        distances = [
            sliced_wasserstein(sample(model, noise, student_timesteps(count), cond).view(-1, 2), truth)
            for model in (student, teacher)
        ]
        assert distances[0] < 0.75 * distances[1], f"{count} steps"
