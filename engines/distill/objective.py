"""What Trajectory Distribution Matching leaves open, see `tdm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
