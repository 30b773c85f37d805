"""Batching: which leased samples run together, and whether to run them now or wait for one more. Pure.

Everything follows from the bundle's measured cost curve `cost(n)`, ms for a batch of n:

How many. `m` samples cut into batches of n finish one batch after another. The batch size is the one with
the least mean finish time. For a short queue that is a compromise; for a long one it tends to the least
cost(n) / n, which is throughput; and where n together take as long as n in turn, it is 1.

When. With k samples in hand and the next expected in `gap` ms, waiting for it makes all k + 1 finish at
gap + cost(k + 1); going ahead makes k finish at cost(k) and the late one at cost(k) + cost(1). The sum of
finish times is less with waiting exactly if gap < cost(1) / (k + 1) - (cost(k + 1) - cost(k)). That bound,
less what has been waited already, is also how long to wait at most; each sample's deadline shortens it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from engines.bucket import Bucket

CostModel = Callable[[Bucket, int, int], float]
"""(bucket, num_steps, batch) -> ms; `Manifest.predict_ms`."""

# A queue longer than this many full batches is simply long.
MAX_BATCHES_AHEAD = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sample of a leased job that waits to be drawn.

    Attributes:
        index: which of the job's samples.
        alone: the job has already been running when a worker died, and shares no batch with others again.
    """

    job_id: str
    index: int
    bucket: Bucket
    num_steps: int
    deadline_ms: int
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Draw these rows now, as one batch."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Take more jobs first, for at most `ms`."""

    ms: float


def decide(
    rows: Sequence[Row],
    *,
    now_ms: float,
    waited_ms: float,
    gap_ms: float,
    backlog: int,
    max_batch: int,
    cost_ms: CostModel,
) -> Run | Wait:
    """What an idle engine does next.

    Args:
        rows: at least one, in the order they are to be served.
        now_ms: unix ms.
        waited_ms: how long the engine has been idle with the first of these rows in hand.
        gap_ms: when the next job is expected to arrive; inf if none is.
        backlog: samples that wait elsewhere for this or another worker.
        max_batch: most rows that run together, in the first row's bucket.
        cost_ms: the cost curve.
    """
    first = rows[0]
    if first.alone:
        return Run(tuple(row for row in rows if row.job_id == first.job_id)[:max_batch])
    fitting = [row for row in rows if row.bucket == first.bucket and not row.alone]
    num_steps = max(row.num_steps for row in fitting[:max_batch])

    def cost(batch: int) -> float:
        return cost_ms(first.bucket, num_steps, batch)

    size = best_batch(len(fitting) + backlog, max_batch, cost)
    batch = tuple(fitting[:size])
    if backlog or len(batch) == max_batch or len(batch) < len(fitting):
        return Run(batch)  # whoever could join is here or held by another worker: nobody to wait for
    patience_ms = longest_wait(len(batch), cost) - waited_ms
    slack_ms = min(row.deadline_ms for row in batch) - now_ms - cost(len(batch) + 1)
    wait_ms = min(patience_ms, slack_ms)
    return Wait(wait_ms) if gap_ms < wait_ms else Run(batch)


def best_batch(num_rows: int, max_batch: int, cost: Callable[[int], float]) -> int:
    """The batch size with the least mean finish time for `num_rows`; the largest of equals."""
    num_rows = min(num_rows, MAX_BATCHES_AHEAD * max_batch)
    sizes = range(min(num_rows, max_batch), 0, -1)
    return min(sizes, key=lambda size: _sum_of_finish_times(num_rows, size, cost))


def longest_wait(num_rows: int, cost: Callable[[int], float]) -> float:
    """How soon (ms) another row must come for waiting to pay; 0 or less where it never does."""
    return cost(1) / (num_rows + 1) - (cost(num_rows + 1) - cost(num_rows))


def _sum_of_finish_times(num_rows: int, size: int, cost: Callable[[int], float]) -> float:
    full, rest = divmod(num_rows, size)
    last = rest * (full * cost(size) + cost(rest)) if rest else 0.0
    return size * cost(size) * full * (full + 1) / 2 + last


class Arrivals:
    """When to expect the next job, from when the last ones were accepted."""

    def __init__(self, num_gaps: int = 15) -> None:
        """Go by the median of the last `num_gaps` gaps: one long pause says nothing of a burst."""
        self._gaps_ms: deque[float] = deque(maxlen=num_gaps)
        self._last_ms: float | None = None

    def observe(self, accepted_ms: float) -> None:
        """Note one job."""
        if self._last_ms is not None:
            self._gaps_ms.append(max(0.0, accepted_ms - self._last_ms))
        self._last_ms = max(accepted_ms, self._last_ms or accepted_ms)

    def gap_ms(self, now_ms: float) -> float:
        """Time until the next job; inf with nothing to go by. The longer nothing comes, the later it is."""
        if not self._gaps_ms or self._last_ms is None:
            return math.inf
        return max(median(self._gaps_ms), now_ms - self._last_ms)
