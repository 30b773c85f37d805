"""A process with a wrong clock: `python -m tests.failures.skew` is `python -m server` with it."""

from __future__ import annotations

import os
import runpy
import time
from collections.abc import Mapping

SKEW = "CLOCK_SKEW_S"
"""In the environment: how far its clock is ahead, in seconds."""


def skew_clock(environment: Mapping[str, str]) -> None:
    """Set this process's clock, and no other's, as its environment says."""
    skew_s = float(environment.get(SKEW, 0))
    if skew_s:
        now_s, now_ns = time.time, time.time_ns
        time.time = lambda: now_s() + skew_s
        time.time_ns = lambda: now_ns() + int(skew_s * 1e9)


if __name__ == "__main__":
    skew_clock(os.environ)
    runpy.run_module("server", run_name="__main__", alter_sys=True)
