"""Trajectory Distribution Matching: the method as pure functions.

Luo et al., "Learning Few-Step Diffusion Models by Trajectory Distribution Matching", arXiv:2503.06674 (ICCV
2025). Equation numbers are those of its second version.

Three networks share one architecture, and start as copies of the first:

    teacher     frozen; asked for its x0 at single points, with guidance, never rolled out
    student     the few-step sampler; one deterministic (DDIM) step leads to the next point of its trajectory
    fake_score  tracks the distribution of the student's points; plain denoising, no guidance

A K-step student visits K + 1 noise levels. Take one of its steps, from timestep t to the next one s, with

    x0, eps = student(x_t),  x_s = alpha_s x0 + sigma_s eps    (`student_step`)

If the student is right, x_s is distributed like the teacher's own diffusion at s. The test of that is made
at a random tau between s and t, where x_s is carried by the *forward* process, not by re-noising x0 as DMD2
does:

    x_tau = a x_s + b n,  a = alpha_tau / alpha_s,  b^2 = sigma_tau^2 - a^2 sigma_s^2    (`transition_kernel`)

There the fake score learns where the student is (Eq. 7), the teacher says where it should be, and the
difference of the two is the gradient of KL(student || teacher) at tau (Eq. 5). It enters the student
through x0, as a regression towards a target moved by that difference (Eq. 6). Gradients pass through one
student step only. No images are used.

Steps do not share noise levels, so tau alone tells the fake score which step it looks at; one network
serves all of them without blending their distributions (Eq. 9). Trajectories of different K do overlap: K
is therefore a condition of student and fake score ("sampling-steps-aware", TDM-unify), and one student
samples in any of the trained K.

All of it is written in (alpha, sigma) and x0, so that one objective serves models that predict eps, v or a
flow's velocity: `NoiseSchedule` and `to_x0_eps` know the difference, nothing here does.

This module has the losses; `trajectory` has the student's steps, `forward` the points where teacher and fake
score are asked, `objective` what is left open. They share the conventions below.

Shapes: latents (B, C, ...) fp32, images (B, C, h, w) or videos (B, C, F, h, w) or (B, F, C, h, w) alike;
timesteps (B,) int64; factors (B, 1, ...) fp32. Every row of a batch may have its own K and its own step.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from engines.denoiser import Conditioning, Denoiser, concat, x0_to_eps
from engines.distill.forward import Query, draw_query, matched, row_mean
from engines.distill.objective import FakeLoss, FakeTarget, Objective
from engines.distill.trajectory import StudentStep
from engines.sampler import ddim_step
from engines.schedule import CLEAN, NoiseSchedule

# Fake score


def fake_target(at: StudentStep, query: Query, schedule: NoiseSchedule, kind: FakeTarget) -> Tensor:
    """What the fake score should answer at the query.

    `student_x0` (Eq. 7 and the authors' script) is the x0 the point was made from. It has little variance,
    but its mean given x_tau is the wanted one only if the student's eps behaves like noise independent of
    its x0.

    `exact` is unbiased: the score of q(x_tau | x_s) is -n / b, and Tweedie's formula turns a score into an
    x0, here `(x_s - (a sigma_s^2 / b) n) / alpha_s`. It differs from the other by (sigma_s / alpha_s) (eps -
    (a sigma_s / b) n), which is zero on average for an eps as above, zero always for s = clean, and large
    where alpha_s is small or tau near s: there it wants large batches or several fake updates, and
    `kernel_weight`.
    """
    if kind == "student_x0":
        return at.x0.detach()
    alpha_s, sigma_s = schedule.at(at.next_timesteps, at.landing.ndim)
    return (at.landing - query.a * sigma_s**2 / query.b * query.noise) / alpha_s


def kernel_weight(b: Tensor) -> Tensor:
    """min(1, 10 b^2), which bounds the exact target's variance as tau nears s (arXiv:2510.27684)."""
    return (10.0 * b**2).clamp(max=1.0)


def importance_weight(at: StudentStep, query: Query, schedule: NoiseSchedule) -> Tensor:
    """Tempered ratio q(x_tau | x0) / q(x_tau | x_s), (B, 1, ...).

    It moves the fake score's training from points drawn around x_s to points drawn around x0. The exponents
    are means over the dimensions, as in the authors' script: the true ratio to the power 1 / d, hence close
    to one.
    """
    sigma_s = schedule.at(at.next_timesteps, at.landing.ndim)[1]
    sigma = schedule.at(query.tau, at.landing.ndim)[1]
    total_noise = (query.a * sigma_s * at.eps + query.b * query.noise) / sigma
    return (0.5 * row_mean(query.noise.square() - total_noise.square())).exp().view_as(query.b)


def fake_weight(schedule: NoiseSchedule, tau: Tensor, kind: FakeLoss, ndim: int = 4) -> Tensor:
    """Weight of a squared x0 error at tau, (B, 1, ...).

    "v": 1 / sigma^2, which makes it a squared error of v, or of a flow's velocity. "x0": min(SNR, 5) (Hang et
    al., arXiv:2303.09556).
    """
    alpha, sigma = schedule.at(tau, ndim)
    if kind == "v":
        return sigma**-2
    return (alpha / sigma).square().clamp(max=5.0)


def fake_score_loss(
    fake_score: Denoiser,
    at: StudentStep,
    objective: Objective,
    rng: torch.Generator,
    *,
    teacher: Denoiser | None = None,
) -> Tensor:
    """Denoising loss of the fake score on the student's trajectory points (Eq. 7).

    Args:
        teacher: needed when `objective.fake_anchor` is not zero.
    Returns:
        (B,) loss per row, with a gradient for the fake score alone.
    """
    schedule, at = fake_score.schedule, matched(at, objective)
    query = draw_query(at, schedule, objective, rng)
    target = fake_target(at, query, schedule, objective.fake_target)
    plain = fake_weight(schedule, query.tau, objective.fake_loss, query.latents.ndim)
    weight = plain
    if objective.fake_target == "exact":
        weight = weight * kernel_weight(query.b)
    elif objective.importance_weight:
        weight = weight * importance_weight(at, query, schedule)
    x0 = fake_score(query.latents, query.tau, at.cond)
    loss = row_mean(weight * (x0 - target).square())
    if objective.fake_anchor > 0.0:
        assert teacher is not None, "fake_anchor without a teacher"
        with torch.no_grad():
            anchor = teacher(query.latents, query.tau, replace(at.cond, num_steps=None))
        loss = loss + objective.fake_anchor * row_mean(plain * (x0 - anchor).square())
    return loss


@torch.no_grad()
def pull_fake_score(fake_score: nn.Module, student: nn.Module, share: float) -> None:
    """Move the fake score's weights a `share` of the way to the student's (SenseFlow, arXiv:2506.00523).

    Both are denoisers of the same architecture, and the fake score follows the student's distribution.
    """
    theirs = dict(student.named_parameters())
    for name, parameter in fake_score.named_parameters():
        parameter.lerp_(theirs[name].to(parameter.dtype), share)


# Student


def guided_x0(
    teacher: Denoiser, query: Query, cond: Conditioning, uncond: Conditioning, guidance_scale: float
) -> Tensor:
    """The teacher's guided x0 at the query; prompt and empty prompt in one call."""
    cond = replace(cond, num_steps=None)  # a step count means nothing to a teacher
    if guidance_scale == 1.0:
        return teacher(query.latents, query.tau, cond)
    both = concat([cond, uncond.expand(len(cond))])
    latents = torch.cat([query.latents, query.latents])
    with_prompt, without = teacher(latents, query.tau.repeat(2), both).chunk(2)
    return without + guidance_scale * (with_prompt - without)


@torch.no_grad()
def teacher_x0(
    teacher: Denoiser,
    at: StudentStep,
    query: Query,
    uncond: Conditioning,
    objective: Objective,
    rng: torch.Generator,
) -> Tensor:
    """Where the teacher would have the student go.

    With a shared tau that is `guided_x0`. Else it is the teacher's unguided x0 at tau, which shields from
    drifting off the data, plus `(scale - 1) (x0_prompt - x0_empty)` read at a tau of its own, which is what
    drives the student towards the prompt (decoupled DMD, arXiv:2511.22677).
    """
    scale = objective.guidance_scale
    if objective.guidance_tau == "shared" or scale == 1.0:
        return guided_x0(teacher, query, at.cond, uncond, scale)
    cond = replace(at.cond, num_steps=None)
    other = draw_query(at, teacher.schedule, objective, rng, later=objective.guidance_tau == "later")
    plain, with_prompt, without = teacher(
        torch.cat([query.latents, other.latents, other.latents]),
        torch.cat([query.tau, other.tau, other.tau]),
        concat([cond, cond, uncond.expand(len(cond))]),
    ).chunk(3)
    return plain + (scale - 1.0) * (with_prompt - without)


def surrogate_loss(
    x0: Tensor, x0_real: Tensor, x0_fake: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Regression whose gradient is the normalised difference of scores (Eq. 6, Pseudo-Huber form).

    The target is x0 moved by what separates teacher from fake score. Divided by the mean distance of
    student and teacher, as in DMD (arXiv:2311.18828), so that every tau pulls with like strength. With
    `huber_c` 0 the gradient with respect to x0 is exactly DMD's, (x0_fake - x0_real) / normaliser.

    Args:
        x0: the student's, with gradient.
        x0_real, x0_fake: the teacher's (guided) and the fake score's, at the query.
    Returns:
        (B,) loss per row, and the (B,) normaliser.
    """
    target = x0.detach() + (x0_real - x0_fake)
    normaliser = row_mean((x0.detach() - x0_real).abs()).clamp(min=objective.min_normaliser)
    if objective.huber_c == 0.0:
        distance = 0.5 * (x0 - target).square()
    else:
        distance = ((x0 - target).square() + objective.huber_c**2).sqrt() - objective.huber_c
    return row_mean(distance) / normaliser, normaliser


def fisher_loss(
    at: StudentStep,
    teacher: Denoiser,
    fake_score: Denoiser,
    uncond: Conditioning,
    objective: Objective,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Fisher divergence of student and teacher at tau, in SiD's form (arXiv:2404.04057, Eq. 23, alpha 1).

    With f the teacher's x0 and g the fake score's, both at x_tau, the loss is `(f - g) . (f - x0)` less
    `|f - g|^2`, that is `(f - g) . (g - x0)`. The fake score is not the exact score of the current student;
    SiD found that the full correction pays. Gradients reach the student through x_tau as well as x0, hence
    through both networks.
    """
    schedule, ndim = teacher.schedule, at.x0.ndim
    query = draw_query(at, schedule, objective, rng)
    alpha_s, sigma_s = schedule.at(at.next_timesteps, ndim)
    alpha_t, sigma_t = schedule.at(at.timesteps, ndim)
    # d x_s / d x0 with x_t fixed, since eps = (x_t - alpha_t x0) / sigma_t
    slope = query.a * (alpha_s - sigma_s * alpha_t / sigma_t)
    latents = query.latents + slope * (at.x0 - at.x0.detach())
    moved = replace(query, latents=latents)
    real = guided_x0(teacher, moved, at.cond, uncond, objective.guidance_scale)
    fake = fake_score(latents, query.tau, at.cond)
    normaliser = row_mean((at.x0 - real).detach().abs()).clamp(min=objective.min_normaliser)
    return row_mean((real - fake) * (fake - at.x0)) / normaliser, normaliser


def connecting_x0(
    schedule: NoiseSchedule, latents: Tensor, timesteps: Tensor, landing: Tensor, next_timesteps: Tensor
) -> Tensor:
    """The x0 with which one DDIM step leads from `latents` to `landing` (arXiv:2202.00512, Appendix G)."""
    alpha_t, sigma_t = schedule.at(timesteps, latents.ndim)
    alpha_s, sigma_s = schedule.at(next_timesteps, latents.ndim)
    return (landing - sigma_s / sigma_t * latents) / (alpha_s - sigma_s / sigma_t * alpha_t)


@torch.no_grad()
def diversity_target(
    at: StudentStep, rows: Tensor, teacher: Denoiser, uncond: Conditioning, objective: Objective
) -> Tensor:
    """The x0 that takes these rows where the teacher's guided sub-steps take them, (len(rows), C, ...)."""
    schedule, ndim, cond = teacher.schedule, at.x0.ndim, at.cond.rows(rows)
    t, s = at.timesteps[rows], at.next_timesteps[rows]
    alpha, sigma = schedule.at(t, ndim)
    start = latents = alpha * at.x0.detach()[rows] + sigma * at.eps[rows]
    zero = torch.zeros_like(latents)
    for index in range(objective.diversity_substeps):
        now, to = (t + (s - t) * place // objective.diversity_substeps for place in (index, index + 1))
        x0 = guided_x0(teacher, Query(latents, now, zero, zero, zero), cond, uncond, objective.guidance_scale)
        latents = ddim_step(x0, x0_to_eps(x0, latents, *schedule.at(now, ndim)), schedule, to)
    return connecting_x0(schedule, start, t, latents, s)


def diversity_loss(
    at: StudentStep, teacher: Denoiser, uncond: Conditioning, objective: Objective, normaliser: Tensor
) -> Tensor:
    """Squared distance of each first step's x0 to that of the teacher's own way, (B,); zero for other steps.

    A regression on noise-to-picture pairs keeps every mode but blurs, so it is asked of first steps alone,
    whose landing is noisy still, and never of a step that ends at clean latents.

    Args:
        normaliser: (B,) of the row's `surrogate_loss`, so that both pull with like strength.
    """
    loss = torch.zeros_like(normaliser)
    rows = (at.first & (at.next_timesteps != CLEAN)).nonzero().squeeze(1)
    if len(rows) == 0:
        return loss
    target = diversity_target(at, rows, teacher, uncond, objective)
    squares = row_mean(0.5 * (at.x0[rows] - target).square()) / normaliser[rows]
    return loss.index_put((rows,), squares)


def student_loss(
    at: StudentStep,
    teacher: Denoiser,
    fake_score: Denoiser,
    uncond: Conditioning,
    objective: Objective,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Loss of the student at a fresh query: down where the fake score is, up where the teacher is.

    Args:
        uncond: the empty prompt, one row.
    Returns:
        (B,) loss per row, with a gradient for the student alone, and the (B,) mean distance of student and
        teacher.
    """
    points = matched(at, objective)
    if objective.divergence == "fisher":
        loss, normaliser = fisher_loss(points, teacher, fake_score, uncond, objective, rng)
    else:
        query = draw_query(points, teacher.schedule, objective, rng)
        x0_real = teacher_x0(teacher, points, query, uncond, objective, rng)
        with torch.no_grad():
            x0_fake = fake_score(query.latents, query.tau, at.cond)
        loss, normaliser = surrogate_loss(at.x0, x0_real, x0_fake, objective)
    if objective.diversity > 0.0:
        loss = loss + objective.diversity * diversity_loss(at, teacher, uncond, objective, normaliser)
    return loss, normaliser
