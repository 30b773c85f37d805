"""Clock: the time of day as Redis counts it, in every process that shares the queue.

Deadlines, ages and signs of life are written by one machine and judged by another. If each went by its own
clock, a worker whose clock is behind would never be seen alive, and one whose clock is ahead would end every
fresh job as late. So processes ask Redis for the time now and then, and count on from there by a clock that
nobody sets: then all that they compare is of one clock, in the scripts and outside of them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import redis

Reply = tuple[int, int]
"""What TIME returns: unix seconds, and microseconds within the second."""

DRIFT = 2e-4
"""How much two clocks may part, as a share of the time since they were compared; quartz is far better."""

GOOD_MS = 1.0
MAX_QUESTIONS = 5
"""An answer that was a while on its way, on a busy machine, says little: a comparison asks again until it
knows the time to `GOOD_MS`, but no more often than that."""


def system_now_ms() -> int:
    """Unix time in ms by this machine's own clock."""
    return time.time_ns() // 1_000_000


def ticks_ms() -> float:
    """Ms since this machine was started, asleep or not; nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) * 1000


def asked_each_time(client: redis.Redis) -> Callable[[], int]:
    """Unix time in ms by the clock of Redis, for commands that need it once or twice."""

    def now_ms() -> int:
        seconds, microseconds = client.time()
        return int(seconds) * 1000 + int(microseconds) // 1000

    return now_ms


class RedisClock:
    """Unix time in ms by the clock of Redis; by this machine's until they have been compared once."""

    def __init__(self, ticks: Callable[[], float] = ticks_ms) -> None:
        """Compares nothing yet.

        Args:
            ticks: ms, of a clock that only ever goes forward at its pace.
        """
        self._ticks = ticks
        self._compared_at = ticks()
        self._ahead_ms = system_now_ms() - self._compared_at
        self._error_ms = float("inf")

    def __call__(self) -> int:
        """Unix ms."""
        return round(self._ticks() + self._ahead_ms)

    def now_ns(self) -> int:
        """Unix ns, good to a microsecond: for what is shorter than a millisecond."""
        return round((self._ticks() + self._ahead_ms) * 1000) * 1000

    def compare(self, ask: Callable[[], Reply]) -> None:
        """Ask Redis, and go by its answer from now on.

        Args:
            ask: a client's `time`. What it raises is passed on; what was heard until then counts.
        """
        for _ in range(MAX_QUESTIONS):
            asked_at = self._ticks()
            self._hear(asked_at, ask())
            if self.error_ms <= GOOD_MS:
                break

    async def compare_async(self, ask: Callable[[], Awaitable[Reply]]) -> None:
        """The same with a client of an event loop."""
        for _ in range(MAX_QUESTIONS):
            asked_at = self._ticks()
            self._hear(asked_at, await ask())
            if self.error_ms <= GOOD_MS:
                break

    @property
    def error_ms(self) -> float:
        """How far from Redis's clock this one can be by now; infinite before the first comparison."""
        return self._error_ms + DRIFT * (self._ticks() - self._compared_at)

    def _hear(self, asked_at: float, reply: Reply) -> None:
        """Redis read its clock at some moment between question and answer: half of that time is the error.

        An answer that took long is worth less than an earlier quick one, unless the two contradict each
        other: then Redis has moved to a machine with another clock, or had its clock set.
        """
        now = self._ticks()
        ahead_ms = reply[0] * 1000 + reply[1] / 1000 - (asked_at + now) / 2
        error_ms = (now - asked_at) / 2
        known_error_ms = self.error_ms
        if error_ms <= known_error_ms or abs(ahead_ms - self._ahead_ms) > error_ms + known_error_ms:
            self._compared_at, self._ahead_ms, self._error_ms = now, ahead_ms, error_ms
