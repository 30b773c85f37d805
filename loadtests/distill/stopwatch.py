"""Where the time of a training iteration goes, read from outside: the trainer knows nothing of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from engines.denoiser import Conditioning, NetworkDenoiser
from engines.distill.trainer import Trainer

PARTS = ("rollout", "student", "fake_score", "teacher", "optimizer", "other")
"""rollout: the student without gradient; student: its step, forward and backward; fake_score: its training,
and its answer to the student's query; teacher: with and without prompt; optimizer: both AdamW steps; other:
draws, losses, the weights' average, metrics. Clipping belongs to the backward passes."""

Stamp = Any


class Clock:
    """The device's own time: events in CUDA's stream, or the CPU time that this process got.

    On the CPU, wall time would contain whatever else the machine does.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> Stamp:
        """Stamp this moment; on CUDA, when the work handed in so far is done."""
        if not self._cuda:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Stamp, end: Stamp) -> float:
        """Time between two stamps; on CUDA, to be called after a synchronization."""
        return float(start.elapsed_time(end) / 1000.0 if self._cuda else end - start)


class Stopwatch(AbstractContextManager["Stopwatch"]):
    """Follows a trainer's iterations while the block lasts.

    Attributes:
        rows: of each part of the iteration that denoisers were asked for, see `flops.RowFlops.iteration`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._clock = Clock(trainer.device)
        self._marks: list[tuple[str, Stamp]] = []
        self._undo: list[Callable[[], object]] = []
        self.rows: Counter[str] = Counter()

    def __enter__(self) -> Stopwatch:
        roles = self._trainer.roles
        for name in ("student", "fake_score", "teacher"):
            self._follow_denoiser(name, getattr(roles, name))
        for optimizer in self._trainer.state.optimizers.values():
            self._follow_optimizer(optimizer)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def start(self) -> None:
        """Begin an iteration."""
        self.rows = Counter(dict.fromkeys(("rollout", "student", "fake_score", "fake_query", "teacher"), 0))
        self._marks = [("other", self._clock.now())]

    def stop(self) -> dict[str, float]:
        """End the iteration: seconds of each part."""
        self._mark("end")
        if self._trainer.device.type == "cuda":
            torch.cuda.synchronize()
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            spent[part] += self._clock.seconds(start, end)
        return spent

    def _mark(self, part: str) -> None:
        self._marks.append((part, self._clock.now()))

    def _follow_denoiser(self, role: str, denoiser: NetworkDenoiser) -> None:
        asked = denoiser.x0_eps

        def x0_eps(latents: Tensor, timesteps: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
            learning = torch.is_grad_enabled()
            part = "rollout" if role == "student" and not learning else role
            self.rows["fake_query" if role == "fake_score" and not learning else part] += len(latents)
            self._mark(part)
            x0, eps = asked(latents, timesteps, cond)
            if x0.requires_grad:
                x0.register_hook(lambda _: self._mark(role))  # the backward pass has come to the network
            self._mark("other")
            return x0, eps

        denoiser.x0_eps = x0_eps  # type: ignore[method-assign]
        self._undo.append(lambda: vars(denoiser).pop("x0_eps"))

    def _follow_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        hooks = (
            optimizer.register_step_pre_hook(lambda *_: self._mark("optimizer")),
            optimizer.register_step_post_hook(lambda *_: self._mark("other")),
        )
        self._undo.extend(hook.remove for hook in hooks)


def shares(parts: Mapping[str, float]) -> dict[str, float]:
    """Each part's share of the whole."""
    whole = sum(parts.values())
    return {part: seconds / whole for part, seconds in parts.items()}
