"""The clock of Redis, counted on by a process of its own."""

from __future__ import annotations

import pytest
import redis.exceptions

from server.queue.clock import RedisClock, asked_each_time, system_now_ms
from server.queue.connection import connect

NOON_S = 1_800_000_000


class Machine:
    """A machine whose ticks the test moves, and a Redis whose clock is `ahead_s` of noon at tick 0."""

    def __init__(self) -> None:
        self.tick_ms = 0.0
        self.ahead_s = 0.0
        self.way_ms = 0.0
        self.clock = RedisClock(lambda: self.tick_ms)

    def time(self) -> tuple[int, int]:
        """Redis's answer, which is read half way."""
        self.tick_ms += self.way_ms / 2
        microseconds = round((NOON_S + self.ahead_s) * 1_000_000 + self.tick_ms * 1000)
        self.tick_ms += self.way_ms / 2
        return divmod(microseconds, 1_000_000)

    def compare(self, way_ms: float = 0.0) -> int:
        """How far the clock is from noon plus the ticks, after a comparison that took so long."""
        self.way_ms = way_ms
        self.clock.compare(self.time)
        return self.clock() - round(NOON_S * 1000 + self.tick_ms)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_time_is_that_of_redis_and_goes_on_with_the_ticks(machine: Machine) -> None:
    assert machine.compare(way_ms=2.0) == 0
    machine.tick_ms += 5_000
    assert machine.clock() == NOON_S * 1000 + 5_002


def test_time_is_told_to_the_microsecond_where_that_is_asked_for(machine: Machine) -> None:
    machine.compare()
    machine.tick_ms += 0.25
    assert machine.clock.now_ns() == NOON_S * 1_000_000_000 + 250_000


def test_first_answer_counts_however_long_it_took(machine: Machine) -> None:
    assert abs(machine.compare(way_ms=2_000)) <= 1_000


def test_slow_answer_does_not_replace_a_quick_one_until_that_is_old(machine: Machine) -> None:
    machine.compare(way_ms=2.0)
    machine.ahead_s = 0.01  # which half of 30 ms on the way can hide
    assert machine.compare(way_ms=30.0) == 0
    machine.tick_ms += 120_000  # by now they may have parted as much
    assert machine.compare(way_ms=30.0) == 10


def test_clock_that_was_set_is_followed_at_once(machine: Machine) -> None:
    machine.compare(way_ms=2.0)
    machine.ahead_s = -3600
    assert machine.compare(way_ms=200.0) == -3_600_000


@pytest.mark.parametrize("ways_ms", [[40.0, 90.0, 1.0], [40.0, 1.0], [1.0]])
def test_time_is_asked_for_again_until_an_answer_was_quick(machine: Machine, ways_ms: list[float]) -> None:
    ways = iter(ways_ms)

    def ask() -> tuple[int, int]:
        machine.way_ms = next(ways)
        return machine.time()

    machine.clock.compare(ask)
    assert machine.clock.error_ms == pytest.approx(0.5)
    assert next(ways, None) is None


def test_redis_that_is_always_slow_is_asked_a_few_times_and_its_best_answer_counts(machine: Machine) -> None:
    ways = iter([90.0, 30.0, 60.0, 50.0, 70.0])

    def ask() -> tuple[int, int]:
        machine.way_ms = next(ways)
        return machine.time()

    machine.clock.compare(ask)
    assert next(ways, None) is None
    assert machine.clock.error_ms == pytest.approx(15, abs=0.1)


def test_question_without_an_answer_changes_nothing(machine: Machine) -> None:
    machine.compare()

    def ask() -> tuple[int, int]:
        raise redis.exceptions.TimeoutError("gone")

    with pytest.raises(redis.exceptions.TimeoutError):
        machine.clock.compare(ask)
    assert machine.clock() == NOON_S * 1000


def test_wall_clock_that_is_set_does_not_matter_once_redis_was_asked(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(redis_url)
    monkeypatch.setattr("server.queue.clock.time.time_ns", lambda: 0)
    clock = RedisClock()
    assert clock() < 1_000
    clock.compare(client.time)
    assert abs(clock() - asked_each_time(client)()) < 60_000
    client.close()


def test_until_then_it_is_this_machines_time() -> None:
    assert abs(RedisClock()() - system_now_ms()) < 60_000
