"""What the queue asks of Redis, by name, and who wants to know how long each answer took.

A verb that is a script (lua/*.lua) has the script's name, one command the command's, and what is sent as one
pipeline the name of what it is for. Reads that block until there is something are no part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Observe = Callable[[str, float], None]
"""Told an operation's name and how many seconds it took, also if it failed; from any thread."""

API_OPS = (
    "enqueue", "watch", "cancel", "delete", "expire", "forget",
    "stats", "answers", "manifests", "info", "ping",
    "hgetall", "hsetnx", "set", "time", "zrangebylex", "zrangebyscore", "zrank", "zrem", "zrevrangebylex",
)  # fmt: skip
"""Operations of `JobQueue`."""
WORKER_OPS = (
    "beat", "leave", "start", "extend", "complete", "fail", "hand_back", "adopt",
    "look", "announce", "time", "xautoclaim", "xreadgroup",
)  # fmt: skip
"""Operations of `WorkerQueue`."""


def observe_nothing(_op: str, _took_s: float) -> None:
    """For who does not want to know."""


@contextmanager
def timed(observe: Observe, op: str) -> Iterator[None]:
    """Tell how long what happens meanwhile takes."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        observe(op, time.perf_counter() - begun)
