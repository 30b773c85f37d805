"""Simulation: how long requests take at workers that follow the real batch policy. Pure.

Requests come at random moments (a Poisson process) or at given ones, and wait in one queue, as the dispatch
windows are short. An idle worker takes what it has room for and asks `batch_policy.decide`; a batch takes
what the bundle's latency table says. What is beside the engine (HTTP, queue, packing, storing) is a constant.
"""

from __future__ import annotations

import bisect
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from engines.bundle.bucket import Bucket
from server.worker.batch_policy import Arrivals, Row, Run, Wait, decide

# Only sizes and steps that are alike run together, so one of each is enough to plan with.
_BUCKET = Bucket(64, 64)
NEVER_MS = 1 << 62
Policy = Callable[..., Run[Any] | Wait]
"""Takes and returns what `batch_policy.decide` does."""


@dataclass(eq=False, slots=True)
class SimulatedJob:
    """A request: what `Batchable` asks for, when it came (ms), and how many of its samples are unfinished."""

    came_ms: float
    num_left: int
    bucket: Bucket = _BUCKET
    num_steps: int = 1
    deadline_ms: int = NEVER_MS
    alone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a simulation.

    Attributes:
        latencies_ms: of each request that came after the warm-up, sorted.
        busy: mean share of the time in which a worker's engine ran.
        mean_batch: samples in a batch.
        span_ms: from the first arrival that counts to the last end.
    """

    latencies_ms: tuple[float, ...]
    busy: float
    mean_batch: float
    span_ms: float

    def percentile_ms(self, percent: float) -> float:
        """The latency that `percent` of the requests do not exceed."""
        index = min(len(self.latencies_ms) - 1, int(len(self.latencies_ms) * percent / 100))
        return self.latencies_ms[index]


def poisson(rate_per_s: float, count: int, seed: int) -> Iterator[float]:
    """Moments (ms) of `count` arrivals at a mean rate."""
    rng, now_ms = random.Random(seed), 0.0
    for _ in range(count):
        now_ms += rng.expovariate(rate_per_s / 1000)
        yield now_ms


def simulate(
    arrivals_ms: Iterable[float],
    *,
    batch_ms: Callable[[int], float],
    max_batch: int,
    num_workers: int,
    num_samples: int = 1,
    beside_ms: float = 0.0,
    warm_up: float = 0.1,
) -> Outcome:
    """Let a fleet serve requests.

    Args:
        arrivals_ms: when they come, rising.
        batch_ms: what a batch of so many samples takes.
        max_batch: samples that one worker runs at once.
        num_workers: at least 1.
        num_samples: of each request.
        beside_ms: what a request takes beside waiting and the engine.
        warm_up: share of the requests, from the first on, that do not count: they find an empty fleet.

    Raises:
        ValueError: no request, or none that counts.
    """
    fleet = Fleet(batch_ms, max_batch, num_workers)
    jobs = [SimulatedJob(came_ms, num_samples) for came_ms in arrivals_ms]
    counted = jobs[int(len(jobs) * warm_up) :]
    if not counted:
        raise ValueError("a simulation needs requests")
    ends = fleet.serve(jobs)
    begun_ms, span_ms = counted[0].came_ms, max(ends.values()) - counted[0].came_ms
    busy_ms = sum(end - max(start, begun_ms) for start, end, _ in fleet.runs if end > begun_ms)
    return Outcome(
        latencies_ms=tuple(sorted(ends[job] - job.came_ms + beside_ms for job in counted)),
        busy=busy_ms / (num_workers * span_ms),
        mean_batch=sum(size for *_, size in fleet.runs) / len(fleet.runs),
        span_ms=span_ms,
    )


@dataclass(eq=False, slots=True)
class _Worker:
    """What it has leased and not yet run, since when it has been idle with that, and what it saw come."""

    held: list[Row[SimulatedJob]] = field(default_factory=list)
    idle_since_ms: float | None = None
    """None while it starts, or its engine runs."""
    looks: int = 0
    """Number of its last look: a wake-up that was set before is out of date."""
    leaves: bool = False
    arrivals: Arrivals = field(default_factory=Arrivals)


class Fleet:
    """Workers, the queue before them, and what happens next. `control` may `add` and `remove` some."""

    def __init__(
        self,
        batch_ms: Callable[[int], float],
        max_batch: int,
        num_workers: int,
        policy: Policy = decide,
    ) -> None:
        """Begins at 0 ms with idle workers; arguments as of `simulate`, and what to compare `decide` with."""
        self.runs: list[tuple[float, float, int]] = []
        """Start and end (ms) and number of samples of each batch."""
        self._batch_ms = cache(batch_ms)  # asked a few times for each arrival
        self._max_batch = max_batch
        self._policy = policy
        self._workers = [_Worker(idle_since_ms=0.0) for _ in range(num_workers)]
        self._queue: deque[Row[SimulatedJob]] = deque()
        self._ends: dict[SimulatedJob, float] = {}
        self._events: list[tuple[float, int, _Worker, tuple[Row[SimulatedJob], ...] | int | None]] = []
        self._serial = 0
        self._came_ms: list[float] = []
        self._came_samples: list[int] = []

    @property
    def num_workers(self) -> int:
        """Those that serve or start."""
        return sum(not worker.leaves for worker in self._workers)

    @property
    def backlog_ms(self) -> float:
        """Predicted engine time, in full batches, of the samples that wait: `tdm_queue_backlog_seconds`."""
        waiting = len(self._queue) + sum(len(worker.held) for worker in self._workers)
        return waiting * self._batch_ms(self._max_batch) / self._max_batch

    def offered(self, since_ms: float, now_ms: float) -> float:
        """Engine time, in full batches, that came in: the rate of `tdm_accepted_work_seconds_total`."""
        first = bisect.bisect_left(self._came_ms, since_ms)
        samples = sum(self._came_samples[first:])
        return samples * self._batch_ms(self._max_batch) / self._max_batch / (now_ms - since_ms)

    def busy(self, since_ms: float, now_ms: float) -> float:
        """Mean number of engines that ran: the rate of `tdm_output_engine_seconds_sum`."""
        busy_ms = 0.0
        for start, end, _ in reversed(self.runs):
            if now_ms - start > 10 * (now_ms - since_ms):
                break
            busy_ms += max(0.0, min(end, now_ms) - max(start, since_ms))
        return busy_ms / (now_ms - since_ms)

    def add(self, ready_ms: float) -> None:
        """Start a worker that will serve from a moment on."""
        worker = _Worker()
        self._workers.append(worker)
        self._at(ready_ms, worker, None)

    def remove(self) -> None:
        """Have a worker end after its batch, the one that came last; what it has not begun goes back."""
        staying = [worker for worker in self._workers if not worker.leaves]
        worker = staying[-1]
        worker.leaves = True
        worker.looks += 1
        self._queue.extendleft(reversed(worker.held))
        worker.held = []
        if worker.idle_since_ms is not None:
            self._workers.remove(worker)

    def serve(
        self,
        jobs: Iterable[SimulatedJob],
        control: Callable[[float], None] = lambda _: None,
        period_ms: float = math.inf,
    ) -> dict[SimulatedJob, float]:
        """When (ms) each job is finished.

        Args:
            jobs: in the order in which they come.
            control: called with the time (ms) in every period while jobs still come.
            period_ms: from one call to the next.
        """
        coming, due_ms = iter(jobs), period_ms
        job = next(coming, None)
        while job is not None or self._events:
            next_ms = min(job.came_ms if job else math.inf, self._events[0][0] if self._events else math.inf)
            if job is not None and due_ms <= next_ms:
                control(due_ms)
                due_ms += period_ms
            elif job is not None and job.came_ms == next_ms:
                self._come(job)
                job = next(coming, None)
            else:
                self._happen(*heapq.heappop(self._events))
        return self._ends

    def _happen(
        self, now_ms: float, _: int, worker: _Worker, what: tuple[Row[SimulatedJob], ...] | int | None
    ) -> None:
        if isinstance(what, int):
            if what != worker.looks or worker.idle_since_ms is None:
                return
        elif what is not None:
            self._finish(what, now_ms)
        if not isinstance(what, int):
            worker.idle_since_ms = now_ms
        self._look(worker, now_ms)

    def _come(self, job: SimulatedJob) -> None:
        self._came_ms.append(job.came_ms)
        self._came_samples.append(job.num_left)
        self._queue.extend(Row(job, index) for index in range(job.num_left))
        idle = [worker for worker in self._workers if worker.idle_since_ms is not None and not worker.leaves]
        if idle:  # whoever waits for one more gets it
            self._look(max(idle, key=lambda worker: len(worker.held)), job.came_ms)

    def _look(self, worker: _Worker, now_ms: float) -> None:
        """Have an idle worker take what it has room for, and decide."""
        if worker.leaves:
            self._workers.remove(worker)
            return
        worker.looks += 1
        while self._queue and len(worker.held) < self._max_batch:
            row = self._queue.popleft()
            if row.index == 0:
                worker.arrivals.observe(row.leased_job.came_ms, row.leased_job.num_left)
            worker.held.append(row)
        if not worker.held:
            return
        idle_since_ms = worker.idle_since_ms or 0.0
        decision = self._policy(
            worker.held,
            now_ms=now_ms,
            waited_ms=now_ms - max(idle_since_ms, worker.held[0].leased_job.came_ms),
            next_ms=worker.arrivals.next_ms(now_ms),
            rows_per_ms=worker.arrivals.rows_per_ms(now_ms),
            lately_per_ms=worker.arrivals.lately_per_ms(now_ms),
            backlog=len(self._queue),
            max_batch=self._max_batch,
            cost_ms=lambda _bucket, _steps, batch: self._batch_ms(batch),
        )
        if isinstance(decision, Wait):
            self._at(now_ms + max(1.0, decision.ms), worker, worker.looks)
            return
        run = set(decision.rows)
        worker.held = [row for row in worker.held if row not in run]
        worker.idle_since_ms = None
        end_ms = now_ms + self._batch_ms(len(run))
        self.runs.append((now_ms, end_ms, len(run)))
        self._at(end_ms, worker, decision.rows)

    def _finish(self, rows: tuple[Row[SimulatedJob], ...], now_ms: float) -> None:
        for row in rows:
            row.leased_job.num_left -= 1
            if not row.leased_job.num_left:
                self._ends[row.leased_job] = now_ms

    def _at(self, when_ms: float, worker: _Worker, what: tuple[Row[SimulatedJob], ...] | int | None) -> None:
        self._serial += 1
        heapq.heappush(self._events, (when_ms, self._serial, worker, what))
