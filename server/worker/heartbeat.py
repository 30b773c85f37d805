"""Heartbeat: the thread that keeps a worker's leases and its place among the living."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from server.metrics import Metrics
from server.queue.errors import QueueError
from server.queue.records import Pace, WorkerInfo
from server.queue.worker_queue import Lease, Verdict, WorkerQueue

log = logging.getLogger(__name__)

# Progress is for people, and a cancel need not be quicker than one: beats come no closer than this.
MIN_PERIOD_S = 0.2
# Times that have changed by more than this factor are told at once, and at most this often (s).
NEWS = 1.1
NEWS_PERIOD_S = 1.0
# What is less than this (ms) is no time.
NO_TIME_MS = 5.0
# How often leases are extended and the worker announced, as a share of the lease.
PERIODS_PER_LEASE = 4


class Heartbeat:
    """Extends every held lease from a thread of its own, as long as the engine moves.

    The engine's thread calls `pulse` whenever it gets on. If it has not for `stall_s`, the beats stop: the
    leases lapse, other workers take the jobs, and this worker counts as dead, as a hung device is.
    """

    def __init__(
        self,
        queue: WorkerQueue,
        info: WorkerInfo,
        manifest_json: str,
        metrics: Metrics,
        *,
        lease_s: float,
        stall_s: float,
        on_stall: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing runs before `start`.

        Args:
            queue: to beat on.
            info: the worker, as it announces itself.
            manifest_json: its bundle's manifest.
            metrics: of this process.
            lease_s: after this long without a beat a lease may be reclaimed.
            stall_s: longest time between two pulses of an engine that works.
            on_stall: called once, from the thread, when the beats stop.
        """
        self._queue = queue
        self._info = info
        self._manifest_json = manifest_json
        self._metrics = metrics
        self._period_s = lease_s / PERIODS_PER_LEASE
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._lock = threading.Lock()
        self._progress: dict[Lease, int] = {}
        self._verdicts: dict[Lease, Verdict] = {}
        self._pace = self._told = Pace()
        self._next_announcement = self._next_news = -float("inf")
        self._last_pulse = time.monotonic()
        self._last_failure = -float("inf")
        self._hurry = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Announce the worker, then go on from the thread.

        Raises:
            QueueError: Redis does not answer; the caller knows better than to serve without it.
        """
        self._announce()
        self.pulse()
        self._thread.start()

    def close(self) -> None:
        """Stop beating."""
        self._closed.set()
        self._hurry.set()
        self._thread.join()

    def hold(self, leases: Iterable[Lease]) -> None:
        """Begin to extend these leases."""
        with self._lock:
            self._progress.update(dict.fromkeys(leases, 0))

    def release(self, leases: Iterable[Lease]) -> None:
        """Leave these leases alone."""
        with self._lock:
            for lease in leases:
                self._progress.pop(lease, None)
                self._verdicts.pop(lease, None)

    def holds(self, lease: Lease) -> bool:
        """True between `hold` and `release`."""
        with self._lock:
            return lease in self._progress

    @property
    def last_failure(self) -> float:
        """When Redis last failed to answer a beat, on `time.monotonic`'s clock."""
        return self._last_failure

    def pulse(self) -> None:
        """The engine's thread gets on."""
        self._last_pulse = time.monotonic()

    def report(self, progress: dict[Lease, int]) -> None:
        """Note how far (0..100) held leases are; told to Redis soon, and with the answer comes a verdict."""
        self.pulse()
        with self._lock:
            self._progress.update(
                {lease: done for lease, done in progress.items() if lease in self._progress}
            )
        self._hurry.set()

    def note_pace(self, **seen: float) -> None:
        """Note fields of `Pace` as they are now; the next announcement says so."""
        with self._lock:
            self._pace = replace(self._pace, **seen)
        if self._has_news():
            self._hurry.set()

    def verdict(self, lease: Lease) -> Verdict:
        """What the last beat learnt about a lease."""
        with self._lock:
            return self._verdicts.get(lease, Verdict.OK)

    def _run(self) -> None:
        while not self._closed.wait(MIN_PERIOD_S):
            due = self._next_news if self._has_news() else self._next_announcement
            self._hurry.wait(max(0.0, due - time.monotonic()))
            self._hurry.clear()
            if self._closed.is_set():
                return
            if time.monotonic() - self._last_pulse > self._stall_s:
                log.error(
                    "the engine has not moved for %.0f s; its jobs are left to other workers", self._stall_s
                )
                self._on_stall()
                return
            try:
                if self._announcement_is_due():
                    self._announce()
                self._extend()
            except QueueError as error:
                self._last_failure = time.monotonic()
                self._metrics.redis_errors.labels("heartbeat").inc()
                log.warning("heartbeat: %s", error)

    def _announcement_is_due(self) -> bool:
        now = time.monotonic()
        return now >= self._next_announcement or (self._has_news() and now >= self._next_news)

    def _has_news(self) -> bool:
        """The pace is another than was told."""
        pace, told = self._pace, self._told
        return _differ(pace.ratio, told.ratio) or _differ(
            pace.beside_ms + NO_TIME_MS, told.beside_ms + NO_TIME_MS
        )

    def _announce(self) -> None:
        """Say that this worker lives, and how fast it is. Where that fails, the next period tries again."""
        self._next_announcement = time.monotonic() + self._period_s
        self._next_news = time.monotonic() + NEWS_PERIOD_S
        pace = self._pace
        self._queue.beat(self._info, self._manifest_json, pace=pace)
        self._told = pace

    def _extend(self) -> None:
        with self._lock:
            progress = dict(self._progress)
        verdicts = self._queue.extend(progress)
        with self._lock:
            for lease, verdict in verdicts.items():
                if lease not in self._progress:
                    continue
                if verdict is Verdict.LOST and self._verdicts.get(lease) is not Verdict.LOST:
                    self._metrics.heartbeats_lost.labels(self._queue.model, "reclaimed").inc()
                    log.warning("lease lost to another worker", extra={"job_id": lease.job_id})
                self._verdicts[lease] = verdict


def _differ(one: float, other: float) -> bool:
    return max(one / other, other / one) > NEWS
