"""What a run says while it runs: a progress bar or plain lines, `metrics.jsonl`, TensorBoard if wanted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class RunLog:
    """Progress and metrics of one run; a context manager.

    Args:
        directory: where `metrics.jsonl` and TensorBoard's files go.
        iteration: finished so far; metrics beyond it, of a run that was killed, are dropped.
        iterations: in all.
        tensorboard: also write TensorBoard events.
        console: a bar on a terminal, a line per report elsewhere.
        writes: keep files; not for processes that work for another one's run.
    """

    def __init__(
        self,
        directory: Path,
        iteration: int,
        iterations: int,
        *,
        tensorboard: bool,
        console: Console,
        writes: bool = True,
    ) -> None:
        self.console = console
        self.iterations = iterations
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        if writes:
            path = directory / "metrics.jsonl"
            _truncate(path, iteration)
            self._file = path.open("a", encoding="utf-8")
            self._tensorboard = _summary_writer(directory, iteration, console) if tensorboard else None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("distil", total=iterations, completed=iteration, losses="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def advance(self) -> None:
        """One more iteration is finished."""
        self._progress.advance(self._task)

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Write one line of metrics, and show losses, the distance per step, and the time left."""
        if self._file is not None:
            self._file.write(json.dumps(metrics, allow_nan=False) + "\n")
            self._file.flush()
        steps = "  ".join(f"{step} {distance:.3f}" for step, distance in metrics["distance"].items())
        named = ((name, metrics.get(f"{name}_loss")) for name in ("fake", "student"))
        losses = "  ".join(f"{name} {loss:.4f}" for name, loss in named if loss is not None)
        losses = f"{losses}  |  {steps}"
        self._progress.update(self._task, losses=losses)
        if not self.console.is_terminal:
            eta = f"eta {_clock(metrics['eta_s'])}"
            self.console.print(
                f"{metrics['iteration']:>6}/{self.iterations}  {eta}  {losses}", soft_wrap=True
            )
        if self._tensorboard is not None:
            for name, value in _scalars(metrics):
                self._tensorboard.add_scalar(name, value, metrics["iteration"])

    def value(self, name: str, value: float, iteration: int) -> None:
        """Show a number in TensorBoard that is not measured in every iteration."""
        if self._tensorboard is not None:
            self._tensorboard.add_scalar(name, value, iteration)

    def picture(self, name: str, picture: Image.Image, iteration: int) -> None:
        """Show a picture in TensorBoard."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, np.asarray(picture), iteration, dataformats="HWC")

    def say(self, message: str) -> None:
        """Print one line above the bar."""
        self.console.print(message, soft_wrap=True, highlight=False)


def _truncate(path: Path, iteration: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:  # the line a kill cut short
            break
        if metrics["iteration"] > iteration:
            break
        kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def _summary_writer(directory: Path, iteration: int, console: Console) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        console.print("tensorboard is not installed: metrics go to metrics.jsonl only")
        return None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=iteration + 1)


def _scalars(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    scalars: list[tuple[str, float]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            scalars += _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value):
            scalars.append((prefix + name, value))
    return scalars


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
