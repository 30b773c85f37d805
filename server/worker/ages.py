"""Ages: how old the process was at the end of each phase of its start, for the log."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)


def process_ages_s() -> tuple[float, float] | None:
    """Seconds since this process was started, and of CPU time since; None where the kernel does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return None
    ticks = int(fields[19])  # the 22nd field, `starttime`: proc(5)
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return round(age_s, 2), round(time.process_time(), 2)


def log_start(message: str, model: str, ages_s: Mapping[str, tuple[float, float] | None]) -> None:
    """Log how old the process was at the end of each phase of its start, where that is known."""
    known = {phase: ages for phase, ages in ages_s.items() if ages is not None}
    start_s = {phase: age_s for phase, (age_s, _) in known.items()}
    cpu_s = {phase: spent_s for phase, (_, spent_s) in known.items()}
    log.info(message, extra={"model": model, "start_s": start_s, "cpu_s": cpu_s})
