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

All of it is written in (alpha, sigma) and x0, so that one objective serves models that predict eps, v or a
flow's velocity: `NoiseSchedule` and `to_x0_eps` know the difference, nothing here does.

Shapes: latents (B, C, ...) fp32, images (B, C, h, w) or videos (B, C, F, h, w) or (B, F, C, h, w) alike;
timesteps (B,) int64; factors (B, 1, ...) fp32. Every row of a batch may have its own K and its own step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from engines.denoiser import Conditioning, Denoiser, concat, x0_to_eps
from engines.distill import draws
from engines.sampler import ddim_step
from engines.schedule import CLEAN, NoiseSchedule

FakeTarget = Literal["student_x0", "exact"]
FakeLoss = Literal["x0", "v"]
Points = Literal["trajectory", "clean"]
Intervals = Literal["separate", "overlapping"]
Divergence = Literal["kl", "fisher"]
GuidanceTau = Literal["shared", "own", "later"]


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
        fake_anchor: pull of the fake score towards the teacher, 0.02 in the authors' flow-matching code; 0
            leaves it out.
        points: what is matched with the teacher. "trajectory": the noisy points x_s, carried forward by the
            transition kernel, which is TDM. "clean": the predictions x0, noised anew as DMD2 does
            (arXiv:2405.14867); the paper's first ablation.
        intervals: "separate": tau from inside the step, so that tau tells the steps apart. "overlapping":
            from the step's end up to the noisiest timestep, as the authors' flow-matching code has it; one
            fake score then answers for several steps at once.
        random_landing: end each trained step at a random point of its interval instead of the next grid
            point, the script's `use_randmid`.
        divergence: what is minimised at tau: reverse KL, or the Fisher divergence (SiD, arXiv:2404.04057),
            which needs gradients through teacher and fake score.
        guidance_tau: where the guidance part of the teacher's gradient is read (arXiv:2511.22677): at tau,
            at a tau of its "own" from the same interval, or at a "later" one, anywhere noisier than s.
        diversity: weight of a regression of each trajectory's first step towards where many steps of the
            teacher lead from the same noise, see `diversity_loss`. Reverse KL forgets modes; the first step
            decides which one a noise goes to.
        diversity_substeps: the teacher's guided steps within that first step.
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
    fake_anchor: float = 0.0
    points: Points = "trajectory"
    intervals: Intervals = "separate"
    random_landing: bool = False
    divergence: Divergence = "kl"
    guidance_tau: GuidanceTau = "shared"
    diversity: float = 0.0
    diversity_substeps: int = 3
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
        if self.fake_anchor < 0.0:
            raise ValueError(f"fake_anchor must not be negative, got {self.fake_anchor}")
        if self.points == "clean" and self.random_landing:
            raise ValueError('points "clean" do not depend on where a step lands: random_landing must be off')
        if self.divergence == "fisher" and self.guidance_tau != "shared":
            raise ValueError('divergence "fisher" compares scores at one tau: guidance_tau must be "shared"')
        if self.diversity < 0.0 or self.diversity_substeps < 1:
            raise ValueError(
                "diversity must not be negative, diversity_substeps at least 1, got "
                f"{self.diversity} and {self.diversity_substeps}"
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


# Forward process from a trajectory point


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
