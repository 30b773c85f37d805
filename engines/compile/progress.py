"""Progress of a build: a bar on a terminal, one plain line per finished piece of work elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)


class BuildProgress:
    """Counts pieces of work. Lines read `build: [2/6] compiled text (12 s)`.

    Args:
        console: where to.
        num_pieces: how many there will be.
    """

    def __init__(self, console: Console, num_pieces: int) -> None:
        self._console = console
        self._num_pieces = num_pieces
        self._done = 0
        self._start = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("build", total=num_pieces)

    def __enter__(self) -> BuildProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def doing(self, what: str) -> None:
        """Say what is going on."""
        self._bar.update(self._task, description=what)
        if not self._console.is_terminal:
            self._print(f"{what} ...")

    def done(self, what: str) -> None:
        """Count one piece as finished."""
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        self._print(f"{what} ({time.monotonic() - self._start:.0f} s)")

    def warn(self, what: str) -> None:
        """Print a warning above the bar."""
        self._console.print(f"warning: {what}", style="yellow", soft_wrap=True, highlight=False)

    def _print(self, what: str) -> None:
        self._console.print(
            f"build: [{self._done}/{self._num_pieces}] {what}", soft_wrap=True, highlight=False, markup=False
        )
