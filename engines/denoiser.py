"""What the sampler and the losses see of a diffusion network: noisy latents in, clean latents out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from engines.schedule import NoiseSchedule, PredictionType


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the network is told besides the noisy latents.

    Attributes:
        text: (B, L, D) caption embedding, zero or arbitrary where `mask` is 0.
        mask: (B, L) 1 for tokens that the network may look at, 0 for padding; all ones in families whose
            networks look at padding too.
        num_steps: (B,) int64, how many steps the student takes in all; None for teachers.
        pooled: (B, P) one vector for the whole caption, in families that have it; else None.
    """

    text: Tensor
    mask: Tensor
    num_steps: Tensor | None = None
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return self.text.shape[0]

    def rows(self, index: Tensor | slice) -> Conditioning:
        """Select rows of the batch."""
        return self._each(lambda tensor: tensor[index])

    def expand(self, batch: int) -> Conditioning:
        """Repeat a single row `batch` times, without copying; a full batch is returned as it is."""
        if len(self) == batch:
            return self
        if len(self) != 1:
            raise ValueError(f"cannot expand {len(self)} rows of conditioning to a batch of {batch}")
        return self._each(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def to(self, device: torch.device | str) -> Conditioning:
        """Move to a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            text=change(self.text),
            mask=change(self.mask),
            num_steps=None if self.num_steps is None else change(self.num_steps),
            pooled=None if self.pooled is None else change(self.pooled),
        )


def concat(conds: Sequence[Conditioning]) -> Conditioning:
    """Stack conditionings along the batch. All of them carry `num_steps` or none does; so for `pooled`."""
    return Conditioning(
        text=torch.cat([cond.text for cond in conds]),
        mask=torch.cat([cond.mask for cond in conds]),
        num_steps=_concat_optional("num_steps", [cond.num_steps for cond in conds]),
        pooled=_concat_optional("pooled", [cond.pooled for cond in conds]),
    )


def _concat_optional(name: str, tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if present and len(present) != len(tensors):
        raise ValueError(f"cannot concatenate conditionings with and without {name}")
    return torch.cat(present) if present else None


class Denoiser(Protocol):
    """A function from noisy latents to an estimate of the clean ones, and the noise levels it is for."""

    schedule: NoiseSchedule

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Return x0, (B, C, ...) fp32, for `latents` (B, C, ...) at `timesteps` (B,) int64."""
        ...


def to_x0_eps(
    prediction: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """Convert a network's output into clean latents and noise, in fp32.

    epsilon: `x0 = (x - sigma eps) / alpha`. v (Salimans & Ho, arXiv:2202.00512): `x0 = alpha x - sigma v`,
    `eps = sigma x + alpha v`. Flow, where the network predicts `eps - x0`: `x0 = x - sigma v`,
    `eps = x + alpha v`.

    Args:
        prediction, latents: (B, C, ...), any float dtype.
        alpha, sigma: (B, 1, ...) fp32. Epsilon models need a positive alpha; its usual 0.006 at the last
            timestep makes their x0 160 times noisier than their prediction.
    Returns:
        x0 and eps, each (B, C, ...) fp32.
    """
    prediction, latents = prediction.float(), latents.float()
    if prediction_type == "epsilon":
        return (latents - sigma * prediction) / alpha, prediction
    if prediction_type == "flow_prediction":
        return latents - sigma * prediction, latents + alpha * prediction
    return alpha * latents - sigma * prediction, sigma * latents + alpha * prediction


def x0_to_eps(x0: Tensor, latents: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that `latents` contain if `x0` is what lies beneath. Sigma must not be zero."""
    return (latents - alpha * x0) / sigma


Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
"""A family's call of its network: (network, latents, times, cond) -> its own prediction, without a learned
variance, of the latents' shape. `times` (B,) is what `NoiseSchedule.network_time` says."""


class NetworkDenoiser:
    """A network of any family as a `Denoiser`.

    The step count reaches the network only when it has a steps embedding, so a plain teacher can be asked
    with the student's conditioning.

    Args:
        network: the family's network, made step-aware or not.
        schedule: noise levels on the network's device.
        predict: the family's `FamilySpec.predict`.
        autocast: run the network under autocast to this dtype; everything around it stays fp32.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        predict: Predict,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.network = network
        self.schedule = schedule
        self.autocast = autocast
        self.step_aware = is_step_aware(network)
        self._predict: Predict = predict

    def __call__(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return self.x0_eps(latents, timesteps, cond)[0]

    def x0_eps(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """Return clean latents and noise, each of the latents' shape, fp32."""
        device = latents.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            prediction = self.predict(latents, timesteps, cond)
        alpha, sigma = self.schedule.at(timesteps, latents.ndim)
        return to_x0_eps(prediction, latents, alpha, sigma, self.schedule.prediction_type)

    def call_through(self, module: nn.Module) -> None:
        """Call the network through a wrapper of it from now on: (latents, times, cond) -> prediction."""
        self._predict = lambda _, latents, times, cond: module(latents, times, cond)

    def predict(self, latents: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        """Run the network and return its own prediction, of the latents' shape, without a variance."""
        return self._predict(self.network, latents, self.schedule.network_time(timesteps), cond)


def is_step_aware(network: nn.Module) -> bool:
    """Whether the network takes the step count as a condition (see `FamilySpec.make_step_aware`)."""
    return any(name.endswith("steps_embedding.weight") for name, _ in network.named_parameters())
