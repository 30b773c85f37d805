"""The losses of TDM: what the fake score learns, what the student learns, and what keeps it diverse."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engines.denoiser import Conditioning, x0_to_eps
from engines.distill import forward, tdm, trajectory
from engines.distill.forward import Query
from engines.distill.objective import Divergence, FakeLoss, FakeTarget, GuidanceTau, Objective
from engines.distill.ring import RingDenoiser, conditioning
from engines.distill.trajectory import StudentStep
from engines.sampler import ddim_step
from engines.schedule import CLEAN, NoiseSchedule
from tests.engines.by_hand import (
    SCHEDULE,
    UNCOND,
    Linear,
    any_student_step,
    each_schedule,
    grid,
    louder,
    randn,
    rng,
)

# Fake score


def test_exact_target_at_a_clean_landing_is_the_students_x0() -> None:
    _, at = any_student_step()
    at = replace(at, next_timesteps=torch.full_like(at.timesteps, CLEAN), landing=at.x0.detach())
    query = forward.draw_query(at, SCHEDULE, Objective(), rng(2))
    target = tdm.fake_target(at, query, SCHEDULE, "exact")
    assert torch.equal(tdm.fake_target(at, query, SCHEDULE, "student_x0"), at.x0)
    alpha, sigma = SCHEDULE.at(query.tau)
    torch.testing.assert_close(target, at.x0.detach())
    tweedie = (query.latents - sigma**2 / query.b * query.noise) / alpha
    torch.testing.assert_close(alpha * target, alpha * tweedie, atol=1e-5, rtol=1e-4)


def test_only_the_exact_target_learns_the_score_of_points_off_the_marginal() -> None:
    """Landing points N(0, 0.2^2), which no x0 with independent noise could have made: sigma_s is larger."""
    batch, now, to, tau = 400_000, 499, 249, 320
    landing = 0.2 * randn(batch, 1, 1, 1, seed=3)
    alpha_s, sigma_s = SCHEDULE.at(torch.tensor([to]))
    x0 = landing / (alpha_s + sigma_s)  # a student whose eps equals its x0
    ends = torch.full((batch,), now), torch.full((batch,), to)
    at = StudentStep(x0, x0, landing, *ends, conditioning(torch.full((batch,), 4)), ends[0] < 0)
    a, b = forward.transition_kernel(SCHEDULE, ends[1], torch.full((batch,), tau))
    noise = randn(batch, 1, 1, 1, seed=4)
    query = Query(a * landing + b * noise, torch.full((batch,), tau), noise, a, b)

    def fitted_score(kind: FakeTarget) -> float:
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
    at = StudentStep(
        x0, eps, alpha_s * x0 + sigma_s * eps, now, to, conditioning(torch.full((batch,), 4)), now < 0
    )
    weight = tdm.importance_weight(at, forward.draw_query(at, SCHEDULE, Objective(), rng(6)), SCHEDULE)
    torch.testing.assert_close(weight, torch.ones(batch, 1, 1, 1), atol=0.03, rtol=0)


def test_importance_weight_is_the_tempered_ratio_of_the_kernels_from_x0_and_from_the_landing_point() -> None:
    """exp(-|z|^2 / 2d) of the one, over that of the other."""
    at = louder(any_student_step()[1])
    query = forward.draw_query(at, SCHEDULE, Objective(), rng(6))
    alpha, sigma = SCHEDULE.at(query.tau)
    of_x0 = (query.latents - alpha * at.x0.detach()) / sigma
    of_landing = (query.latents - query.a * at.landing) / query.b
    d = at.x0[0].numel()
    wanted = (-of_x0.square().sum((1, 2, 3)) / (2 * d)).exp() / (
        -of_landing.square().sum((1, 2, 3)) / (2 * d)
    ).exp()
    assert wanted.max() / wanted.min() > 1.5
    found = tdm.importance_weight(at, query, SCHEDULE)
    torch.testing.assert_close(found, wanted.view(-1, 1, 1, 1), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("target", ["student_x0", "exact"])
@pytest.mark.parametrize("loss", ["x0", "v"])
@pytest.mark.parametrize("importance", [False, True])
def test_fake_scores_loss_is_its_weighted_error_at_the_query(
    target: FakeTarget, loss: FakeLoss, importance: bool
) -> None:
    at = louder(any_student_step(batch=32)[1])
    objective = Objective(fake_target=target, fake_loss=loss, importance_weight=importance)
    fake_score = Linear(0.2, 0.0)
    rows = tdm.fake_score_loss(fake_score, at, objective, rng(3))
    query = forward.draw_query(at, SCHEDULE, objective, rng(3))
    error = fake_score(query.latents, query.tau, at.cond) - tdm.fake_target(at, query, SCHEDULE, target)
    weight = tdm.fake_weight(SCHEDULE, query.tau, loss)
    if target == "exact":
        bounds = 10.0 * query.b**2
        assert bounds.min() < 1.0 < bounds.max()
        weight = weight * torch.minimum(bounds, torch.ones_like(bounds))
    elif importance:
        weight = weight * tdm.importance_weight(at, query, SCHEDULE)
    torch.testing.assert_close(rows, (weight * error**2).mean(dim=(1, 2, 3)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("target", ["student_x0", "exact"])
@pytest.mark.parametrize("loss", ["x0", "v"])
def test_fake_score_loss_trains_the_fake_score_alone(target: FakeTarget, loss: FakeLoss) -> None:
    student, at = any_student_step()
    fake_score = Linear(0.2, 0.0)
    rows = tdm.fake_score_loss(fake_score, at, Objective(fake_target=target, fake_loss=loss), rng(3))
    assert rows.shape == (6,)
    rows.mean().backward()
    assert fake_score.gain.grad is not None
    assert student.gain.grad is None


def test_anchor_adds_the_distance_from_the_teacher() -> None:
    _, at = any_student_step()
    fake_score, teacher = Linear(0.2, 0.0), Linear(0.2, 0.5)
    plain = tdm.fake_score_loss(fake_score, at, Objective(), rng(3))
    anchored = tdm.fake_score_loss(fake_score, at, Objective(fake_anchor=0.1), rng(3), teacher=teacher)
    query = forward.draw_query(at, SCHEDULE, Objective(), rng(3))
    weight = tdm.fake_weight(SCHEDULE, query.tau, "v").flatten()
    torch.testing.assert_close(anchored - plain, 0.1 * 0.25 * weight, atol=1e-4, rtol=1e-3)


class Listener(Linear):
    """Keeps what it was asked: timesteps and step counts of each call."""

    def __init__(self, gain: float, shift: float, prompt_shift: float = 0.0) -> None:
        super().__init__(gain, shift, prompt_shift)
        self.taus: list[Tensor] = []
        self.told: list[Tensor | None] = []

    def forward(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        self.taus.append(timesteps)
        self.told.append(cond.num_steps)
        return super().forward(latents, timesteps, cond)


@pytest.mark.parametrize("divergence", ["kl", "fisher"])
def test_fake_score_is_told_the_steps_of_each_row_and_the_teacher_is_not(
    divergence: Divergence,
) -> None:
    """Trajectories of different K overlap: only K tells the fake score which one a point lies on."""
    _, at = any_student_step(batch=16)
    assert at.cond.num_steps is not None
    assert len(at.cond.num_steps.unique()) == 3
    fake_score, teacher = Listener(0.2, 0.0), Listener(0.2, 0.5)
    objective = Objective(fake_anchor=0.1, guidance_scale=2.0, divergence=divergence)
    tdm.fake_score_loss(fake_score, at, objective, rng(3), teacher=teacher)
    tdm.student_loss(at, teacher, fake_score, UNCOND, objective, rng(3))
    assert [steps is not None and torch.equal(steps, at.cond.num_steps) for steps in fake_score.told] == [
        True,
        True,
    ]
    assert teacher.told == [None, None]


def test_pulled_fake_score_is_between_itself_and_the_student() -> None:
    fake_score, student = Linear(0.0, 1.0), Linear(1.0, 3.0)
    tdm.pull_fake_score(fake_score, student, 0.25)
    assert fake_score.gain.item() == 0.25
    assert fake_score.shift.item() == 1.5
    assert student.gain.item() == 1.0


# Student


@pytest.mark.parametrize("divergence", ["kl", "fisher"])
def test_student_has_no_gradient_when_fake_score_equals_an_unguided_teacher(
    divergence: Divergence,
) -> None:
    student, at = any_student_step()
    twin = Linear(0.2, 0.4)
    objective = Objective(guidance_scale=1.0, divergence=divergence)
    rows, _ = tdm.student_loss(at, twin, twin, UNCOND, objective, rng(3))
    rows.mean().backward()
    assert student.gain.grad is not None
    assert student.gain.grad.item() == 0.0
    assert student.shift.grad is not None
    assert student.shift.grad.item() == 0.0


@pytest.mark.parametrize("guidance_tau", ["shared", "own", "later"])
def test_decoupled_guidance_adds_what_shared_guidance_adds_where_it_is_the_same_everywhere(
    guidance_tau: GuidanceTau,
) -> None:
    _, at = any_student_step()
    teacher = Linear(0.2, 0.4, prompt_shift=1.0)
    objective = Objective(guidance_scale=3.0, guidance_tau=guidance_tau)
    query = forward.draw_query(at, SCHEDULE, objective, rng(3))
    x0 = tdm.teacher_x0(teacher, at, query, UNCOND, objective, rng(4))
    torch.testing.assert_close(x0, 0.2 * query.latents + 0.4 + 3.0)


@pytest.mark.parametrize("guidance_tau", ["own", "later"])
def test_decoupled_guidance_is_read_at_another_tau(guidance_tau: GuidanceTau) -> None:
    num_steps, step = torch.full((512,), 4), torch.full((512,), 2)  # from 499 to 249
    noise = torch.zeros(512, 1, 1, 1)
    at = trajectory.student_step(Linear(0.3, 0.1), noise, conditioning(num_steps), grid(num_steps), step)
    teacher = Listener(0.2, 0.4, prompt_shift=1.0)
    objective = Objective(guidance_scale=3.0, guidance_tau=guidance_tau)
    query = forward.draw_query(at, SCHEDULE, objective, rng(3))
    tdm.teacher_x0(teacher, at, query, UNCOND, objective, rng(4))
    shared, with_prompt, without = teacher.taus[0].chunk(3)
    assert torch.equal(shared, query.tau)
    assert torch.equal(with_prompt, without)
    assert (with_prompt == shared).float().mean() < 0.1
    assert with_prompt.min() > 249
    assert 480 <= with_prompt.max() < 499 if guidance_tau == "own" else with_prompt.max() > 950


def test_fisher_loss_is_that_of_sid() -> None:
    """(f - g)(f - x0) less |f - g|^2, over the mean distance of x0 and f (arXiv:2404.04057, Eq. 23)."""
    _, at = any_student_step()
    teacher, fake_score = Linear(0.2, 0.5, prompt_shift=0.3), Linear(0.6, 0.1)
    objective = Objective(guidance_scale=2.0, divergence="fisher")
    rows, normaliser = tdm.student_loss(at, teacher, fake_score, UNCOND, objective, rng(5))
    query = forward.draw_query(at, SCHEDULE, objective, rng(5))
    f = 0.2 * query.latents + 0.5 + 2.0 * 0.3
    g, x0 = 0.6 * query.latents + 0.1, at.x0
    distance = (x0 - f).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(normaliser, distance)
    wanted = ((f - g) * (f - x0) - (f - g) ** 2).mean(dim=(1, 2, 3)) / distance
    torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=1e-4)


def test_fisher_gradient_is_the_derivative_through_the_landing_point() -> None:
    """Against finite differences, with teacher and fake score that answer x_tau with different slopes."""
    teacher, fake_score, objective = Linear(0.2, 0.5), Linear(0.6, 0.1), Objective(guidance_scale=1.0)
    objective = replace(objective, divergence="fisher", min_normaliser=1e3)
    num_steps, step = torch.tensor([4, 4, 2]), torch.tensor([0, 2, 1])
    now, to = trajectory.step_ends(grid(num_steps), step)
    x0, latents = randn(3, 1, 2, 2, seed=1).double(), randn(3, 1, 2, 2, seed=2).double()

    def loss(x0: Tensor) -> Tensor:
        eps = x0_to_eps(x0.detach(), latents, *SCHEDULE.at(now))
        alpha_s, sigma_s = SCHEDULE.at(to)
        landing = alpha_s * x0.detach() + sigma_s * eps
        at = StudentStep(x0, eps, landing, now, to, conditioning(num_steps), now < 0)
        return tdm.student_loss(at, teacher, fake_score, UNCOND, objective, rng(5))[0].sum()

    x0.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x0), x0)
    nudge = 1e-4 * torch.eye(12, dtype=torch.float64).view(12, 3, 1, 2, 2)
    with torch.no_grad():
        numeric = torch.stack([loss(x0 + one) - loss(x0 - one) for one in nudge]) / 2e-4
    torch.testing.assert_close(gradient.flatten(), numeric, atol=1e-9, rtol=1e-3)


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
    at = trajectory.student_step(student, noise, cond, grid(num_steps), torch.zeros_like(num_steps))
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


def test_pseudo_huber_is_quadratic_below_its_scale_and_linear_above() -> None:
    x0 = torch.ones(3, 1, 1, 2, requires_grad=True)
    differences = torch.tensor([1e-5, 3e-3, 2.0]).view(3, 1, 1, 1).expand(3, 1, 1, 2)
    real = torch.full_like(x0, 1.5)
    rows, normaliser = tdm.surrogate_loss(x0, real, real - differences, Objective(huber_c=1e-3))
    assert normaliser.tolist() == [0.5, 0.5, 0.5]
    # sqrt(d^2 + c^2) - c, of which float32 has four digits
    assert rows.tolist()[1:] == pytest.approx([(math.sqrt(10) - 1) * 1e-3 / 0.5, 1.999 / 0.5], rel=1e-4)
    rows.sum().backward()
    assert x0.grad is not None
    slopes = -0.5 * 2 * x0.grad[:, 0, 0, 0]  # of the distance: d / sqrt(d^2 + c^2)
    assert slopes.tolist() == pytest.approx([1e-2, 3 / math.sqrt(10), 1.0], rel=1e-2)


def test_normaliser_is_bounded_below() -> None:
    x0 = torch.ones(2, 1, 2, 2, requires_grad=True)
    rows, normaliser = tdm.surrogate_loss(x0, x0.detach(), x0.detach() + 1e-3, Objective(min_normaliser=0.05))
    assert normaliser.tolist() == pytest.approx([0.05, 0.05])
    assert bool(rows.isfinite().all())


# Diversity


@each_schedule
def test_connecting_x0_undoes_a_ddim_step(schedule: NoiseSchedule) -> None:
    now, to = torch.tensor([900, 700, 400]), torch.tensor([600, 200, CLEAN])
    latents, x0 = randn(3, 2, 4, 4), randn(3, 2, 4, 4, seed=1)
    eps = x0_to_eps(x0, latents, *schedule.at(now))
    landing = ddim_step(x0, eps, schedule, to)
    torch.testing.assert_close(
        tdm.connecting_x0(schedule, latents, now, landing, to), x0, rtol=1e-3, atol=1e-4
    )


def test_diversity_is_asked_of_first_steps_that_end_in_noise() -> None:
    teacher, objective = RingDenoiser(SCHEDULE), Objective(guidance_scale=1.0, diversity=0.5)
    num_steps, step = torch.tensor([4, 4, 2, 1]), torch.tensor([0, 1, 0, 0])
    cond = conditioning(num_steps)
    at = trajectory.student_step(Linear(0.3, 0.1), randn(4, 2, 1, 1), cond, grid(num_steps), step)
    loss = tdm.diversity_loss(at, teacher, UNCOND, objective, torch.ones(4))
    assert (loss > 0).tolist() == [True, False, True, False]
    loss.sum().backward()

    # one sub-step: the target is the teacher's own x0; a student that has it loses nothing
    once = Objective(guidance_scale=1.0, diversity=0.5, diversity_substeps=1)
    at = trajectory.student_step(teacher, randn(4, 2, 1, 1), cond, grid(num_steps), step)
    assert tdm.diversity_loss(at, teacher, UNCOND, once, torch.ones(4)).abs().max() < 1e-6


def test_diversitys_target_leads_where_the_guided_teachers_substeps_lead() -> None:
    teacher = Linear(0.2, 0.4, prompt_shift=0.5)
    objective = Objective(guidance_scale=3.0, diversity=0.5, diversity_substeps=3)
    num_steps, step = torch.tensor([4, 2]), torch.tensor([0, 0])
    noise = randn(2, 3, 4, 4)
    at = trajectory.student_step(Linear(0.3, 0.1), noise, conditioning(num_steps), grid(num_steps), step)
    target = tdm.diversity_target(at, torch.arange(2), teacher, UNCOND, objective)
    for row, times in enumerate([[999, 915, 832, 749], [999, 832, 665, 499]]):
        latents = noise[row : row + 1]
        for now, to in itertools.pairwise(times):
            x0 = 0.2 * latents + 0.4 + 3.0 * 0.5
            eps = x0_to_eps(x0, latents, *SCHEDULE.at(torch.tensor([now])))
            latents = ddim_step(x0, eps, SCHEDULE, torch.tensor([to]))
        start = SCHEDULE.at(torch.tensor([999]))
        eps = x0_to_eps(target[row : row + 1], noise[row : row + 1], *start)
        reached = ddim_step(target[row : row + 1], eps, SCHEDULE, torch.tensor(times[-1:]))
        torch.testing.assert_close(reached, latents, atol=1e-4, rtol=1e-3)


def test_diversity_is_added_with_its_weight_and_pulls_as_strongly_as_the_rest() -> None:
    _, at = any_student_step()
    teacher, fake_score = Linear(0.2, 0.4), Linear(0.25, 0.0)
    plain, with_diversity = (
        tdm.student_loss(
            at, teacher, fake_score, UNCOND, Objective(guidance_scale=1.0, diversity=weight), rng(3)
        )
        for weight in (0.0, 0.5)
    )
    torch.testing.assert_close(plain[1], with_diversity[1])
    alone = tdm.diversity_loss(at, teacher, UNCOND, Objective(guidance_scale=1.0), torch.ones(6))
    assert (alone > 0).any()
    torch.testing.assert_close(with_diversity[0] - plain[0], 0.5 * alone / plain[1], atol=1e-5, rtol=1e-3)
