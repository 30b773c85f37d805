"""What runs together and when, on cost curves of engines that like batches and of ones that do not."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.bucket import Bucket
from server.batching import Arrivals, CostModel, Row, Run, Wait, best_batch, decide, longest_wait

SMALL, LARGE = Bucket(64, 64), Bucket(1024, 1024)
NOW_MS = 1_000_000


def flat(_bucket: Bucket, num_steps: int, _batch: int) -> float:
    """An engine that draws eight as fast as one."""
    return 10.0 * num_steps


def linear(_bucket: Bucket, num_steps: int, batch: int) -> float:
    """An engine that one sample fills: batching gains nothing."""
    return 10.0 * num_steps * batch


def typical(_bucket: Bucket, num_steps: int, batch: int) -> float:
    """A start-up cost and a cost per row."""
    return num_steps * (6.0 + 4.0 * batch)


def row(
    job: str, index: int = 0, *, bucket: Bucket = SMALL, alone: bool = False, slack_ms: int = 60_000
) -> Row:
    return Row(
        job_id=job, index=index, bucket=bucket, num_steps=4, deadline_ms=NOW_MS + slack_ms, alone=alone
    )


def decided(rows: Sequence[Row], cost: CostModel = typical, **state: Any) -> Run | Wait:
    defaults = {"now_ms": NOW_MS, "waited_ms": 0.0, "gap_ms": math.inf, "backlog": 0, "max_batch": 8}
    return decide(rows, cost_ms=cost, **{**defaults, **state})


def names(decision: Run | Wait) -> list[str]:
    assert isinstance(decision, Run)
    return [row.job_id for row in decision.rows]


# how many


def test_different_buckets_never_share_a_batch() -> None:
    rows = [row("a"), row("b", bucket=LARGE), row("c")]
    assert names(decided(rows)) == ["a", "c"]
    assert names(decided(rows[1:])) == ["b"]


def test_first_job_is_always_in_the_batch() -> None:
    rows = [row("first", bucket=LARGE), *(row(str(i)) for i in range(20))]
    assert names(decided(rows)) == ["first"]


def test_batch_never_exceeds_what_the_engine_takes() -> None:
    assert len(names(decided([row(str(i)) for i in range(20)], flat))) == 8
    assert len(names(decided([row(str(i)) for i in range(20)], flat, max_batch=2))) == 2


def test_samples_of_one_job_may_be_split_over_batches() -> None:
    rows = [row("a", i) for i in range(10)]
    decision = decided(rows, flat)
    assert isinstance(decision, Run)
    assert [each.index for each in decision.rows] == list(range(8))


def test_batching_that_does_not_pay_is_declined() -> None:
    rows = [row(str(i)) for i in range(8)]
    assert names(decided(rows, linear)) == ["0"]
    assert names(decided(rows, flat)) == [str(i) for i in range(8)]


def test_long_queue_is_cut_for_throughput_and_a_short_one_for_latency() -> None:
    # Two at once take as long as two in turn, four take much less than four in turn.
    def cost(batch: int) -> float:
        return {1: 10.0, 2: 20.0, 3: 24.0, 4: 26.0}[batch]

    assert best_batch(2, 4, cost) == 1
    assert best_batch(100, 4, cost) == 4


def test_retried_job_runs_alone() -> None:
    rows = [row("suspect", 0, alone=True), row("a"), row("suspect", 1, alone=True), row("other", alone=True)]
    assert names(decided(rows)) == ["suspect", "suspect"]
    assert names(decided(rows[1:])) == ["a"]
    assert names(decided(rows[:1], gap_ms=0.0)) == ["suspect"]


# when


def test_lone_job_runs_at_once_when_nobody_is_expected() -> None:
    assert isinstance(decided([row("a")], flat), Run)
    assert isinstance(decided([row("a")], flat, gap_ms=500.0), Run)


def test_job_waits_for_one_expected_within_half_its_own_time() -> None:
    assert decided([row("a")], flat, gap_ms=5.0) == Wait(20.0)


def test_batch_closes_when_its_oldest_job_has_waited_long_enough() -> None:
    assert decided([row("a")], flat, gap_ms=5.0, waited_ms=14.0) == Wait(6.0)
    assert isinstance(decided([row("a")], flat, gap_ms=5.0, waited_ms=16.0), Run)


def test_the_more_jobs_are_kept_waiting_the_less_they_wait() -> None:
    assert [longest_wait(k, lambda _: 40.0) for k in (1, 3, 7)] == [20.0, 10.0, 5.0]


def test_nobody_waits_for_an_engine_that_gains_nothing() -> None:
    assert longest_wait(1, lambda batch: 10.0 * batch) < 0
    assert isinstance(decided([row("a")], linear, gap_ms=0.0), Run)


def test_deadline_shortens_the_wait() -> None:
    assert decided([row("a", slack_ms=50)], flat, gap_ms=1.0) == Wait(10.0)
    assert isinstance(decided([row("a", slack_ms=30)], flat, gap_ms=1.0), Run)


def test_full_batch_and_backlog_do_not_wait() -> None:
    assert isinstance(decided([row(str(i)) for i in range(8)], flat, gap_ms=0.0), Run)
    assert isinstance(decided([row("a")], flat, gap_ms=0.0, backlog=3), Run)


def test_waiting_is_chosen_exactly_when_it_lowers_the_sum_of_finish_times() -> None:
    def cost(batch: int) -> float:
        return typical(SMALL, 4, batch)

    for held in range(1, 8):
        for gap in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
            rows = [row(str(i)) for i in range(held)]
            if len(names(decided(rows, typical))) < held:
                continue  # the batch is smaller than what is there: nothing to wait for
            together = (held + 1) * (gap + cost(held + 1))
            one_late = held * cost(held) + cost(held) + cost(1)
            waits = isinstance(decided(rows, typical, gap_ms=gap), Wait)
            assert waits == (together < one_late), (held, gap)


@given(
    jobs=st.lists(st.tuples(st.sampled_from([SMALL, LARGE]), st.booleans(), st.integers(1, 5)), min_size=1),
    cost=st.sampled_from([flat, linear, typical]),
    max_batch=st.integers(1, 9),
    gap_ms=st.floats(0, 100),
    backlog=st.integers(0, 50),
)
def test_every_batch_is_one_the_engine_can_run(
    jobs: list[tuple[Bucket, bool, int]], cost: CostModel, max_batch: int, gap_ms: float, backlog: int
) -> None:
    rows = [
        row(str(i), index, bucket=bucket, alone=alone)
        for i, (bucket, alone, num_samples) in enumerate(jobs)
        for index in range(num_samples)
    ]
    decision = decided(rows, cost, max_batch=max_batch, gap_ms=gap_ms, backlog=backlog)
    if isinstance(decision, Wait):
        assert 0 < decision.ms <= 40.0 / 2
        return
    batch = decision.rows
    assert 1 <= len(batch) <= max_batch
    assert batch[0] is rows[0]
    assert len({each.bucket for each in batch}) == 1
    assert len({each.job_id for each in batch}) == 1 or not any(each.alone for each in batch)
    assert list(batch) == [each for each in rows if each in set(batch)]


# arrivals


def test_one_pause_says_nothing_of_a_burst() -> None:
    arrivals = Arrivals()
    for at in (0, 2, 4, 6, 5_000, 5_002, 5_004):
        arrivals.observe(at)
    assert arrivals.gap_ms(5_004) == 2


def test_silence_makes_the_next_arrival_later() -> None:
    arrivals = Arrivals()
    assert arrivals.gap_ms(0) == math.inf
    arrivals.observe(0)
    assert arrivals.gap_ms(0) == math.inf
    arrivals.observe(10)
    assert arrivals.gap_ms(11) == 10
    assert arrivals.gap_ms(500) == 490


@pytest.mark.parametrize("order", [(0, 10, 5), (5, 0, 10)])
def test_arrivals_out_of_order_are_not_negative(order: tuple[int, ...]) -> None:
    arrivals = Arrivals()
    for at in order:
        arrivals.observe(at)
    assert arrivals.gap_ms(10) >= 0
