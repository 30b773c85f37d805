"""The distillation loop: teacher and prompts in, student out."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from rich.console import Console
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.denoiser import Conditioning, NetworkDenoiser
from engines.distill import tdm
from engines.distill.checkpoint import TrainingState, latest_checkpoint, load_checkpoint, save_checkpoint
from engines.distill.config import DistillConfig
from engines.distill.log import RunLog
from engines.distill.prompts import PromptBank, load_prompt_bank
from engines.distill.student import latent_shape, load_teacher, num_parameters, step_aware_copy, write_student
from engines.errors import ConfigError, TrainingError
from engines.families.pixart import STEPS_EMBEDDING_KEY
from engines.schedule import NoiseSchedule

AUTOCAST = {"none": None, "bfloat16": torch.bfloat16}
FINAL_LR_FACTOR = 0.05
SEED_STRIDE = 1_000_003
"""Iterations before the next seed's draws repeat. Torch seeds its generators from the low 32 bits alone."""


def distill(config: DistillConfig, console: Console) -> Path:
    """Run a distillation to its end, from its newest checkpoint if it has one.

    Returns:
        The student's directory, `config.out / "student"`.
    Raises:
        CheckpointError: the teacher or a checkpoint cannot be used.
        ConfigError: prompts cannot be read, or a K leaves no room between its steps.
        TrainingError: a loss or gradient is not finite.
        KeyboardInterrupt: SIGINT or SIGTERM came; the iteration was finished and saved.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = torch.device(
        config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    teacher, schedule = load_teacher(config.teacher)
    console.print(f"teacher {config.teacher}: {num_parameters(teacher) / 1e6:.1f} M parameters, on {device}")
    bank = load_prompt_bank(config, device)
    console.print(f"{len(bank.prompts)} prompts of {bank.max_tokens} tokens")
    trainer = Trainer(config, teacher.to(device), schedule.to(device), bank)
    checkpoints = config.out / "checkpoints"
    newest = latest_checkpoint(checkpoints)
    if newest is not None:
        load_checkpoint(newest, trainer.state, config.numerics())
        console.print(f"resuming after iteration {trainer.state.iteration}")
    trainer.train(console)
    student = config.out / "student"
    write_student(
        student,
        config,
        trainer.student.transformer,
        trainer.state.average,
        max_text_tokens=bank.max_tokens,
        training={
            "method": "tdm",
            "settings": config.numerics(),
            "train_seconds": round(trainer.state.train_seconds, 1),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
        },
    )
    return student


class Trainer:
    """The three networks, their optimizers, and one iteration of Algorithm 1 (arXiv:2503.06674)."""

    def __init__(
        self,
        config: DistillConfig,
        teacher: PixArtTransformer2DModel,
        schedule: NoiseSchedule,
        bank: PromptBank,
    ) -> None:
        _check_steps(config, schedule)
        self.config = config
        self.bank = bank
        self.device = next(teacher.parameters()).device
        self.shape = latent_shape(teacher)
        self.uncond = _to(bank.uncond, self.device)
        autocast = AUTOCAST[config.autocast]
        copies = [
            step_aware_copy(teacher, max(config.num_steps), zero_row=config.default_num_steps).train()
            for _ in range(2)
        ]
        self.teacher = NetworkDenoiser(teacher, schedule, autocast=autocast)
        self.student, self.fake_score = (
            NetworkDenoiser(copy, schedule, autocast=autocast) for copy in copies
        )
        networks = {"student": copies[0], "fake_score": copies[1]}
        rates = {"student": config.student_lr, "fake_score": config.fake_lr}
        self.state = TrainingState(
            networks=networks,
            optimizers={name: make_optimizer(networks[name], rates[name], config) for name in networks},
            average={key: value.detach().clone() for key, value in copies[0].named_parameters()},
        )
        self.meter = Meter(config)

    def train(self, console: Console) -> None:
        """Iterate to the end, with progress, metrics and checkpoints."""
        config, state = self.config, self.state
        settings, checkpoints = config.numerics(), config.out / "checkpoints"
        log = RunLog(
            config.out, state.iteration, config.iterations, tensorboard=config.tensorboard, console=console
        )
        with log, _attention(self.device), _stop_signals() as stop:
            while state.iteration < config.iterations:
                started = time.perf_counter()
                try:
                    self.step()
                except TrainingError:
                    save_checkpoint(checkpoints, state, settings, config.keep_checkpoints)
                    raise
                state.iteration += 1
                state.train_seconds += time.perf_counter() - started
                log.advance()
                finished = state.iteration == config.iterations
                if state.iteration % config.log_every == 0 or finished:
                    log.report(self.meter.flush(state))
                if state.iteration % config.checkpoint_every == 0 or finished or stop:
                    path = save_checkpoint(checkpoints, state, settings, config.keep_checkpoints)
                    log.say(f"saved {path}")
                if stop and not finished:
                    raise KeyboardInterrupt

    def step(self) -> None:
        """One iteration: roll out, update the fake score at the landing points, then the student."""
        config, state = self.config, self.state
        rng = torch.Generator().manual_seed(config.seed * SEED_STRIDE + state.iteration)
        factor = lr_factor(state.iteration, config)
        cond = self.bank.draw(config.batch_size, rng)
        noise = torch.randn(config.batch_size, *self.shape, generator=rng).to(self.device)
        num_steps, step = tdm.draw_steps(config.batch_size, config.num_steps, rng)
        cond = _to(replace(cond, num_steps=num_steps), self.device)
        at = tdm.student_step(self.student, noise, cond, step.to(self.device))
        # the fake score first: the student needs its view of where the student is now
        for _ in range(config.fake_updates - 1):
            self._update_fake_score(at, factor, rng)
        fake_rows, fake_norm = self._update_fake_score(at, factor, rng)
        student_rows, distance = tdm.student_loss(
            at, self.teacher, self.fake_score, self.uncond, config.objective, rng
        )
        student_norm = self._update("student", student_rows.mean(), factor)
        update_average(state, self.student.transformer, config.ema_decay)
        self.meter.add(num_steps, step, fake_rows, student_rows, distance, fake_norm, student_norm)

    def _update_fake_score(
        self, at: tdm.StudentStep, factor: float, rng: torch.Generator
    ) -> tuple[Tensor, float]:
        rows = tdm.fake_score_loss(self.fake_score, at, self.config.objective, rng)
        return rows, self._update("fake_score", rows.mean(), factor)

    def _update(self, name: str, loss: Tensor, factor: float) -> float:
        """Clip and apply one gradient.

        Raises:
            TrainingError: loss or gradient is not finite; nothing was changed.
        """
        network, optimizer = self.state.networks[name], self.state.optimizers[name]
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(network.parameters(), self.config.clip_norm))
        if not math.isfinite(norm) or not math.isfinite(loss.item()):
            raise TrainingError(
                f"{name}: loss {loss.item()}, gradient norm {norm} in iteration {self.state.iteration + 1}; "
                "the weights are saved. Lower student_lr or fake_lr, or raise objective.min_normaliser"
            )
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        return norm


class Meter:
    """Averages over the iterations between two reports, the losses also per step of each K."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self.labels = [f"{count}.{step + 1}" for count in sorted(config.num_steps) for step in range(count)]
        self._first = {count: self.labels.index(f"{count}.1") for count in config.num_steps}
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(4, len(self.labels), dtype=torch.float64)
        self._norms = torch.zeros(2, dtype=torch.float64)
        self._iterations = 0
        self._started = time.perf_counter()

    def add(
        self,
        num_steps: Tensor,
        step: Tensor,
        fake_rows: Tensor,
        student_rows: Tensor,
        distance: Tensor,
        fake_norm: float,
        student_norm: float,
    ) -> None:
        """Add one iteration: per row its K, step, both losses and distance of student and teacher."""
        first = torch.tensor([self._first[int(count)] for count in num_steps])
        rows = (
            torch.stack([torch.ones_like(fake_rows), fake_rows, student_rows, distance])
            .detach()
            .cpu()
            .double()
        )
        self._sums.index_add_(1, first + step, rows)
        self._norms += torch.tensor([fake_norm, student_norm])
        self._iterations += 1

    def flush(self, state: TrainingState) -> dict[str, object]:
        """Return the averages, ready for JSON, and start anew."""
        count, fake, student, distance = self._sums
        seconds = (time.perf_counter() - self._started) / self._iterations
        metrics: dict[str, object] = {
            "iteration": state.iteration,
            "fake_loss": _round(fake.sum() / count.sum()),
            "student_loss": _round(student.sum() / count.sum()),
            "fake_grad_norm": _round(self._norms[0] / self._iterations),
            "student_grad_norm": _round(self._norms[1] / self._iterations),
            "lr_factor": round(lr_factor(state.iteration - 1, self.config), 5),
            "seconds_per_iteration": round(seconds, 4),
            "eta_s": round(seconds * (self.config.iterations - state.iteration), 1),
        }
        for name, sums in (("fake_losses", fake), ("student_losses", student), ("distance", distance)):
            metrics[name] = {
                label: _round(total / rows)
                for label, total, rows in zip(self.labels, sums, count, strict=True)
                if rows > 0
            }
        self._reset()
        return metrics


def make_optimizer(network: nn.Module, lr: float, config: DistillConfig) -> torch.optim.AdamW:
    """AdamW; the steps embedding has a rate of its own and no decay. `peak_lr` is what `lr_factor` scales."""
    steps = [value for key, value in network.named_parameters() if key == STEPS_EMBEDDING_KEY]
    others = [value for key, value in network.named_parameters() if key != STEPS_EMBEDDING_KEY]
    return torch.optim.AdamW(
        [
            {"params": others, "peak_lr": lr, "weight_decay": config.weight_decay},
            {"params": steps, "peak_lr": config.steps_lr, "weight_decay": 0.0},
        ],
        lr=lr,
        betas=config.betas,
        fused=True,
    )


def lr_factor(iteration: int, config: DistillConfig) -> float:
    """Share of the peak learning rate in an iteration (from 0): a linear rise, a plateau, a linear fall."""
    rise = (iteration + 1) / max(1, config.warmup_iterations)
    left = (config.iterations - iteration) / max(1.0, config.iterations * config.decay_share)
    return min(1.0, rise, FINAL_LR_FACTOR + (1 - FINAL_LR_FACTOR) * left)


@torch.no_grad()
def update_average(state: TrainingState, network: nn.Module, decay: float) -> None:
    """Move the average towards the parameters; faster at first, so that it forgets the teacher."""
    decay = min(decay, (1 + state.iteration) / (10 + state.iteration))
    torch._foreach_lerp_(list(state.average.values()), list(network.parameters()), 1.0 - decay)


def _check_steps(config: DistillConfig, schedule: NoiseSchedule) -> None:
    for count in config.num_steps:
        step = torch.arange(count)
        now, to = tdm.step_ends(torch.full_like(step, count), step, schedule.num_timesteps)
        try:
            tdm.draw_tau(now, to, config.objective, torch.Generator())
        except ValueError as error:
            raise ConfigError(f"num_steps: {count} steps: {error}") from None


def _attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    # on the CPU, plain matrix products train few tokens 1.5 times as fast as the fused kernels
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them, so that an iteration is finished and saved."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _to(cond: Conditioning, device: torch.device) -> Conditioning:
    num_steps = None if cond.num_steps is None else cond.num_steps.to(device)
    return Conditioning(cond.text.to(device), cond.mask.to(device), num_steps)


def _round(value: Tensor) -> float:
    return round(value.item(), 6)
