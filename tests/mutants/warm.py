"""A process that has imported what takes long, and forks for each run of pytest.

What it reads from stdin is a JSON list of pytest's arguments and a file for pytest's words, a line each; its
answer is a line with the exit status, or `NO_END`. Of the project it imports nothing itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence

import pytest

LIMIT_S = 900
NO_END = -1000
"""Instead of an exit status, for a run that had to be killed."""
SLOW = ("torch", "peft", "diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha", "redis")


def main() -> None:
    """Serve until stdin ends."""
    die_with_parent()
    for name in SLOW:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for line in sys.stdin:
        arguments, words = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            die_with_parent()
            os._exit(run(arguments, words))  # nothing is left to be tidied up but memory
        sys.stdout.write(f"{wait_for(child)}\n")
        sys.stdout.flush()


def die_with_parent() -> None:
    """Have Linux kill this process when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(arguments: Sequence[str], words: str) -> int:
    """Run pytest in the working directory; its exit status."""
    out = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    status = int(pytest.main(list(arguments)))
    sys.stdout.flush()
    return status


def wait_for(child: int) -> int:
    """Wait for a child, and kill it with all that it started if that takes too long."""
    ends = time.monotonic() + LIMIT_S
    code = None
    try:
        while code is None and time.monotonic() < ends:
            found, ended = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(ended) if found else None
            time.sleep(0.0 if found else 0.05)
    finally:
        if code is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return NO_END if code is None else code


if __name__ == "__main__":
    main()
