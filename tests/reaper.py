"""The process that ends what a test run leaves behind, whatever ended the run: SIGKILL, a crash, a timeout.

Everything that the tests start inherits MARK in its environment, also what moves to a session of its own or
loses its parent. The reaper waits for pytest to end, then kills whatever still carries the mark.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MARK = "STARTED_BY_TESTS"


def start_reaper() -> None:
    """Have everything that this process starts from now on end with it; without /proc it does nothing."""
    if not sys.platform.startswith("linux"):
        return
    mark = uuid.uuid4().hex
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-S", __file__, str(os.getpid()), mark],
        {name: value for name, value in os.environ.items() if name != MARK},  # a run in a run has two reapers
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        ],
        setsid=True,  # neither Ctrl-C nor the end of the terminal is for it
    )
    os.environ[MARK] = mark


def marked(mark: str) -> Iterator[int]:
    """Process ids that carry the mark."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is somebody else's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


def reap(pid: int, mark: str) -> None:
    """Wait until process `pid` has ended, then kill until nothing carries the mark any more."""
    with suppress(ProcessLookupError):
        select.select([os.pidfd_open(pid)], [], [])
    clean_looks = 0
    while clean_looks < 2:  # in the middle of an exec a process shows no environment
        left = list(marked(mark))
        clean_looks = 0 if left else clean_looks + 1
        for one in left:  # a supervisor may have started another child since the last look
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)


if __name__ == "__main__":
    reap(int(sys.argv[1]), sys.argv[2])
