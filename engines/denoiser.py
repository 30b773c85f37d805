"""What the sampler and the losses see of a diffusion network: noisy latents in, clean latents out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engines.schedule import NoiseSchedule, PredictionType


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the network is told besides the noisy latents.

    Attributes:
        text: (B, L, D) caption embedding, zero or arbitrary where `mask` is 0.
        mask: (B, L) 1 for real tokens, 0 for padding.
        num_steps: (B,) int64, how many steps the student takes in all; None for teachers.
    """

    text: Tensor
    mask: Tensor
    num_steps: Tensor | None = None

    def __len__(self) -> int:
        return self.text.shape[0]

    def rows(self, index: Tensor | slice) -> Conditioning:
        """Select rows of the batch."""
        num_steps = None if self.num_steps is None else self.num_steps[index]
        return Conditioning(self.text[index], self.mask[index], num_steps)

    def expand(self, batch: int) -> Conditioning:
        """Repeat a single row `batch` times, without copying; a full batch is returned as it is."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"cannot expand {len(self)} rows of conditioning to a batch of {batch}")
        num_steps = None if self.num_steps is None else self.num_steps.expand(batch)
        return Conditioning(self.text.expand(batch, -1, -1), self.mask.expand(batch, -1), num_steps)


def concat(conds: Sequence[Conditioning]) -> Conditioning:
    """Stack conditionings along the batch. Either all of them carry `num_steps` or none does."""
    steps = [cond.num_steps for cond in conds if cond.num_steps is not None]
    if steps and len(steps) != len(conds):
        raise ValueError("cannot concatenate conditionings with and without num_steps")
    return Conditioning(
        text=torch.cat([cond.text for cond in conds]),
        mask=torch.cat([cond.mask for cond in conds]),
        num_steps=torch.cat(steps) if steps else None,
    )


class Denoiser(Protocol):
    """A function from noisy latents to an estimate of the clean ones, and the noise levels it is for."""

    schedule: NoiseSchedule

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return x0, (B, C, h, w) fp32, for `latents` (B, C, h, w) at `timesteps` (B,) int64."""
        ...


def to_x0_eps(
    prediction: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """Convert a network's output into clean latents and noise, in fp32.

    epsilon: `x0 = (x - sigma eps) / alpha`. v (Salimans & Ho, arXiv:2202.00512): `x0 = alpha x - sigma v`,
    `eps = sigma x + alpha v`.

    Args:
        prediction, latents: (B, C, h, w), any float dtype.
        alpha, sigma: (B, 1, 1, 1) fp32. Alpha is never zero in a DDPM schedule, but 0.006 at the last
            timestep makes the x0 of an epsilon model 160 times noisier than its prediction.
    Returns:
        x0 and eps, each (B, C, h, w) fp32.
    """
    prediction, latents = prediction.float(), latents.float()
    if prediction_type == "epsilon":
        return (latents - sigma * prediction) / alpha, prediction
    return alpha * latents - sigma * prediction, sigma * latents + alpha * prediction


def x0_to_eps(x0: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that `latents` contain if `x0` is what lies beneath. Sigma must not be zero."""
    return (latents - alpha * x0) / sigma


class NetworkDenoiser:
    """A PixArt transformer as a `Denoiser`.

    The step count reaches the network only when it has a steps embedding, so a plain teacher can be asked
    with the student's conditioning.

    Args:
        transformer: a diffusers `PixArtTransformer2DModel`, made step-aware or not.
        schedule: noise levels on the transformer's device.
        autocast: run the network under autocast to this dtype; everything around it stays fp32.
    """

    def __init__(
        self, transformer: nn.Module, schedule: NoiseSchedule, *, autocast: torch.dtype | None = None
    ) -> None:
        self.transformer = transformer
        self.schedule = schedule
        self.autocast = autocast
        self.step_aware = is_step_aware(transformer)

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return self.x0_eps(latents, timesteps, cond)[0]

    def x0_eps(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Return clean latents and noise, each (B, C, h, w) fp32."""
        device = latents.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            prediction = self.predict(latents, timesteps, cond)
        alpha, sigma = self.schedule.at(timesteps)
        return to_x0_eps(prediction, latents, alpha, sigma, self.schedule.prediction_type)

    def predict(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Run the network and return its own prediction, (B, C, h, w), without a learned variance."""
        dtype = next(self.transformer.parameters()).dtype
        added = size_conditions(self.transformer, latents)
        if self.step_aware:
            added["num_steps"] = cond.num_steps
        sample: Tensor = self.transformer(
            latents.to(dtype),
            encoder_hidden_states=cond.text.to(dtype),
            timestep=timesteps,
            encoder_attention_mask=cond.mask,
            added_cond_kwargs=added,
        ).sample
        # published PixArt-alpha also predicts a variance, in a second half of its channels; DDIM needs none
        return sample[:, : latents.shape[1]]


def is_step_aware(transformer: nn.Module) -> bool:
    """Whether the transformer takes the step count as a condition (see `families.pixart.make_step_aware`)."""
    return any(name.endswith("steps_embedding.weight") for name, _ in transformer.named_parameters())


def size_conditions(
    transformer: nn.Module, latents: Tensor, *, pixels_per_cell: int = 8
) -> dict[str, Tensor | None]:
    """PixArt's micro-conditions, the picture's size and shape, for the 1024-pixel models trained with them.

    Args:
        latents: (B, C, h, w).
        pixels_per_cell: downsampling of the VAE.
    Returns:
        `resolution` (B, 2) and `aspect_ratio` (B, 1) in `latents`' dtype, or None for models without them.
    """
    config: Any = transformer.config
    enabled = config.use_additional_conditions
    if enabled is None:  # diffusers' own default
        enabled = config.sample_size == 128
    if not enabled:
        return {"resolution": None, "aspect_ratio": None}
    batch, _, h, w = latents.shape
    return {
        "resolution": latents.new_tensor([[h * pixels_per_cell, w * pixels_per_cell]]).expand(batch, 2),
        "aspect_ratio": latents.new_tensor([[h / w]]).expand(batch, 1),
    }
