"""The deterministic sampling loop, for few-step students and many-step teachers alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engines.denoiser import Conditioning, Denoiser, concat, x0_to_eps
from engines.schedule import CLEAN, NoiseSchedule

OnStep = Callable[[int, Tensor], None]
"""Called after step i (from 0) with that step's x0, (B, C, ...) fp32."""


def ddim_step(x0: Tensor, eps: Tensor, schedule: NoiseSchedule, next_timesteps: Tensor) -> Tensor:
    """Move to the next noise level along the probability-flow ODE (DDIM with eta 0, arXiv:2010.02502 Eq. 12).

    For flow models this is Euler's step.

    Args:
        x0, eps: (B, C, ...), the current prediction.
        next_timesteps: (B,) int64, each row its own; `CLEAN` gives x0.
    Returns:
        (B, C, ...) latents at `next_timesteps`.
    """
    alpha, sigma = schedule.at(next_timesteps, x0.ndim)
    return alpha * x0 + sigma * eps


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    latents: Tensor,
    timesteps: Sequence[int],
    cond: Conditioning,
    *,
    guidance_scale: float = 1.0,
    uncond: Conditioning | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Sample with DDIM: one denoiser call per timestep, of twice the batch when guided.

    A distilled student has the guidance in its weights and needs neither `guidance_scale` nor `uncond`.

    Args:
        latents: (B, C, ...) unit-variance noise.
        timesteps: strictly decreasing, see `student_timesteps`; the last step lands on clean latents.
        guidance_scale: classifier-free guidance, `x0 = x0_uncond + scale (x0_cond - x0_uncond)`.
        uncond: conditioning of the empty prompt, one row or B rows; needed when `guidance_scale` is not 1.
        on_step: told of every step, for previews and progress.
    Returns:
        (B, C, ...) fp32 clean latents, before the VAE's scaling.
    Raises:
        ValueError: `timesteps` are not strictly decreasing, or guidance without `uncond`.
    """
    if not timesteps or any(t <= s for t, s in zip(timesteps, [*timesteps[1:], CLEAN], strict=True)):
        raise ValueError(f"timesteps must decrease strictly and not be negative, got {list(timesteps)}")
    guided = guidance_scale != 1.0
    if guided and uncond is None:
        raise ValueError(
            f"guidance_scale {guidance_scale} needs uncond, the conditioning of the empty prompt"
        )

    batch = latents.shape[0]
    if guided and uncond is not None:
        cond = concat([cond, uncond.expand(batch)])
    latents = latents.float()
    for step, (timestep, next_timestep) in enumerate(zip(timesteps, [*timesteps[1:], CLEAN], strict=True)):
        now = torch.full((batch,), timestep, device=latents.device)
        if guided:
            x0_cond, x0_uncond = denoiser(torch.cat([latents, latents]), now.repeat(2), cond).chunk(2)
            x0 = x0_uncond + guidance_scale * (x0_cond - x0_uncond)
        else:
            x0 = denoiser(latents, now, cond)
        eps = x0_to_eps(x0, latents, *denoiser.schedule.at(now, latents.ndim))
        latents = ddim_step(x0, eps, denoiser.schedule, torch.full_like(now, next_timestep))
        if on_step is not None:
            on_step(step, x0)
    return latents
