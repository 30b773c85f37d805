"""Trajectory Distribution Matching: the whole method, as pure functions.

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

Shapes: latents (B, C, h, w) fp32, timesteps (B,) int64, factors (B, 1, 1, 1) fp32. Every row of a batch may
have its own K and its own step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from engines.denoiser import Conditioning, Denoiser, concat, x0_to_eps
from engines.sampler import ddim_step
from engines.schedule import NoiseSchedule

FakeTarget = Literal["student_x0", "exact"]
FakeLoss = Literal["x0", "v"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The choices the method leaves open. Defaults follow the authors' script unless said otherwise.

    Attributes:
        guidance_scale: classifier-free guidance of the teacher, which the student absorbs. 1 distils the
            plain teacher.
        fake_target: what the fake score regresses, see `fake_target`.
        fake_loss: "v" weighs errors as an unweighted v loss does; "x0" is x0 with min(SNR, 5). The script
            has the second, the authors' flow-matching code the first: min-SNR all but ignores the noisiest
            steps.
        importance_weight: reweigh the fake score's loss as the script does; next to no effect on latents of
            many dimensions, see `importance_weight`.
        tau_floor: lowest tau; below it scores say nothing about content and 1 / sigma grows.
        tau_gap: distance of tau from the timestep at which the step starts.
        huber_c: scale at which the Pseudo-Huber distance turns from quadratic to linear; 0 means plain
            squares.
        min_normaliser: lower bound of the student loss's normaliser.
    """

    guidance_scale: float = 4.5
    fake_target: FakeTarget = "student_x0"
    fake_loss: FakeLoss = "v"
    importance_weight: bool = True
    tau_floor: int = 20
    tau_gap: int = 10
    huber_c: float = 1e-3
    min_normaliser: float = 1e-2

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by `config.DistillConfig`

    def __post_init__(self) -> None:
        if self.guidance_scale < 1.0 or self.huber_c < 0.0 or self.min_normaliser <= 0.0:
            raise ValueError(
                f"guidance_scale must be at least 1, huber_c not negative and min_normaliser positive, got "
                f"{self.guidance_scale}, {self.huber_c} and {self.min_normaliser}"
            )
        if self.tau_floor < 1 or self.tau_gap < 0:
            raise ValueError(
                f"tau_floor must be positive, tau_gap not negative, got {self.tau_floor} and {self.tau_gap}"
            )


# Trajectory


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


def step_ends(num_steps: Tensor, step: Tensor | int, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Timesteps t and s of a step: entries `step` and `step + 1` of `student_timesteps(K)`.

    Returns:
        t and s, each (B,) int64; s is `CLEAN` for the last step.
    """

    def entry(index: Tensor | int) -> Tensor:
        return (num_train_timesteps * (num_steps - index).double() / num_steps).round().long() - 1

    return entry(step), entry(step + 1)


@torch.no_grad()
def rollout(student: Denoiser, noise: Tensor, cond: Conditioning, step: Tensor) -> Tensor:
    """Sample each row with the student up to the input of its step: unguided, with the current weights.

    Rows drop out as they arrive, so a batch costs no more denoiser rows than its steps need.

    Args:
        noise: (B, C, h, w), unit variance.
        cond: carries `num_steps`, (B,).
        step: (B,) index of the step each row will train.
    Returns:
        (B, C, h, w) latents x_t.
    """
    latents = noise.clone()
    assert cond.num_steps is not None
    for index in range(int(step.max())):
        rows = (step > index).nonzero().squeeze(1)
        row_cond = cond.rows(rows)
        now, to = step_ends(cond.num_steps[rows], index, student.schedule.num_timesteps)
        x0 = student(latents[rows], now, row_cond)
        eps = x0_to_eps(x0, latents[rows], *student.schedule.at(now))
        latents[rows] = ddim_step(x0, eps, student.schedule, to)
    return latents


@dataclass(frozen=True, slots=True)
class StudentStep:
    """One student step per row: from `timesteps` (t) to `next_timesteps` (s).

    Attributes:
        x0: the student's prediction at x_t; the only tensor with a gradient.
        eps: the noise that belongs to it, detached.
        landing: x_s, detached.
    """

    x0: Tensor
    eps: Tensor
    landing: Tensor
    timesteps: Tensor
    next_timesteps: Tensor
    cond: Conditioning


def student_step(student: Denoiser, noise: Tensor, cond: Conditioning, step: Tensor) -> StudentStep:
    """Roll out to each row's step, then take that step with gradient. Arguments as `rollout`."""
    latents = rollout(student, noise, cond, step)
    assert cond.num_steps is not None
    timesteps, next_timesteps = step_ends(cond.num_steps, step, student.schedule.num_timesteps)
    x0 = student(latents, timesteps, cond)
    eps = x0_to_eps(x0.detach(), latents, *student.schedule.at(timesteps))
    landing = ddim_step(x0.detach(), eps, student.schedule, next_timesteps)
    return StudentStep(x0, eps, landing, timesteps, next_timesteps, cond)


# Forward process from a trajectory point


def draw_tau(timesteps: Tensor, next_timesteps: Tensor, objective: Objective, rng: torch.Generator) -> Tensor:
    """Draw tau evenly from the inside of each row's step: [max(floor, s + 1), t - gap).

    Starting above s keeps the kernel's b positive; the floor and the gap are those of the authors' script.

    Raises:
        ValueError: a step is too short for floor and gap.
    """
    low = (next_timesteps + 1).clamp(min=objective.tau_floor)
    span = timesteps - objective.tau_gap - low
    if bool((span < 1).any()):
        row = int(span.argmin())
        raise ValueError(
            f"no room for tau between timesteps {int(next_timesteps[row])} and {int(timesteps[row])} with "
            f"tau_floor {objective.tau_floor} and tau_gap {objective.tau_gap}: use fewer steps"
        )
    uniform = torch.rand(timesteps.shape, generator=rng, dtype=torch.float64).to(timesteps.device)
    return low + (uniform * span).long()


def transition_kernel(schedule: NoiseSchedule, source: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
    """The forward process from `source` to the noisier `tau`: q(x_tau | x_s) = N(a x_s, b^2).

    Not the clean-data kernel alpha_tau x + sigma_tau n, which would count the noise already in x_s twice.

    Returns:
        a and b, each (B, 1, 1, 1).
    """
    alpha_s, sigma_s = schedule.at(source)
    alpha, sigma = schedule.at(tau)
    a = alpha / alpha_s
    return a, (sigma**2 - (a * sigma_s) ** 2).clamp(min=0.0).sqrt()


@dataclass(frozen=True, slots=True)
class Query:
    """Where teacher and fake score are compared: `latents = a x_s + b noise`, at noise level tau."""

    latents: Tensor
    tau: Tensor
    noise: Tensor
    a: Tensor
    b: Tensor


def draw_query(at: StudentStep, schedule: NoiseSchedule, objective: Objective, rng: torch.Generator) -> Query:
    """Carry each row's landing point to a random tau of its step. No gradient passes through it."""
    tau = draw_tau(at.timesteps, at.next_timesteps, objective, rng)
    a, b = transition_kernel(schedule, at.next_timesteps, tau)
    noise = torch.randn(at.landing.shape, generator=rng).to(at.landing.device)
    return Query(a * at.landing + b * noise, tau, noise, a, b)


# Fake score


def fake_target(at: StudentStep, query: Query, schedule: NoiseSchedule, kind: FakeTarget) -> Tensor:
    """What the fake score should answer at the query.

    `student_x0` (Eq. 7 and the authors' script) is the x0 the point was made from. It has little variance,
    but its mean given x_tau is the wanted one only if the student's eps behaves like noise independent of
    its x0.

    `exact` is unbiased: the score of q(x_tau | x_s) is -n / b, and Tweedie's formula turns a score into the
    x0 `(x_tau + sigma^2 score) / alpha`. It differs from the other by (a sigma_s / alpha)(eps - (a sigma_s
    / b) n), which is zero on average for an eps as above, zero always for s = clean, and large where alpha
    is small: there it wants large batches or several fake updates, and `kernel_weight`.
    """
    if kind == "student_x0":
        return at.x0.detach()
    alpha, sigma = schedule.at(query.tau)
    return (query.latents - sigma**2 / query.b * query.noise) / alpha


def kernel_weight(b: Tensor) -> Tensor:
    """min(1, 10 b^2), which bounds the exact target's variance as tau nears s (arXiv:2510.27684)."""
    return (10.0 * b**2).clamp(max=1.0)


def importance_weight(at: StudentStep, query: Query, schedule: NoiseSchedule) -> Tensor:
    """Tempered ratio q(x_tau | x0) / q(x_tau | x_s), (B, 1, 1, 1).

    It moves the fake score's training from points drawn around x_s to points drawn around x0. The exponents
    are means over the dimensions, as in the authors' script: the true ratio to the power 1 / d, hence close
    to one.
    """
    sigma_s = schedule.at(at.next_timesteps)[1]
    sigma = schedule.at(query.tau)[1]
    total_noise = (query.a * sigma_s * at.eps + query.b * query.noise) / sigma
    return (0.5 * (query.noise.square() - total_noise.square()).mean(dim=(1, 2, 3), keepdim=True)).exp()


def fake_weight(schedule: NoiseSchedule, tau: Tensor, kind: FakeLoss) -> Tensor:
    """Weight of a squared x0 error at tau, (B, 1, 1, 1).

    "v": 1 / sigma^2, which makes it a squared v error. "x0": min(SNR, 5) (Hang et al., arXiv:2303.09556).
    """
    alpha, sigma = schedule.at(tau)
    if kind == "v":
        return sigma**-2
    return (alpha / sigma).square().clamp(max=5.0)


def fake_score_loss(
    fake_score: Denoiser, at: StudentStep, objective: Objective, rng: torch.Generator
) -> Tensor:
    """Denoising loss of the fake score on the student's trajectory points (Eq. 7).

    Returns:
        (B,) loss per row, with a gradient for the fake score alone.
    """
    schedule = fake_score.schedule
    query = draw_query(at, schedule, objective, rng)
    target = fake_target(at, query, schedule, objective.fake_target)
    weight = fake_weight(schedule, query.tau, objective.fake_loss)
    if objective.fake_target == "exact":
        weight = weight * kernel_weight(query.b)
    elif objective.importance_weight:
        weight = weight * importance_weight(at, query, schedule)
    error = fake_score(query.latents, query.tau, at.cond) - target
    return (weight * error.square()).mean(dim=(1, 2, 3))


# Student


@torch.no_grad()
def teacher_x0(
    teacher: Denoiser, query: Query, cond: Conditioning, uncond: Conditioning, guidance_scale: float
) -> Tensor:
    """The teacher's guided x0 at the query; prompt and empty prompt in one call."""
    cond = replace(cond, num_steps=None)  # a step count means nothing to a teacher
    if guidance_scale == 1.0:
        return teacher(query.latents, query.tau, cond)
    both = concat([cond, uncond.expand(len(cond))])
    with_prompt, without = teacher(query.latents.repeat(2, 1, 1, 1), query.tau.repeat(2), both).chunk(2)
    return without + guidance_scale * (with_prompt - without)


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
    normaliser = (x0.detach() - x0_real).abs().mean(dim=(1, 2, 3)).clamp(min=objective.min_normaliser)
    if objective.huber_c == 0.0:
        distance = 0.5 * (x0 - target).square()
    else:
        distance = ((x0 - target).square() + objective.huber_c**2).sqrt() - objective.huber_c
    return distance.mean(dim=(1, 2, 3)) / normaliser, normaliser


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
    query = draw_query(at, teacher.schedule, objective, rng)
    x0_real = teacher_x0(teacher, query, at.cond, uncond, objective.guidance_scale)
    with torch.no_grad():
        x0_fake = fake_score(query.latents, query.tau, at.cond)
    return surrogate_loss(at.x0, x0_real, x0_fake, objective)
