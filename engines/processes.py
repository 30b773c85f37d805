"""What a process does first that works for another one."""

from __future__ import annotations

import ctypes
import signal
import sys


def start_child() -> None:
    """Leave Ctrl-C to the parent, end on SIGTERM, and on Linux end when the parent does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
