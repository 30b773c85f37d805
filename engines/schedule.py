"""Noise levels of a variance-preserving (DDPM) model, and the timesteps a few-step student visits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction"]

CLEAN = -1
"""The timestep of noise-free latents: alpha 1, sigma 0. It is where the last step of every sampler lands."""


@dataclass(frozen=True, slots=True)
class NoiseSchedule:
    """Variance-preserving noise levels: `x_t = alpha_t x_0 + sigma_t eps` with `alpha_t**2 + sigma_t**2 = 1`.

    Attributes:
        alphas: (T,) fp32, `sqrt(alpha_bar)`, falling with the timestep.
        sigmas: (T,) fp32, `sqrt(1 - alpha_bar)`, rising with the timestep.
        prediction_type: what the network was trained to output.
    """

    alphas: Tensor
    sigmas: Tensor
    prediction_type: PredictionType

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

        Raises:
            ValueError: a setting this module does not implement, with its name and value.
        """
        if config.get("trained_betas") is not None:
            raise ValueError(
                "scheduler trained_betas is not supported: give beta_start, beta_end and beta_schedule"
            )
        if config.get("rescale_betas_zero_snr", False):
            raise ValueError("scheduler rescale_betas_zero_snr=true is not supported")
        num_timesteps = int(config.get("num_train_timesteps", 1000))
        beta_start = float(config.get("beta_start", 1e-4))
        beta_end = float(config.get("beta_end", 0.02))
        beta_schedule = config.get("beta_schedule", "linear")
        # float64 until the end: alpha_bar is a product of a thousand factors close to one
        if beta_schedule == "linear":
            betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        elif beta_schedule == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64) ** 2
        else:
            raise ValueError(
                f"scheduler beta_schedule must be 'linear' or 'scaled_linear', got {beta_schedule!r}"
            )
        alpha_bar = torch.cumprod(1.0 - betas, dim=0)
        return cls(
            alphas=alpha_bar.sqrt().float(),
            sigmas=(1.0 - alpha_bar).sqrt().float(),
            prediction_type=cast("PredictionType", config.get("prediction_type", "epsilon")),
        )

    @property
    def num_timesteps(self) -> int:
        return self.alphas.shape[0]

    def at(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Look up the noise levels of a batch.

        Args:
            timesteps: (B,) int64 in [0, T), or `CLEAN` (-1) for noise-free latents.
        Returns:
            alpha and sigma, each (B, 1, 1, 1) fp32.
        """
        clean = timesteps < 0
        index = timesteps.clamp(min=0)
        alpha = torch.where(clean, 1.0, self.alphas[index])
        sigma = torch.where(clean, 0.0, self.sigmas[index])
        return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(self.alphas.to(device), self.sigmas.to(device), self.prediction_type)


def student_timesteps(num_steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Return the timesteps of a `num_steps`-step sampler, evenly spaced back from the last ("trailing").

    4 steps of 1000 are [999, 749, 499, 249]; after the last one the sampler lands on `CLEAN`. Diffusers' DDIM
    with `timestep_spacing="trailing"` visits the same ones.

    Raises:
        ValueError: `num_steps` is not in [1, num_train_timesteps].
    """
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(f"num_steps must be between 1 and {num_train_timesteps}, got {num_steps}")
    return [round(num_train_timesteps * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]
