"""How a worker learns that its engine is slower, or faster, than the latency table says."""

import random

import pytest

from engines.bundle.bucket import Bucket
from server.worker.batch_policy import Run, decide
from server.worker.pace import NUM_BATCHES, PacedCost
from tests.server.worker.test_batch_policy import NOW_MS, row, typical

SMALL, LARGE = Bucket(64, 64), Bucket(1024, 1024)


def table(bucket: Bucket, num_steps: int, batch: int) -> float | None:
    return typical(bucket, num_steps, batch) if bucket == SMALL else None


def test_table_is_believed_until_batches_say_otherwise() -> None:
    cost = PacedCost(table)
    assert cost(SMALL, 4, 8) == typical(SMALL, 4, 8)
    cost.observe(SMALL, 4, 1, 50 * typical(SMALL, 4, 1))  # cold caches
    assert cost(SMALL, 4, 8) == typical(SMALL, 4, 8)


@pytest.mark.parametrize("pace", [0.7, 1.5, 4.0])
def test_every_batch_size_is_predicted_at_the_pace_of_the_last_batches(pace: float) -> None:
    cost, rng = PacedCost(table), random.Random(1)
    for _ in range(NUM_BATCHES):
        size = rng.randint(1, 8)
        cost.observe(SMALL, 4, size, pace * rng.uniform(0.9, 1.1) * typical(SMALL, 4, size))
    for size in (1, 5, 16):
        assert cost(SMALL, 2, size) == pytest.approx(pace * typical(SMALL, 2, size), rel=0.1)


def test_a_batch_during_which_the_process_was_frozen_changes_nothing() -> None:
    cost = PacedCost(table)
    for _ in range(NUM_BATCHES):
        cost.observe(SMALL, 4, 4, 1.2 * typical(SMALL, 4, 4))
    cost.observe(SMALL, 4, 4, 60_000.0)
    assert cost.pace == pytest.approx(1.2)


def test_an_engine_that_becomes_fast_again_is_believed_to_be() -> None:
    cost = PacedCost(table)
    for pace in (3.0, 1.0):
        for _ in range(NUM_BATCHES):
            cost.observe(SMALL, 4, 4, pace * typical(SMALL, 4, 4))
        assert cost.pace == pytest.approx(pace)


def test_what_was_never_measured_teaches_nothing() -> None:
    cost = PacedCost(table)
    for _ in range(NUM_BATCHES):
        cost.observe(LARGE, 4, 1, 9_000.0)
    assert (cost(LARGE, 4, 1), cost(LARGE, 4, 8), cost.pace) == (1.0, 1.0, 1.0)


def test_a_slow_engine_cuts_larger_batches_before_the_queue_grows_without_end() -> None:
    """At this rate small batches keep up by the table; on an engine half as fast only large ones do."""
    rows, slow = [row(name) for name in "abcdefgh"], PacedCost(table)
    sizes = []
    for pace in (1.0, 1.6):
        for _ in range(NUM_BATCHES):
            slow.observe(SMALL, 4, 2, pace * typical(SMALL, 4, 2))
        decision = decide(
            rows,
            now_ms=NOW_MS,
            waited_ms=0.0,
            next_ms=(),
            rows_per_ms=0.025,
            lately_per_ms=0.025,
            backlog=2,
            max_batch=8,
            cost_ms=slow,
        )
        assert isinstance(decision, Run)
        sizes.append(len(decision.rows))
    assert sizes[0] < sizes[1] == 8
