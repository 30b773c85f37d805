"""TDM as one would write it first: three whole networks in float32, and PyTorch's defaults for the rest.

It computes what the paper says, in the order of the authors' demo, and without waste: the rollout, the
teacher and the fake score's answer to the student build no graph, and each learner's graph is gone before the
other's is made. What it lacks is what this project's trainer does about memory: bfloat16 arithmetic, gradient
checkpointing, and adapters on one frozen base. It keeps no average of the weights.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from engines.denoiser import Conditioning, NetworkDenoiser, concat
from engines.distill.config import DistillConfig
from engines.distill.prompts import PromptBank
from engines.distill.student import Teacher, student_bucket
from engines.schedule import CLEAN


@dataclass(frozen=True, slots=True)
class _Point:
    """A student's step per row, and its landing point carried to tau."""

    x0: Tensor
    tau: Tensor
    latents: Tensor


class NaiveTrainer:
    """Teacher, student and fake score side by side.

    Args:
        config: gives batch size, learning rates, step count, guidance, and the Huber scale; its settings for
            precision, memory, adapters and averages are not looked at.
        teacher: in float32.
    """

    def __init__(self, config: DistillConfig, teacher: Teacher, bank: PromptBank) -> None:
        self.config = config
        self.schedule = teacher.schedule
        self.device = next(teacher.network.parameters()).device
        self.bank = bank
        self.uncond = bank.uncond.to(self.device)
        self.networks = {
            "teacher": teacher.network,
            "student": copy.deepcopy(teacher.network).train().requires_grad_(True),
            "fake_score": copy.deepcopy(teacher.network).train().requires_grad_(True),
        }
        self.teacher, self.student, self.fake_score = (
            NetworkDenoiser(network, teacher.schedule, teacher.family.predict)
            for network in self.networks.values()
        )
        rates = {"student": config.student_lr, "fake_score": config.fake_lr}
        self.optimizers = {
            name: torch.optim.AdamW(
                self.networks[name].parameters(),
                lr=rate,
                betas=config.betas,
                weight_decay=config.weight_decay,
            )
            for name, rate in rates.items()
        }
        _, self.shape = student_bucket(config, teacher.family)
        visited = config.student_timesteps(self.schedule.num_timesteps)[config.default_num_steps]
        self.grid = torch.tensor([*visited, CLEAN], device=self.device)

    def step(self) -> None:
        """One iteration: the fake score, then the student, on the same trajectories."""
        batch = self.config.batch_size
        cond = self.bank.draw(batch, torch.default_generator).to(self.device)
        inputs = self._rollout(torch.randn(batch, *self.shape, device=self.device), cond)
        with torch.no_grad():
            at = self._draw(inputs, cond)
        self._update("fake_score", self._fake_score_loss(at, cond))
        self._update("student", self._student_loss(self._draw(inputs, cond), cond))

    @torch.no_grad()
    def _rollout(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """What the student is given at each of its steps, (K, B, ...)."""
        inputs = [noise]
        for index in range(len(self.grid) - 2):
            now, after = (self.grid[i].expand(len(noise)) for i in (index, index + 1))
            inputs.append(self._land(*self.student.x0_eps(inputs[-1], now, cond), after))
        return torch.stack(inputs)

    def _land(self, x0: Tensor, eps: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self.schedule.at(timesteps, x0.ndim)
        return alpha * x0 + sigma * eps

    def _draw(self, inputs: Tensor, cond: Conditioning) -> _Point:
        num_steps, batch = inputs.shape[:2]
        step = torch.randint(num_steps, (batch,), device=self.device)
        t, s = self.grid[step], self.grid[step + 1]
        x0, eps = self.student.x0_eps(inputs[step, torch.arange(batch, device=self.device)], t, cond)
        low = (s + 1).clamp(min=self.config.objective.tau_floor)
        span = t - self.config.objective.tau_gap - low
        tau = low + (torch.rand(batch, device=self.device) * span).long()
        alpha_s, sigma_s = self.schedule.at(s, x0.ndim)
        alpha, sigma = self.schedule.at(tau, x0.ndim)
        a = alpha / alpha_s
        b = (sigma**2 - (a * sigma_s) ** 2).clamp(min=0.0).sqrt()
        landing = self._land(x0, eps, s).detach()
        return _Point(x0, tau, a * landing + b * torch.randn_like(landing))

    def _fake_score_loss(self, at: _Point, cond: Conditioning) -> Tensor:
        alpha, sigma = self.schedule.at(at.tau, at.x0.ndim)
        weight = (alpha / sigma).square().clamp(max=5.0)
        return (weight * (self.fake_score(at.latents, at.tau, cond) - at.x0).square()).mean()

    def _student_loss(self, at: _Point, cond: Conditioning) -> Tensor:
        objective = self.config.objective
        with torch.no_grad():
            both = concat([replace(cond, num_steps=None), self.uncond.expand(len(cond))])
            with_prompt, without = self.teacher(
                at.latents.repeat(2, *[1] * (at.latents.ndim - 1)), at.tau.repeat(2), both
            ).chunk(2)
            real = without + objective.guidance_scale * (with_prompt - without)
            target = at.x0 + real - self.fake_score(at.latents, at.tau, cond)
            distance = (at.x0 - real).abs().flatten(1).mean(1).clamp(min=objective.min_normaliser)
        error = at.x0 - target
        huber = (error.square() + objective.huber_c**2).sqrt() - objective.huber_c
        return (huber.flatten(1).mean(1) / distance).mean()

    def _update(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks[name].parameters(), self.config.clip_norm)
        optimizer.step()
