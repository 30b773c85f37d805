"""The distillation loop: teacher and prompts in, student out."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engines.distill import lcm, tdm, trajectory
from engines.distill.checkpoint import (
    checkpoint_iterations,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from engines.distill.config import DistillConfig
from engines.distill.cost import row_forwards
from engines.distill.disk import room_for
from engines.distill.distributed import World, clip_gradients, joined, wants_shards
from engines.distill.early_stop import EarlyStop, Examiner
from engines.distill.grid import check_schedule
from engines.distill.latents import load_latents
from engines.distill.log import RunLog
from engines.distill.meter import Meter
from engines.distill.prompts import PromptBank, load_prompt_bank
from engines.distill.roles import Roles, separate_roles, shared_roles
from engines.distill.samples import SampleSheets, save_sheet
from engines.distill.stop import stop_signals
from engines.distill.student import Teacher, load_initial_weights, load_teacher, student_bucket, write_student
from engines.distill.studio import Studio
from engines.distill.updates import lr_factor, make_state, update_average
from engines.errors import ConfigError, TrainingError
from engines.gate.evaluator import num_parameters

AUTOCAST = {"none": None, "bfloat16": torch.bfloat16}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEED_STRIDE = 1_000_003
"""Iterations before the next seed's draws repeat. Torch seeds its generators from the low 32 bits alone."""


def distill(config: DistillConfig, console: Console) -> Path:
    """Run a distillation to its end, from its newest checkpoint if it has one.

    Returns:
        The student's directory, `config.out / "student"`.
    Raises:
        CheckpointError: the teacher or a checkpoint cannot be used.
        ConfigError: prompts cannot be read, or a K leaves no room between its steps.
        TrainingError: a loss or gradient is not finite, or the disk is full.
        KeyboardInterrupt: SIGINT or SIGTERM came; the iteration was finished and saved.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with joined(config.device) as world:
        return _distill(config, console if world.is_main else Console(quiet=True), world)


def _distill(config: DistillConfig, console: Console, world: World) -> Path:
    device = world.device
    config = config.on(device.type)
    teacher = load_teacher(config.teacher, DTYPES[config.teacher_dtype])
    size = num_parameters(teacher.network) / 1e6
    console.print(f"teacher {config.teacher}: {teacher.family.name}, {size:.1f} M parameters, on {device}")
    clean = load_latents(config, student_bucket(config, teacher.family)[1], device)
    prompts = None if clean is None else clean.prompts
    bank = world.main_first(lambda: load_prompt_bank(config, device, prompts))
    console.print(f"{len(bank.prompts)} prompts of {bank.max_tokens} tokens")
    latents = None if clean is None else clean.latents
    if world.size == 1 or not wants_shards(config.shard):
        teacher = teacher.to(device)  # shards go there block by block
    trainer = Trainer(config, teacher, bank, latents, world)
    checkpoints = config.out / "checkpoints"
    newest = world.first(latest_checkpoint(checkpoints))
    if newest is not None:
        load_checkpoint(newest, trainer.state, config.numerics())
        console.print(f"resuming after iteration {trainer.state.iteration}")
    trainer.train(console)
    stop, student = trainer.early_stop, config.out / "student"
    if stop is not None:
        stop.restore()
        console.print(stop.verdict(), soft_wrap=True, highlight=False)
    weights = trainer.roles.export(trainer.state.average, world)
    training = {
        "method": config.method,
        "settings": config.numerics(),
        "train_seconds": round(trainer.state.train_seconds, 1),
        "row_forwards": round(trainer.state.iteration * config.batch_size * row_forwards(config)),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "num_processes": world.size,
        "torch": torch.__version__,
        **({} if stop is None else {"early_stop": stop.summary()}),
    }
    world.main_only(
        lambda: write_student(student, config, weights, max_text_tokens=bank.max_tokens, training=training)
    )
    return student


class Trainer:
    """The three networks, their optimizers, and one iteration of a method.

    Args:
        bank: encoded prompts.
        latents: (N, ...) clean latents of the bank's prompts, for consistency distillation.
        world: the processes that train together.
    """

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        bank: PromptBank,
        latents: Tensor | None = None,
        world: World | None = None,
    ) -> None:
        schedule = teacher.schedule
        check_schedule(config, schedule)
        self.world = world or World()
        self.share = self.world.share(config.batch_size)
        self.shard = self.world.size > 1 and wants_shards(config.shard)
        if self.shard and (config.objective.diversity > 0.0 or config.optimizer == "adamw8bit"):
            raise ConfigError("shard: objective.diversity must be 0 and optimizer adamw")
        self.bank = bank
        self.latents = latents
        self.device = next(teacher.network.parameters()).device if self.world.size == 1 else self.world.device
        self.config = config = config.on(self.device.type)
        teacher = replace(teacher, schedule=schedule.to(self.device))
        self.bucket, self.shape = student_bucket(config, teacher.family)
        self.uncond = bank.uncond.to(self.device)
        self.roles = _make_roles(config, teacher)
        family = teacher.family
        self.roles.spread(self.world, family.predict, family.steps_key, shard=self.shard)
        self.state = make_state(config, self.roles.parameters, family.steps_key)
        visited = config.student_timesteps(schedule.num_timesteps)
        self.table = trajectory.timestep_table(visited)
        self.meter = Meter(config.num_steps)
        self.studio = Studio(
            config.teacher,
            self.roles,
            self.state,
            visited,
            self.bucket,
            self.shape,
            self.uncond,
            batch=self.share.stop - self.share.start,
            device=self.device,
            world=self.world,
        )
        self.early_stop: EarlyStop | None = None
        if config.early_stop is not None:
            examiner = Examiner(self.studio, bank, config, self.device)
            self.early_stop = EarlyStop(config, examiner.measure, self.state, self.world)

    def train(self, console: Console) -> None:
        """Iterate to the end, with progress, metrics and checkpoints."""
        config, state = self.config, self.state
        settings, checkpoints = config.numerics(), config.out / "checkpoints"
        log = RunLog(
            config.out,
            state.iteration,
            config.iterations,
            tensorboard=config.tensorboard,
            console=console,
            writes=self.world.is_main,
        )
        with log, _attention(self.device), stop_signals() as stop:
            if self.early_stop is not None:
                self.early_stop.resume()
            self._look(log, resumed=True)
            while not self.is_finished():
                started = time.perf_counter()
                try:
                    self.step()
                except TrainingError as error:
                    path = save_checkpoint(checkpoints, state, settings, config.keep_checkpoints, self.world)
                    raise TrainingError(f"{error}. Saved as it was before, in {path}") from None
                state.iteration += 1
                state.train_seconds += time.perf_counter() - started
                log.advance()
                stopped = self.world.any(bool(stop))
                if not stopped or self.is_finished():
                    self._look(log)
                if state.iteration % config.log_every == 0 or self.is_finished():
                    self._report(log)
                if state.iteration % config.checkpoint_every == 0 or self.is_finished() or stopped:
                    path = save_checkpoint(checkpoints, state, settings, config.keep_checkpoints, self.world)
                    log.say(f"saved {path}")
                    if self.early_stop is not None:
                        self.early_stop.prune(checkpoint_iterations(checkpoints))
                if stopped and not self.is_finished():
                    raise KeyboardInterrupt

    def is_finished(self) -> bool:
        """Whether all iterations are done, or no better student is expected of more."""
        exhausted = self.early_stop is not None and self.early_stop.exhausted
        return exhausted or self.state.iteration >= self.config.iterations

    def _look(self, log: RunLog, *, resumed: bool = False) -> None:
        """Draw samples and evaluate the student, if it is time.

        Args:
            resumed: only do what the signal left undone that stopped the run after this iteration.
        """
        iteration, every = self.state.iteration, self.config.samples.every
        path = self.config.out / "samples" / f"{iteration:08d}.png"
        done = resumed and self.world.first(path.exists())
        if every and iteration and iteration % every == 0 and not done:
            sheet = self.sheets.draw()
            self.world.main_only(lambda: save_sheet(path, sheet))
            log.picture("samples", sheet, iteration)
        stop = self.early_stop
        if stop is not None and stop.is_due:
            log.say(stop.evaluate())
            log.value(f"early_stop/{stop.settings.metric}", stop.evaluations[-1].value, iteration)

    @cached_property
    def sheets(self) -> SampleSheets:
        """What the student draws while it learns."""
        return SampleSheets(self.studio, self.bank, self.config)

    def step(self) -> None:
        """One iteration of the method."""
        config, state = self.config, self.state
        rng = self.world.generator(config.seed * SEED_STRIDE + state.iteration)
        factor = lr_factor(state.iteration, config)
        if config.method == "lcm":
            self._consistency_step(factor, rng)
        else:
            self._matching_step(factor, rng)
        update_average(state, config.ema_decay)

    def _matching_step(self, factor: float, rng: torch.Generator) -> None:
        """Algorithm 1 of arXiv:2503.06674: roll out, train the fake score where it lands, then student."""
        config, share = self.config, self.share
        cond = self.bank.draw(config.batch_size, rng, share)
        noise = torch.randn(config.batch_size, *self.shape, generator=rng)[share].to(self.device)
        num_steps, step = trajectory.draw_steps(config.batch_size, config.num_steps, rng)
        visited = self.table[num_steps]
        if config.grid_jitter > 0.0:
            visited = trajectory.jitter(visited, num_steps, config.grid_jitter, rng)
        num_calls = int(step.max()) if self.shard else None
        num_steps, step, visited = num_steps[share], step[share], visited[share]
        cond = replace(cond, num_steps=num_steps).to(self.device)
        roles = self.roles
        at = trajectory.student_step(
            roles.student,
            noise,
            cond,
            visited.to(self.device),
            step.to(self.device),
            landing_rng=rng if config.objective.random_landing else None,
            num_calls=num_calls,
        )
        # the fake score first: the student needs its view of where the student is now
        for _ in range(config.fake_updates - 1):
            self._update_fake_score(at, factor, rng)
        fake_rows, fake_norm = self._update_fake_score(at, factor, rng)
        student_rows, distance = tdm.student_loss(
            at, roles.teacher, roles.fake_score, self.uncond, config.objective, rng
        )
        student_norm = self._update("student", student_rows.mean(), factor)
        if config.fake_pull > 0.0:
            tdm.pull_fake_score(roles.fake_score.network, roles.student.network, config.fake_pull)
        rows = {"fake_loss": fake_rows, "student_loss": student_rows, "distance": distance}
        norms = {"fake_grad_norm": fake_norm, "student_grad_norm": student_norm}
        self.meter.add(num_steps, step, rows, norms)

    def _consistency_step(self, factor: float, rng: torch.Generator) -> None:
        """Noise clean latents, take a teacher step, and have the student agree with itself across it."""
        config, roles, clean = self.config, self.roles, self.latents
        assert clean is not None, "consistency distillation without latents"
        index = torch.randint(len(clean), (config.batch_size,), generator=rng)[self.share]
        grid = config.grid_timesteps or roles.teacher.schedule.num_timesteps
        start, end = lcm.draw_ends(config.batch_size, grid, config.consistency, rng)
        start, end = start[self.share], end[self.share]
        noise = torch.randn(config.batch_size, *self.shape, generator=rng)[self.share].to(self.device)
        # the row of the default stays zero: the student is not told a number of steps
        num_steps = torch.full_like(start, config.default_num_steps)
        cond = replace(self.bank.rows(index), num_steps=num_steps).to(self.device)
        start, end = start.to(self.device), end.to(self.device)
        alpha, sigma = roles.teacher.schedule.at(start, noise.ndim)
        noised = alpha * clean[index].float().to(self.device) + sigma * noise
        student_rows, distance = lcm.consistency_loss(
            roles.student,
            roles.fake_score,
            roles.teacher,
            (noised, start, end),
            cond,
            self.uncond,
            config.objective.guidance_scale,
            config.consistency,
        )
        norm = self._update("student", student_rows.mean(), factor)
        visited = self.table[config.default_num_steps, : config.default_num_steps]
        step = ((visited >= start.cpu()[:, None]).sum(1) - 1).clamp(min=0)
        rows = {"student_loss": student_rows, "distance": distance}
        self.meter.add(num_steps, step, rows, {"student_grad_norm": norm})

    def _report(self, log: RunLog) -> None:
        metrics = self._metrics()

        def write() -> None:
            with room_for(self.config.out / "metrics.jsonl", 1000, "The last checkpoint stays"):
                log.report(metrics)

        self.world.main_only(write)

    def _metrics(self) -> dict[str, object]:
        averages, state = self.meter.flush(self.world), self.state
        seconds = averages["seconds_per_iteration"]
        assert isinstance(seconds, float)
        return {
            "iteration": state.iteration,
            **averages,
            "lr_factor": round(lr_factor(state.iteration - 1, self.config), 5),
            "eta_s": round(seconds * (self.config.iterations - state.iteration), 1),
        }

    def _update_fake_score(
        self, at: trajectory.StudentStep, factor: float, rng: torch.Generator
    ) -> tuple[Tensor, float]:
        roles = self.roles
        rows = tdm.fake_score_loss(roles.fake_score, at, self.config.objective, rng, teacher=roles.teacher)
        return rows, self._update("fake_score", rows.mean(), factor)

    def _update(self, name: str, loss: Tensor, factor: float) -> float:
        """Clip and apply one gradient.

        Raises:
            TrainingError: loss or gradient is not finite; nothing was changed.
        """
        parameters, optimizer = self.state.parameters[name].values(), self.state.optimizers[name]
        optimizer.zero_grad()
        self.roles.activate(name)
        loss.backward()
        norm = clip_gradients(parameters, self.config.clip_norm, self.world, sharded=self.shard)
        value = self.world.mean(loss.item())
        if not math.isfinite(norm) or not math.isfinite(value):
            raise TrainingError(
                f"{name}: loss {value}, gradient norm {norm} in iteration {self.state.iteration + 1}: "
                "lower student_lr or fake_lr, or raise objective.min_normaliser"
            )
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        return norm


def _make_roles(config: DistillConfig, teacher: Teacher) -> Roles:
    """The three networks: whole copies, or adapters on one base."""
    autocast = AUTOCAST[config.autocast]
    max_num_steps, zero_row = max(config.num_steps), config.default_num_steps
    if config.gradient_checkpointing:
        network: Any = teacher.network
        network.enable_gradient_checkpointing()
    if config.lora is not None:
        return shared_roles(
            teacher,
            config.lora,
            max_num_steps=max_num_steps,
            zero_row=zero_row,
            autocast=autocast,
            seed=config.seed,
        )
    roles = separate_roles(teacher, max_num_steps=max_num_steps, zero_row=zero_row, autocast=autocast)
    if config.student_init is not None:
        roles.student.network.load_state_dict(load_initial_weights(config, teacher))
    return roles


def _attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    # on the CPU, plain matrix products train few tokens 1.5 times as fast as the fused kernels
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
