"""What runs together and when, on cost curves of engines that like batches and of ones that do not."""

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.bundle.bucket import Bucket
from server.worker.batch_policy import (
    Arrivals,
    CostModel,
    Row,
    Run,
    Wait,
    best_batch,
    best_wait,
    decide,
)

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


@dataclass(frozen=True)
class Leased:
    """What the policy sees of a leased job."""

    name: str
    bucket: Bucket = SMALL
    num_steps: int = 4
    deadline_ms: int = NOW_MS + 60_000
    alone: bool = False


def row(name: str, *, slack_ms: int = 60_000, **job: Any) -> Row[Leased]:
    """The one sample of a job."""
    return Row(Leased(name, deadline_ms=NOW_MS + slack_ms, **job), 0)


def rows_of(name: str, num_samples: int, **job: Any) -> list[Row[Leased]]:
    """The samples of a job."""
    leased_job = Leased(name, **job)
    return [Row(leased_job, index) for index in range(num_samples)]


def decided(rows: Sequence[Row[Leased]], cost: CostModel = typical, **state: Any) -> Run[Leased] | Wait:
    quiet = {"waited_ms": 0.0, "next_ms": (), "rows_per_ms": 0.0, "backlog": 0}
    state = {"now_ms": NOW_MS, "max_batch": 8, **quiet, **state}
    return decide(rows, cost_ms=cost, **{"lately_per_ms": state["rows_per_ms"], **state})


def singles(num_jobs: int) -> range:
    """Where jobs of one sample end."""
    return range(1, num_jobs + 1)


def names(decision: Run[Leased] | Wait) -> list[str]:
    assert isinstance(decision, Run)
    return [row.leased_job.name for row in decision.rows]


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
    rows = rows_of("a", 10)
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

    assert best_batch(singles(2), 4, 0.0, cost) == 1
    assert best_batch(singles(32), 4, 0.0, cost) == 4


def test_samples_of_one_job_are_drawn_together_although_the_first_would_be_ready_sooner() -> None:
    def cost(batch: int) -> float:
        return 10.0 + 10.0 * batch

    assert best_batch(singles(8), 8, 0.0, cost) < 5
    assert best_batch([8], 8, 0.0, cost) == 8
    assert best_batch([1, 9], 9, 0.0, cost) == 1  # a job of eight keeps nobody who is before it
    assert best_batch([8, 9], 9, 0.0, cost) in (8, 9)
    rows = [*rows_of("eight", 8), row("one")]
    assert len(names(decided(rows, typical))) == 8


@settings(deadline=None)
@given(
    num_samples=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    max_batch=st.integers(1, 6),
    start_ms=st.floats(0, 30),
)
def test_no_other_cut_has_jobs_finish_sooner(num_samples: list[int], max_batch: int, start_ms: float) -> None:
    def cost(batch: int) -> float:
        return start_ms + 7.0 * batch

    def cuts(num_rows: int) -> Iterator[tuple[int, ...]]:
        if num_rows == 0:
            yield ()
        for size in range(1, min(num_rows, max_batch) + 1):
            yield from ((size, *rest) for rest in cuts(num_rows - size))

    ends = list(accumulate(num_samples))

    def sum_of_finish_times(cut: tuple[int, ...]) -> float:
        drawn, after_ms = list(accumulate(cut)), list(accumulate(map(cost, cut)))
        return sum(after_ms[bisect_left(drawn, end)] for end in ends)

    first = best_batch(ends, max_batch, 0.0, cost)
    ours = min(sum_of_finish_times(cut) for cut in cuts(ends[-1]) if cut[0] == first)
    assert ours == pytest.approx(min(map(sum_of_finish_times, cuts(ends[-1]))))


def test_the_more_is_to_come_the_more_a_batch_does_in_its_time() -> None:
    def cost(batch: int) -> float:
        return typical(SMALL, 4, batch)

    most_per_ms = 8 / cost(8)
    loads = (0.0, 0.3, 0.6, 0.9, 1.5)
    sizes = [best_batch(singles(11), 8, load * most_per_ms, cost) for load in loads]
    assert sizes == sorted(sizes)
    assert sizes[0] < 6
    assert sizes[-1] == 8
    assert {best_batch(singles(11), 8, load, lambda batch: 10.0 * batch) for load in loads} == {1}


def test_engine_that_would_fall_behind_takes_the_batch_with_the_most_samples_per_ms() -> None:
    def cost(batch: int) -> float:
        return 5.0 + 5.0 * batch

    assert best_batch(singles(4), 8, 0.0, cost) == 3
    assert best_batch(singles(4), 8, 0.16, cost) == 4
    assert best_batch(singles(4), 8, 0.16, lambda batch: 10.0 * batch) == 1  # batching would not help it


def test_retried_job_runs_alone() -> None:
    first, second = rows_of("suspect", 2, alone=True)
    rows = [first, row("a"), second, row("other", alone=True)]
    assert names(decided(rows)) == ["suspect", "suspect"]
    assert names(decided(rows[1:])) == ["a"]
    assert names(decided(rows[:1], next_ms=[0.1])) == ["suspect"]


# when


def test_lone_job_runs_at_once_when_nobody_is_expected_soon() -> None:
    assert isinstance(decided([row("a")], flat), Run)
    assert isinstance(decided([row("a")], flat, next_ms=[25.0]), Run)


def test_job_waits_for_one_that_comes_within_half_its_own_time() -> None:
    assert decided([row("a")], flat, next_ms=[15.0]) == Wait(15.0)


def test_the_more_jobs_are_kept_waiting_the_sooner_the_next_must_come() -> None:
    assert [best_wait(k, k, [9.0], 0.0, lambda _: 40.0) for k in (1, 3, 4)] == [9.0, 9.0, 0.0]
    assert best_wait(4, 1, [9.0], 0.0, lambda _: 40.0) == 9.0  # four of one job: it alone is kept


def test_burst_is_waited_for_only_as_long_as_it_lasts() -> None:
    burst_then_pause = [1.0] * 5 + [500.0] * 5
    assert decided([row("a"), row("b")], flat, next_ms=burst_then_pause) == Wait(1.0)
    assert isinstance(decided([row("a"), row("b")], flat, next_ms=[499.0] * 5), Run)


def test_nobody_waits_for_what_is_unlikely_to_come() -> None:
    assert isinstance(decided([row("a")], flat, next_ms=[10.0] + [500.0] * 9), Run)


def test_nobody_is_held_back_longer_than_one_picture_takes() -> None:
    assert decided([row("a")], flat, next_ms=[5.0], waited_ms=35.0) == Wait(5.0)
    assert isinstance(decided([row("a")], flat, next_ms=[5.0], waited_ms=36.0), Run)


def test_nobody_waits_for_an_engine_that_gains_nothing() -> None:
    for rate in (0.0, 10.0):
        assert isinstance(decided([row("a")], linear, next_ms=[0.1], rows_per_ms=rate), Run)


def test_engine_that_falls_behind_waits_if_that_gives_more_samples_per_ms() -> None:
    def cost(batch: int) -> float:
        return 5.0 + 5.0 * batch

    assert best_wait(1, 1, [1.0], 0.0, cost) == 0.0
    assert best_wait(1, 1, [1.0], 0.2, cost) == 1.0
    assert best_wait(1, 1, [6.0], 0.2, cost) == 0.0


def test_deadline_forbids_a_wait_that_would_miss_it() -> None:
    assert decided([row("a", slack_ms=50)], flat, next_ms=[5.0]) == Wait(5.0)
    assert isinstance(decided([row("a", slack_ms=44)], flat, next_ms=[5.0]), Run)


def test_full_batch_and_backlog_do_not_wait() -> None:
    assert isinstance(decided([row(str(i)) for i in range(8)], flat, next_ms=[0.1]), Run)
    assert isinstance(decided([row("a")], flat, next_ms=[0.1], backlog=3), Run)


def test_waiting_for_a_sure_arrival_is_chosen_exactly_when_it_lowers_the_sum_of_finish_times() -> None:
    def cost(batch: int) -> float:
        return typical(SMALL, 4, batch)

    for held in range(1, 8):
        for gap_ms in (0.5, 1.0, 2.0, 3.0, 5.0, 8.0):
            together = (held + 1) * (gap_ms + cost(held + 1))
            one_late = held * cost(held) + cost(held) + cost(1)
            assert best_wait(held, held, [gap_ms], 0.0, cost) == (gap_ms if together < one_late else 0.0)


@given(
    jobs=st.lists(st.tuples(st.sampled_from([SMALL, LARGE]), st.booleans(), st.integers(1, 5)), min_size=1),
    cost=st.sampled_from([flat, linear, typical]),
    max_batch=st.integers(1, 9),
    next_ms=st.lists(st.floats(0, 100), max_size=9),
    rows_per_ms=st.floats(0, 2),
    backlog=st.integers(0, 50),
)
def test_every_batch_is_one_the_engine_can_run(
    jobs: list[tuple[Bucket, bool, int]],
    cost: CostModel,
    max_batch: int,
    next_ms: list[float],
    rows_per_ms: float,
    backlog: int,
) -> None:
    rows = [
        row
        for i, (bucket, alone, num_samples) in enumerate(jobs)
        for row in rows_of(str(i), num_samples, bucket=bucket, alone=alone)
    ]
    decision = decided(
        rows, cost, max_batch=max_batch, next_ms=next_ms, rows_per_ms=rows_per_ms, backlog=backlog
    )
    if isinstance(decision, Wait):
        assert 0 < decision.ms <= cost(SMALL, 4, 1)
        return
    batch = decision.rows
    assert 1 <= len(batch) <= max_batch
    assert batch[0] is rows[0]
    together = {each.leased_job for each in batch}
    assert len({job.bucket for job in together}) == 1
    assert len(together) == 1 or not any(job.alone for job in together)
    assert list(batch) == [each for each in rows if each in set(batch)]


# both together


def closed_loop(cost: Callable[[int], float], num_clients: int, *, think_ms: float, max_batch: int) -> float:
    """Samples per ms of a simulated engine whose clients ask again about `think_ms` after each answer."""
    rng = random.Random(0)
    arrivals, now_ms = Arrivals(), 0.0
    coming = [(rng.uniform(0, cost(1)), str(i)) for i in range(num_clients)]  # when, who
    held: list[tuple[float, str]] = []
    idle_since: float | None = None
    finished, num_samples = 0, 4_000
    while finished < num_samples:
        coming.sort()
        while coming and coming[0][0] <= now_ms:
            held.append(coming.pop(0))
            arrivals.observe(held[-1][0])
        if not held:
            now_ms, idle_since = coming[0][0], None
            continue
        idle_since = now_ms if idle_since is None else idle_since
        decision = decide(
            [row(who, slack_ms=10**9) for _, who in held],
            now_ms=now_ms,
            waited_ms=now_ms - idle_since,
            next_ms=arrivals.next_ms(now_ms),
            rows_per_ms=arrivals.rows_per_ms(now_ms),
            lately_per_ms=arrivals.lately_per_ms(now_ms),
            backlog=0,
            max_batch=max_batch,
            cost_ms=lambda _bucket, _steps, batch: cost(batch),
        )
        if isinstance(decision, Wait):
            now_ms = min([now_ms + decision.ms, *(when for when, _ in coming)])
            continue
        drawn = {each.leased_job.name for each in decision.rows}
        now_ms, idle_since = now_ms + cost(len(drawn)), None
        held = [each for each in held if each[1] not in drawn]
        coming += [(now_ms + rng.uniform(0.5, 1.5) * think_ms, who) for who in sorted(drawn)]
        finished += len(drawn)
    return finished / now_ms


@pytest.mark.parametrize("num_clients", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("start_ms", "row_ms"), [(20.0, 1.0), (10.0, 5.0), (5.0, 5.0), (0.0, 10.0)])
def test_busy_clients_get_nearly_all_that_the_engine_can_give(
    num_clients: int, start_ms: float, row_ms: float
) -> None:
    def cost(batch: int) -> float:
        return start_ms + row_ms * batch

    def best_of(size: int) -> float:
        """All clients in one batch each time; or fewer at once, the others meanwhile asking again."""
        return size / (cost(size) + (1.0 if size == num_clients else 0.0))

    best = max(best_of(size) for size in range(1, min(num_clients, 8) + 1))
    assert closed_loop(cost, num_clients, think_ms=1.0, max_batch=8) > 0.9 * best


def test_lone_client_is_never_kept_waiting_for_company() -> None:
    rate = closed_loop(lambda batch: 20.0 + batch, 1, think_ms=1.0, max_batch=8)
    assert rate > 0.99 / (21.0 + 1.0)


# arrivals


def test_next_job_comes_after_one_of_the_last_gaps_that_the_silence_has_not_ruled_out() -> None:
    arrivals = Arrivals()
    assert arrivals.next_ms(0) == []
    for at in (0, 2, 4, 6, 506):
        arrivals.observe(at)
    assert arrivals.next_ms(506) == [2, 2, 2, 500]
    assert arrivals.next_ms(516) == [490]
    assert arrivals.next_ms(1_100) == []


def test_rate_counts_samples_and_falls_with_silence() -> None:
    arrivals = Arrivals()
    assert arrivals.rows_per_ms(0) == 0
    arrivals.observe(0, num_rows=1)
    arrivals.observe(10, num_rows=4)
    assert arrivals.rows_per_ms(10) == 0.5
    assert arrivals.rows_per_ms(500) == 0.01


@pytest.mark.parametrize("order", [(0, 10, 5), (5, 0, 10)])
def test_arrivals_out_of_order_are_not_negative(order: tuple[int, ...]) -> None:
    arrivals = Arrivals()
    for at in order:
        arrivals.observe(at)
    assert min(arrivals.next_ms(10)) > 0
    assert arrivals.rows_per_ms(10) > 0


def test_rush_that_is_over_holds_nobody_back() -> None:
    """After it one in a second would still wait for company, were the rate taken over as many jobs as batches
    are cut by.
    """
    arrivals = Arrivals()
    rush = range(0, 600, 10)
    after = (1_000, 1_400, 1_800)
    for at in (*rush, *after):
        arrivals.observe(at)

    def decision(lately_per_ms: float) -> Run[Any] | Wait:
        return decide(
            [row("alone")],
            now_ms=1_800,
            waited_ms=0.0,
            next_ms=arrivals.next_ms(1_800),
            rows_per_ms=arrivals.rows_per_ms(1_800),
            lately_per_ms=lately_per_ms,
            backlog=0,
            max_batch=8,
            cost_ms=typical,
        )

    assert isinstance(decision(arrivals.rows_per_ms(1_800)), Wait)
    assert isinstance(decision(arrivals.lately_per_ms(1_800)), Run)


def test_however_long_the_backlog_a_decision_looks_no_further_than_it_must() -> None:
    def decision(backlog: int) -> Run[Any] | Wait:
        return decide(
            [row(name) for name in "abcdefgh"],
            now_ms=NOW_MS,
            waited_ms=0.0,
            next_ms=[],
            rows_per_ms=0.01,
            lately_per_ms=0.01,
            backlog=backlog,
            max_batch=8,
            cost_ms=typical,
        )

    assert decision(10**15) == decision(10_000)
