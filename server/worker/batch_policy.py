"""Batching: which leased samples run together, and whether to run them now or wait for more. Pure.

Everything follows from the bundle's measured cost curve `cost(n)`, ms for a batch of n, and from when the
last jobs arrived.

How many. `m` samples cut into batches of n finish one batch after another; the best n is the one with the
least mean finish time. That holds as long as batches of n keep up with the arrivals: n / cost(n) must exceed
their rate, with some headroom. Where no n does, the queue grows whatever we do, so the n with the most
samples per ms is best; of those as good as equal the smallest: what gains nothing is not batched.

When. Say k samples are in hand and another comes after T ms. Waiting makes all k + 1 finish at
T + cost(k + 1); going ahead makes k finish at cost(k) and the late one at cost(k) + cost(1). So waiting
lowers the sum of finish times by cost(1) - (k + 1) (cost(k + 1) - cost(k)) - (k + 1) T; waiting for w ms in
vain raises it by k w. T is drawn from the gaps seen lately that are longer than the silence so far, so both
have an expectation, and we wait as long as that is best, or not at all. Where k do not keep up, the same is
done for the engine's time: waiting wins (k + 1) cost(k) / k - cost(k + 1) - T ms of it, or loses w.
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

# To keep up with arrivals that bunch up, an engine must be this much faster than their mean rate.
HEADROOM = 1.25
# Rates closer than this are equal: the cost curve is a measurement.
EQUAL = 0.98
# Times come in whole ms: what is due now may come within the next one.
TICK_MS = 1.0
# A queue longer than this many full batches is simply long.
MAX_BATCHES_AHEAD = 8


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

    batch = tuple(fitting[: best_batch(len(fitting) + backlog, max_batch, rows_per_ms, cost)])
    if backlog or len(batch) == max_batch or len(batch) < len(fitting):
        return Run(batch)  # whoever could join is here or held by another worker: nobody to wait for
    slack_ms = min(row.leased_job.deadline_ms for row in batch) - now_ms - cost(len(batch) + 1)
    patience_ms = min(cost(1) - waited_ms, slack_ms)  # nobody is held back longer than one picture takes
    wait_ms = best_wait(len(batch), next_ms, rows_per_ms, cost)
    return Wait(wait_ms) if 0 < wait_ms <= patience_ms else Run(batch)


def best_batch(num_rows: int, max_batch: int, rows_per_ms: float, cost: Callable[[int], float]) -> int:
    """The size, 1 to `max_batch`, of the batches that `num_rows` samples are best cut into."""
    num_rows = min(num_rows, MAX_BATCHES_AHEAD * max_batch)
    sizes = range(1, min(num_rows, max_batch) + 1)
    sustaining = [size for size in sizes if _keeps_up(size, rows_per_ms, cost)]
    if sustaining:  # the largest of equals: fewer calls for the same finish times
        return min(reversed(sustaining), key=lambda size: _sum_of_finish_times(num_rows, size, cost))
    most = max(size / cost(size) for size in sizes)
    return next(size for size in sizes if size / cost(size) >= EQUAL * most)


def best_wait(
    num_rows: int, next_ms: Sequence[float], rows_per_ms: float, cost: Callable[[int], float]
) -> float:
    """How long (ms) `num_rows` samples should wait for one more; 0 if they should not."""
    more = num_rows + 1
    saved_ms = cost(1) - more * (cost(more) - cost(num_rows))
    wait_ms = _best_stop(next_ms, saved_ms, per_ms=more, in_vain_per_ms=num_rows)
    if not _keeps_up(num_rows, rows_per_ms, cost):
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


def _keeps_up(size: int, rows_per_ms: float, cost: Callable[[int], float]) -> bool:
    return size / cost(size) >= HEADROOM * rows_per_ms


def _sum_of_finish_times(num_rows: int, size: int, cost: Callable[[int], float]) -> float:
    full, rest = divmod(num_rows, size)
    last = rest * (full * cost(size) + cost(rest)) if rest else 0.0
    return size * cost(size) * full * (full + 1) / 2 + last


class Arrivals:
    """What to expect of the next jobs, from when the last ones were accepted."""

    def __init__(self, num_jobs: int = 20) -> None:
        """Goes by the last `num_jobs` jobs."""
        self._accepted: deque[tuple[float, int]] = deque(maxlen=num_jobs)

    def observe(self, accepted_ms: float, num_rows: int = 1) -> None:
        """Note one job of `num_rows` samples."""
        last_ms = self._accepted[-1][0] if self._accepted else accepted_ms
        self._accepted.append((max(accepted_ms, last_ms), num_rows))

    def next_ms(self, now_ms: float) -> list[float]:
        """Equally likely times until the next job: the rest of each gap longer than the silence so far."""
        times = [accepted_ms for accepted_ms, _ in self._accepted]
        if not times:
            return []
        silence_ms = max(0.0, now_ms - times[-1])
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return [max(gap - silence_ms, TICK_MS) for gap in gaps if gap >= silence_ms]

    def rows_per_ms(self, now_ms: float) -> float:
        """Mean rate of samples; 0 if nothing is known."""
        if len(self._accepted) < 2:
            return 0.0
        return sum(rows for _, rows in self._accepted) / max(1.0, now_ms - self._accepted[0][0])
