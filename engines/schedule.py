"""Noise levels of a diffusion or flow model, and the timesteps a few-step student visits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction"]

CLEAN = -1
"""The timestep of noise-free latents: alpha 1, sigma 0. It is where the last step of every sampler lands."""

_REFUSED = {
    "trained_betas": "give beta_start, beta_end and beta_schedule",
    "use_dynamic_shifting": "give a fixed shift",
    "shift_terminal": "give a fixed shift",
    "invert_sigmas": "sigma has to rise with the timestep",
    "use_karras_sigmas": "few-step students choose their own timesteps",
    "use_exponential_sigmas": "few-step students choose their own timesteps",
    "use_beta_sigmas": "few-step students choose their own timesteps",
}


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """Noise levels `x_t = alpha_t x_0 + sigma_t eps` of the timesteps t = 0 ... T - 1, ever noisier.

    Diffusion (DDPM) models are variance-preserving, `alpha^2 + sigma^2 = 1`. Flow models (rectified flow,
    arXiv:2209.03003) have `alpha = 1 - sigma`; timesteps divide their time evenly before it is shifted.

    Attributes:
        alphas: (T,) fp32, falling with the timestep; may end at zero.
        sigmas: (T,) fp32, positive, rising with the timestep.
        prediction_type: what the network was trained to output.
        network_times: (T,) fp32, how the network is told each timestep, or None if by its number.
    """

    alphas: Tensor
    sigmas: Tensor
    prediction_type: PredictionType
    network_times: Tensor | None = None

    def __post_init__(self) -> None:
        if self.alphas.ndim != 1 or self.alphas.shape != self.sigmas.shape:
            raise ValueError(
                f"alphas and sigmas must be two (T,) tensors, got {tuple(self.alphas.shape)} and "
                f"{tuple(self.sigmas.shape)}"
            )
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"prediction_type must be one of {get_args(PredictionType)}, got {self.prediction_type!r}"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Build the schedule from a diffusers scheduler config (`scheduler/scheduler_config.json`).

        Which solver the config names does not matter, only the noise levels its model was trained with:
        betas, CogVideoX's `snr_shift_scale`, `rescale_betas_zero_snr`; or flow matching with its `shift`.

        Raises:
            ValueError: a setting this module does not implement, with its name and value.
        """
        for setting, remedy in _REFUSED.items():
            if config.get(setting):
                raise ValueError(f"scheduler {setting}={config[setting]!r} is not supported: {remedy}")
        if is_flow(config):
            return flow_schedule(
                float(config.get("shift", config.get("flow_shift", 1.0))),
                int(config.get("num_train_timesteps", 1000)),
            )
        alpha_bar = _alpha_bar(config)
        return cls(
            alphas=alpha_bar.sqrt().float(),
            sigmas=(1.0 - alpha_bar).sqrt().float(),
            prediction_type=cast("PredictionType", config.get("prediction_type", "epsilon")),
        )

    @property
    def num_timesteps(self) -> int:
        return self.alphas.shape[0]

    def at(self, timesteps: Tensor, ndim: int = 4) -> tuple[Tensor, Tensor]:
        """Look up the noise levels of a batch.

        Args:
            timesteps: (B,) int64 in [0, T), or `CLEAN` (-1) for noise-free latents.
            ndim: of the latents they are for.
        Returns:
            alpha and sigma, each (B, 1, ..., 1) fp32 with `ndim` dimensions.
        """
        clean = timesteps < 0
        index = timesteps.clamp(min=0)
        alpha = torch.where(clean, 1.0, self.alphas[index])
        sigma = torch.where(clean, 0.0, self.sigmas[index])
        shape = (-1, *[1] * (ndim - 1))
        return alpha.view(shape), sigma.view(shape)

    def network_time(self, timesteps: Tensor) -> Tensor:
        """What the network is told at `timesteps` (B,): their number, or for flow models 1000 sigma."""
        return timesteps if self.network_times is None else self.network_times[timesteps]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        times = None if self.network_times is None else self.network_times.to(device)
        return NoiseSchedule(self.alphas.to(device), self.sigmas.to(device), self.prediction_type, times)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler config belongs to a flow-matching model."""
    return (
        str(config.get("_class_name", "")).startswith("FlowMatch")
        or config.get("prediction_type") == "flow_prediction"
        or bool(config.get("use_flow_sigmas", False))
    )


def flow_schedule(shift: float = 1.0, num_timesteps: int = 1000) -> NoiseSchedule:
    """Noise levels of a flow model: `sigma = shift u / (1 + (shift - 1) u)` with `u = (t + 1) / T`.

    The shift of Stable Diffusion 3 (arXiv:2403.03206, Eq. 23), as diffusers' flow-matching Euler applies it.

    Raises:
        ValueError: `shift` is not positive.
    """
    if shift <= 0.0:
        raise ValueError(f"scheduler shift must be positive, got {shift}")
    u = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
    sigmas = shift * u / (1.0 + (shift - 1.0) * u)
    return NoiseSchedule(
        alphas=(1.0 - sigmas).float(),
        sigmas=sigmas.float(),
        prediction_type="flow_prediction",
        network_times=(num_timesteps * sigmas).float(),
    )


def _alpha_bar(config: Mapping[str, Any]) -> Tensor:
    """`alpha_bar` of a DDPM config, (T,) float64: a product of a thousand factors close to one."""
    num_timesteps = int(config.get("num_train_timesteps", 1000))
    beta_start = float(config.get("beta_start", 1e-4))
    beta_end = float(config.get("beta_end", 0.02))
    beta_schedule = config.get("beta_schedule", "linear")
    if beta_schedule == "linear":
        betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
    elif beta_schedule == "scaled_linear":
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
    elif beta_schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal, arXiv:2102.09672, Eq. 17
        time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        wanted = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
        betas = (1.0 - wanted[1:] / wanted[:-1]).clamp(max=0.999)
    else:
        raise ValueError(
            "scheduler beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', got "
            f"{beta_schedule!r}"
        )
    alpha_bar = torch.cumprod(1.0 - betas, dim=0)
    snr_shift = float(config.get("snr_shift_scale", 1.0))
    alpha_bar = alpha_bar / (snr_shift + (1.0 - snr_shift) * alpha_bar)  # SNR divided by the shift
    if config.get("rescale_betas_zero_snr", False):
        if config.get("prediction_type", "epsilon") == "epsilon":
            raise ValueError(
                "scheduler rescale_betas_zero_snr=true with prediction_type 'epsilon': noise alone says "
                "nothing about x0 where alpha is zero"
            )
        root = alpha_bar.sqrt()  # Lin et al., arXiv:2305.08891, Algorithm 1
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return alpha_bar


def student_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Return the timesteps of a `num_steps`-step sampler, evenly spaced back from the last ("trailing").

    4 steps of 1000 are [999, 749, 499, 249]; after the last one the sampler lands on `CLEAN`. Diffusers' DDIM
    with `timestep_spacing="trailing"` visits the same ones, its flow-matching Euler the same noise levels.

    Args:
        num_train_timesteps: of which the grid is made. Fewer than the schedule has start the student at less
            than full noise: the authors train the epsilon model PixArt-alpha from 899.
    Raises:
        ValueError: `num_steps` is not in [1, num_train_timesteps].
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps must be between 1 and {num_train_timesteps}, got {num_steps}")
    return [round(num_train_timesteps * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]
