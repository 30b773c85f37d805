"""Report: what the operator of an `up` is told, on its output or by its end."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from server.supervisor.child import EXIT_USAGE

EXIT_FAILURE = 1


class LaunchError(Exception):
    """The system cannot start; the message is one line for the operator, `status` the exit status."""

    def __init__(self, message: str, status: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.status = status


def say(line: str, *, file: TextIO | None = None) -> None:
    """Print one line for the operator. That nobody can read it (its reader has gone, the disk is full) is no
    reason for anything to end.
    """
    out = file or sys.stdout
    try:
        out.write(line + "\n")
        out.flush()
    except BrokenPipeError:  # for good: what is still in the buffer must not make trouble at the exit
        with suppress(OSError, ValueError), open(os.devnull, "wb") as devnull:  # noqa: PTH123
            os.dup2(devnull.fileno(), out.fileno())
    except (OSError, ValueError):
        pass
