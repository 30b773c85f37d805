"""Batching: which leased samples run together, and whether to run them now or wait for more. Pure.

Everything follows from the bundle's measured cost curve `cost(n)`, ms for a batch of n, and from when the
last jobs arrived.

How many. Samples are cut into batches in the order they are served, and a job finishes with the batch that
its last sample is in. While a batch of n runs, all that wait lose cost(n): the jobs in hand that are not
finished, and those that will come before the engine is idle again. At an engine that is loaded to a share r
of what it can do, these are r / (1 - r) for each job in hand (the busy period of a queue). So the best cut
has the least sum of cost(n) times those who wait, and follows from the best cuts of what is left (dynamic
programming); only the last batch costs those to come no more than its samples at their cheapest, since they
will fill it up. For an idle engine that is the least mean finish time; the busier it is, the more it is the
most samples per ms. What gains nothing is not batched.

When. Say k samples of j jobs are in hand and another job comes after T ms. Waiting makes all j + 1 finish at
T + cost(k + 1); going ahead makes j finish at cost(k) and the late one at cost(k) + cost(1). So waiting
lowers the sum of finish times by cost(1) - (j + 1) (cost(k + 1) - cost(k)) - (j + 1) T; waiting for w ms in
vain raises it by j w. T is drawn from the gaps seen lately that are longer than the silence so far, so both
have an expectation, and we wait as long as that is best, or not at all. Where batches of k do not keep up
with the arrivals, with some headroom, the same is done for the engine's time: waiting wins
(k + 1) cost(k) / k - cost(k + 1) - T ms of it, or loses w.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

from engines.bundle.bucket import Bucket

CostModel = Callable[[Bucket, int, int], float]
"""(bucket, num_steps, batch) -> ms, above 0; `Manifest.predict_ms`."""

# A load is estimated from few arrivals: more than this is not told from a queue that grows for ever.
MAX_LOAD = 0.98
# To keep up with arrivals that bunch up, an engine must be this much faster than their mean rate.
HEADROOM = 1.25
# Times come in whole ms: what is due now may come within the next one.
TICK_MS = 1.0
# A queue longer than this many full batches is simply long.
MAX_BATCHES_AHEAD = 4


class Batchable(Protocol):
    """What the policy asks of a leased job."""

    @property
    def bucket(self) -> Bucket:
        """Only rows of one bucket run together."""

    @property
    def num_steps(self) -> int:
        """Denoiser calls per sample."""

    @property
    def deadline_ms(self) -> int:
        """Unix ms after which the job is not started."""

    @property
    def alone(self) -> bool:
        """It has been running when a worker died, and shares no batch with others again."""


J = TypeVar("J", bound=Batchable)
J_co = TypeVar("J_co", bound=Batchable, covariant=True)


@dataclass(frozen=True, slots=True)
class Row(Generic[J_co]):
    """One sample of a leased job, waiting or in a batch: sample `index` of it."""

    leased_job: J_co
    index: int


@dataclass(frozen=True, slots=True)
class Run(Generic[J_co]):
    """Draw these rows now, as one batch."""

    rows: tuple[Row[J_co], ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Take more jobs first, for at most `ms`."""

    ms: float


def decide(
    rows: Sequence[Row[J]],
    *,
    now_ms: float,
    waited_ms: float,
    next_ms: Sequence[float],
    rows_per_ms: float,
    lately_per_ms: float,
    backlog: int,
    max_batch: int,
    cost_ms: CostModel,
) -> Run[J] | Wait:
    """What an idle engine does next.

    Args:
        rows: at least one, in the order they are to be served.
        now_ms: unix ms.
        waited_ms: how long the engine has been idle with the first of these rows in hand.
        next_ms: equally likely times until the next job arrives; empty if none is expected.
        rows_per_ms: mean rate at which samples have been arriving here.
        lately_per_ms: the same over fewer jobs, which soon knows that a rush is over.
        backlog: samples that wait elsewhere for this or another worker.
        max_batch: most rows that run together, in the first row's bucket.
        cost_ms: the cost curve.
    """
    first = rows[0].leased_job
    if first.alone:
        return Run(tuple(row for row in rows if row.leased_job is first)[:max_batch])
    bucket = first.bucket
    fitting = [row for row in rows if row.leased_job.bucket == bucket and not row.leased_job.alone]
    num_steps = max(row.leased_job.num_steps for row in fitting[:max_batch])

    def cost(batch: int) -> float:
        return cost_ms(bucket, num_steps, batch)

    ends = _ends(fitting, backlog, MAX_BATCHES_AHEAD * max_batch)
    batch = tuple(fitting[: best_batch(ends, max_batch, rows_per_ms, cost)])
    if backlog or len(batch) == max_batch or len(batch) < len(fitting):
        return Run(batch)  # whoever could join is here or held by another worker: nobody to wait for
    slack_ms = min(row.leased_job.deadline_ms for row in batch) - now_ms - cost(len(batch) + 1)
    patience_ms = min(cost(1) - waited_ms, slack_ms)  # nobody is held back longer than one picture takes
    wait_ms = best_wait(len(batch), len(ends), next_ms, lately_per_ms, cost)
    return Wait(wait_ms) if 0 < wait_ms <= patience_ms else Run(batch)


def _ends(rows: Sequence[Row[J]], backlog: int, most: int) -> list[int]:
    """How many samples are drawn when each job is finished, rising; in the backlog each is a job.

    What lies beyond `most` is not looked at.
    """
    ends = [
        number
        for number, (one, after) in enumerate(pairwise(rows), 1)
        if one.leased_job is not after.leased_job
    ]
    ends += range(len(rows), max(len(rows), min(len(rows) + backlog, most)) + 1)
    return list(dict.fromkeys(min(end, most) for end in ends))


def best_batch(ends: Sequence[int], max_batch: int, rows_per_ms: float, cost: Callable[[int], float]) -> int:
    """The size, 1 to `max_batch`, of the first batch that samples are best cut into.

    Args:
        ends: how many of them are drawn when each of their jobs is finished, rising.
        max_batch: samples that run together.
        rows_per_ms: at which more come.
        cost: ms of a batch.
    """
    num_rows = ends[-1]
    costs = [0.0, *(cost(size) for size in range(1, max_batch + 1))]
    best_ms = min(costs[size] / size for size in range(1, max_batch + 1))  # of a sample
    load = min(rows_per_ms * best_ms, MAX_LOAD)
    to_come = len(ends) * load / (1 - load)
    unfinished = _unfinished(ends)
    least = [0.0] * (num_rows + 1)
    """Sum of what all lose from then on, by the number of samples that are drawn."""
    lost: list[float] = []
    for drawn in range(num_rows - 1, -1, -1):
        jobs, left = unfinished[drawn], num_rows - drawn
        lost = [
            (jobs + to_come) * costs[size] + least[drawn + size]
            for size in range(1, min(max_batch, left - 1) + 1)
        ]
        if left <= max_batch:  # others will fill it up
            lost.append(jobs * costs[left] + to_come * left * best_ms)
        least[drawn] = min(lost)
    return len(lost) - lost[::-1].index(least[0])  # of equals the largest: fewer calls for the same times


def _unfinished(ends: Sequence[int]) -> list[int]:
    """How many jobs are not finished, by the number of samples that are drawn."""
    counts, done = [], 0
    for drawn in range(ends[-1] + 1):
        while done < len(ends) and ends[done] <= drawn:
            done += 1
        counts.append(len(ends) - done)
    return counts


def best_wait(
    num_rows: int, num_jobs: int, next_ms: Sequence[float], rows_per_ms: float, cost: Callable[[int], float]
) -> float:
    """How long (ms) `num_rows` samples of so many jobs should wait for one more; 0 if they should not."""
    more = num_rows + 1
    saved_ms = cost(1) - (num_jobs + 1) * (cost(more) - cost(num_rows))
    wait_ms = _best_stop(next_ms, saved_ms, per_ms=num_jobs + 1, in_vain_per_ms=num_jobs)
    if num_rows / cost(num_rows) < HEADROOM * rows_per_ms:
        saved_ms = more * cost(num_rows) / num_rows - cost(more)
        wait_ms = max(wait_ms, _best_stop(next_ms, saved_ms, per_ms=1, in_vain_per_ms=1))
    return wait_ms


def _best_stop(next_ms: Sequence[float], saved: float, *, per_ms: float, in_vain_per_ms: float) -> float:
    """The wait with the greatest expected gain, 0 if every one loses.

    An arrival after T, within the wait w, gains `saved - per_ms * T`; none loses `in_vain_per_ms * w`.
    """
    arrivals = sorted(next_ms)
    best_ms, most, gained = 0.0, 0.0, 0.0
    for num_caught, wait_ms in enumerate(arrivals, start=1):
        gained += saved - per_ms * wait_ms
        gain = gained - (len(arrivals) - num_caught) * in_vain_per_ms * wait_ms
        if gain > most:
            best_ms, most = wait_ms, gain
    return best_ms


class Arrivals:
    """What to expect of the next jobs, from when the last ones were accepted."""

    def __init__(self, num_gaps: int = 20, num_jobs: int = 60) -> None:
        """Goes by the last `num_gaps` jobs for when the next one comes, by `num_jobs` for their rate."""
        self._num_gaps = num_gaps
        self._accepted: deque[tuple[float, int]] = deque(maxlen=num_jobs)

    def observe(self, accepted_ms: float, num_rows: int = 1) -> None:
        """Note one job of `num_rows` samples."""
        last_ms = self._accepted[-1][0] if self._accepted else accepted_ms
        self._accepted.append((max(accepted_ms, last_ms), num_rows))

    def next_ms(self, now_ms: float) -> list[float]:
        """Equally likely times until the next job: the rest of each gap longer than the silence so far."""
        times = [accepted_ms for accepted_ms, _ in self._accepted][-self._num_gaps :]
        if not times:
            return []
        silence_ms = max(0.0, now_ms - times[-1])
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return [max(gap - silence_ms, TICK_MS) for gap in gaps if gap >= silence_ms]

    def rows_per_ms(self, now_ms: float) -> float:
        """Mean rate of samples; 0 if nothing is known."""
        return _rate(self._accepted, now_ms)

    def lately_per_ms(self, now_ms: float) -> float:
        """The same over the jobs that `next_ms` goes by."""
        return _rate(list(self._accepted)[-self._num_gaps :], now_ms)


def _rate(accepted: Sequence[tuple[float, int]], now_ms: float) -> float:
    if len(accepted) < 2:
        return 0.0
    return sum(rows for _, rows in accepted) / max(1.0, now_ms - accepted[0][0])
