"""Schedules, and denoisers of two weights: what comes of them can be worked out by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engines.denoiser import Conditioning
from engines.distill import trajectory
from engines.distill.ring import conditioning
from engines.distill.trajectory import StudentStep
from engines.schedule import NoiseSchedule, flow_schedule, student_timesteps

SCHEDULE = NoiseSchedule.from_config({"prediction_type": "v_prediction"})
T = SCHEDULE.num_timesteps
SCHEDULES = {
    "epsilon": NoiseSchedule.from_config({"prediction_type": "epsilon"}),
    "v_prediction": SCHEDULE,
    "flow": flow_schedule(1.0),
    "flow, shift 3": flow_schedule(3.0),
    "cogvideox": NoiseSchedule.from_config(
        {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 3.0,
        }
    ),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
UNCOND = Conditioning(torch.zeros(1, 1, 1), torch.ones(1, 1))
STEP_WEIGHTS = {4: 0.6, 2: 0.25, 1: 0.15}


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


def louder(at: StudentStep) -> StudentStep:
    """The same steps with an eps of five times the strength that noise has."""
    alpha, sigma = SCHEDULE.at(at.next_timesteps)
    return replace(at, eps=5 * at.eps, landing=alpha * at.x0.detach() + sigma * 5 * at.eps)


def grid(num_steps: Tensor) -> Tensor:
    """Timesteps of the even grids, one row per K in `num_steps`."""
    return trajectory.timestep_table({count: student_timesteps(count) for count in (1, 2, 3, 4, 8)})[
        num_steps
    ]


def any_student_step(batch: int = 6) -> tuple[Linear, StudentStep]:
    student = Linear(0.3, 0.1)
    num_steps, step = trajectory.draw_steps(batch, STEP_WEIGHTS, rng())
    noise = randn(batch, 3, 4, 4)
    return student, trajectory.student_step(student, noise, conditioning(num_steps), grid(num_steps), step)
