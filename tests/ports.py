"""Ports for the servers of tests: below those that the kernel gives to whoever asks for any, and reserved.

A port found by binding to 0 and closing again may be anybody's a moment later: another test's, or that of an
outgoing connection.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

FIRST, LAST = 15_000, 32_000
"""Below Linux's ephemeral ports, which begin at 32768."""

_reserved = ExitStack()
"""Held until this process ends."""


def reserve_ports(count: int = 1) -> list[int]:
    """Neighbouring TCP ports of 127.0.0.1 on which nothing listens, and that no other test is given.

    Raises:
        AssertionError: none were found.
    """
    for _ in range(1_000):
        first = random.randrange(FIRST, LAST - count)
        ports = list(range(first, first + count))
        with ExitStack() as held:
            try:
                for port in ports:
                    # A name that only one process has at a time, and that the kernel takes back when it ends.
                    held.enter_context(socket.socket(socket.AF_UNIX)).bind(f"\0tests-of-tdm-{port}")
                with ExitStack() as probes:
                    for port in ports:
                        probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            _reserved.push(held.pop_all())
            return ports
    raise AssertionError(f"no {count} neighbouring ports between {FIRST} and {LAST} are free")


def reserve_port() -> int:
    """One of them."""
    (port,) = reserve_ports()
    return port
