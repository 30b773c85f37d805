"""Batcher: the jobs that a worker has leased and not yet handed to its engine; forms the batches.

Leasing late is better than leasing early: what is still in Redis can be reordered, cancelled, or taken by an
idle worker. So the batcher reads while the engine is idle, and ahead only during the last step of a batch.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from engines.bundle.bucket import Bucket
from server.job import GenerationRequest, Job, JobError, JobErrorCode
from server.metrics import Metrics, Outcome
from server.queue.errors import QueueError
from server.queue.records import UnreadableJobError
from server.queue.worker_queue import Dropped, Lease, WorkerQueue
from server.tracing import record_settled, trace_of
from server.worker.batch_policy import Arrivals, CostModel, Row, Run, Wait, decide
from server.worker.heartbeat import Heartbeat
from server.worker.leased_job import LeasedJob
from server.worker.spans import Spans

log = logging.getLogger(__name__)

# The longest that a blocking read keeps the worker from seeing that it is to stop.
READ_BLOCK_MS = 1_000
# How often lapsed leases are looked for, as a share of the lease.
RECLAIMS_PER_LEASE = 4
MAX_BACKOFF_S = 5.0


class Batcher:
    """Used by the engine's thread; while a prefetch runs on a thread of its own, nothing else touches it."""

    def __init__(
        self,
        queue: WorkerQueue,
        heartbeat: Heartbeat,
        metrics: Metrics,
        spans: Spans,
        *,
        max_batch: int,
        cost_ms: CostModel,
        lease_s: float,
        stopping: threading.Event,
        settle: Callable[[], None],
        unserved: Callable[[GenerationRequest], str | None] = lambda _: None,
        clock: Callable[[], int],
    ) -> None:
        """Leases nothing before `next_batch`.

        Args:
            queue: to lease from.
            heartbeat: extends what is leased.
            metrics: of this process.
            spans: told which attempts begin, and which jobs end without one.
            max_batch: most rows that run together, until `limit` lowers it for a bucket.
            cost_ms: the bundle's cost curve.
            lease_s: age at which other workers' leases are taken over.
            stopping: set when no further jobs are to be started.
            settle: returns once every job that was drawn has ended.
            unserved: why the bundle does not generate what is asked for, in words; None if it does.
            clock: unix ms.
        """
        self._queue = queue
        self._heartbeat = heartbeat
        self._metrics = metrics
        self._spans = spans
        self._max_batch = max_batch
        self._cost_ms = cost_ms
        self._lease_s = lease_s
        self._stopping = stopping
        self._settle = settle
        self._unserved = unserved
        self._clock = clock
        self._unseen: list[Lease] = []
        self._held: dict[str, LeasedJob] = {}
        self._limits: dict[Bucket, int] = {}
        self._arrivals = Arrivals()
        self._backlog = 0
        self._rows_per_job = 1.0
        self._next_reclaim = 0.0
        self._drew_alone = False
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._prefetched: Future[None] | None = None

    def next_batch(self) -> list[Row[LeasedJob]] | None:
        """The samples to draw next, of started jobs; None to stop. Blocks, also while Redis is away."""
        backoff_s = 0.1
        while True:
            try:
                batch = self._form_batch()
            except QueueError as error:
                self._metrics.redis_errors.labels("lease").inc()
                log.warning("cannot lease jobs: %s", error)
                self._heartbeat.pulse()
                if self._stopping.wait(random.uniform(0, backoff_s)):
                    return None
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                continue
            if batch is None or batch:
                return batch

    def prefetch(self) -> None:
        """Lease the next batch's jobs while the engine finishes this one."""
        if self._prefetched is None and not self._stopping.is_set():
            self._prefetched = self._reader.submit(self._lease, 0)

    def limit(self, bucket: Bucket, max_batch: int) -> None:
        """From now on run at most `max_batch` rows of `bucket` together: more did not fit into memory."""
        self._limits[bucket] = max(1, min(max_batch, self._limits.get(bucket, self._max_batch)))

    def close(self) -> None:
        """Hand back every lease that was not started.

        Raises:
            QueueError: Redis does not answer; the leases lapse by themselves.
        """
        self._join_prefetch()
        self._reader.shutdown()
        unstarted = [leased.lease for leased in self._held.values() if not leased.started]
        unstarted += self._unseen
        self._held.clear()
        self._heartbeat.release(unstarted)
        log.info("handed back %d jobs", self._queue.hand_back(unstarted))

    def _form_batch(self) -> list[Row[LeasedJob]] | None:
        """A batch; an empty one if all who were to be in it are gone; None to stop."""
        self._join_prefetch()
        idle_since: float | None = None
        block_ms = 0
        while True:
            self._heartbeat.pulse()
            if not self._stopping.is_set():
                self._lease(block_ms)
            rows = self._rows()
            if not rows:
                if self._stopping.is_set():
                    return None
                block_ms = READ_BLOCK_MS
                continue
            if idle_since is None:
                idle_since = time.monotonic()
                if block_ms:  # the read ended with the first arrival; others may have come with it
                    block_ms = 0
                    continue
            decision = self._decide(rows, (time.monotonic() - idle_since) * 1000)
            if isinstance(decision, Run):
                return self._assign(decision.rows)
            block_ms = max(1, int(decision.ms))

    def _rows(self) -> list[Row[LeasedJob]]:
        """Samples to draw, oldest lease first. A worker that is to stop only finishes what it has started."""
        self._held = {job_id: leased for job_id, leased in self._held.items() if not leased.ended}
        stopping = self._stopping.is_set()
        ready = [leased for leased in self._held.values() if leased.started or not stopping]
        return [row for leased in ready for row in leased.rows()]

    def _decide(self, rows: Sequence[Row[LeasedJob]], waited_ms: float) -> Run[LeasedJob] | Wait:
        now_ms = self._clock()
        return decide(
            rows,
            now_ms=now_ms,
            waited_ms=waited_ms,
            next_ms=self._arrivals.next_ms(now_ms),
            rows_per_ms=self._arrivals.rows_per_ms(now_ms),
            lately_per_ms=self._arrivals.lately_per_ms(now_ms),
            backlog=self._backlog,
            max_batch=self._limits.get(rows[0].leased_job.bucket, self._max_batch),
            cost_ms=self._cost_ms,
        )

    def _assign(self, rows: Sequence[Row[LeasedJob]]) -> list[Row[LeasedJob]]:
        """Start the jobs of these rows that are not yet, and take the rows out of the batcher.

        A job that runs alone has no neighbour in the finisher either: one whose files are still being written
        when the suspect kills the process would lose an attempt each time, and be convicted in its place.
        """
        alone = rows[0].leased_job.alone
        if alone or self._drew_alone:
            self._settle()
        self._drew_alone = alone
        jobs = dict.fromkeys(row.leased_job for row in rows)
        self._start([leased for leased in jobs if not leased.started])
        taken = [row for row in rows if not row.leased_job.ended]
        for row in taken:
            row.leased_job.num_assigned += 1
        self._held = {job_id: leased for job_id, leased in self._held.items() if leased.rows()}
        return taken

    def _start(self, jobs: Sequence[LeasedJob]) -> None:
        replies = self._queue.start(
            [leased.lease for leased in jobs], {leased.job.id: leased.job for leased in jobs}
        )
        for leased, started in zip(jobs, replies, strict=True):
            if started.job is None:
                self._count_drop(leased.job, started.dropped)
                leased.ended = True
                self._heartbeat.release([leased.lease])
                continue
            now_ms = self._clock()
            leased.start(started.job, now_ms)
            self._spans.begin(leased, now_ms)
            if started.job.attempt > 1:
                self._metrics.job_redeliveries.labels(self._queue.model, "lease_lapsed").inc()

    def _count_drop(self, job: Job, why: Dropped | None) -> None:
        log.info("not started: %s", why, extra={"job_id": job.id, **trace_of(job).log_ids})
        if why in (Dropped.DEADLINE, Dropped.POISON, Dropped.CANCELLED):  # ended by this very start
            self._metrics.observe_job_end(job, Outcome(why), now_ms=self._clock())
            record_settled(self._spans.tracing, job, why, is_error=why is not Dropped.CANCELLED)
        else:
            self._metrics.job_duplicates.labels(job.model, "start").inc()

    def _join_prefetch(self) -> None:
        """Wait for the prefetch and raise its error, if any."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None:
            prefetched.result()

    def _lease(self, block_ms: int) -> None:
        """Take jobs for at most one batch, first those that other workers lost."""
        self._look()
        room = self._max_batch - sum(len(leased.rows()) for leased in self._held.values())
        if room <= 0:
            return
        count = max(1, int(room / self._rows_per_job))
        leases = self._reclaim(count)
        if len(leases) < count:
            leases += self._queue.read(count - len(leases), 0 if leases else block_ms)
        self._heartbeat.hold(leases)
        self._unseen += leases
        self._backlog = 0
        self._look()

    def _reclaim(self, count: int) -> list[Lease]:
        """Leases that lapsed; ours among them (Redis was away for long) are thereby extended and go on.

        While Redis was away nobody could extend a lease. So after that the others get a lease's time to do
        it: jobs that live workers still run are not to be run twice, nor to count as having lost a worker.
        """
        now = time.monotonic()
        if now < max(self._next_reclaim, self._heartbeat.last_failure + self._lease_s):
            return []
        self._next_reclaim = now + self._lease_s / RECLAIMS_PER_LEASE * random.uniform(0.8, 1.2)
        leases = self._queue.reclaim(count, int(self._lease_s * 1000))
        return [lease for lease in leases if not self._heartbeat.holds(lease)]

    def _look(self) -> None:
        """Turn leases into jobs; settle those that cannot become any. To be called again if Redis fails."""
        if not self._unseen:
            return
        jobs, waiting = self._queue.look(self._unseen)
        for lease, job in zip(self._unseen, jobs, strict=True):
            if job is None:
                self._drop(lease, "unknown job")
                continue
            if isinstance(job, UnreadableJobError):
                self._drop(lease, str(job))
                continue
            if why := self._unserved(job.request):  # accepted for a bundle that has no worker left
                self._drop(lease, why, JobErrorCode.NOT_SERVED)
                record_settled(self._spans.tracing, job, JobErrorCode.NOT_SERVED)
                continue
            num_samples = job.request.num_samples
            self._held[job.id] = LeasedJob(lease=lease, job=job, leased_ms=self._clock())
            self._arrivals.observe(job.created_ms, num_samples)
            self._rows_per_job += 0.2 * (num_samples - self._rows_per_job)
        self._unseen = []
        unstarted = sum(not leased.started for leased in self._held.values())
        self._backlog = int(max(0, waiting - unstarted) * self._rows_per_job)

    def _drop(self, lease: Lease, why: str, code: JobErrorCode = JobErrorCode.INVALID_REQUEST) -> None:
        """Get rid of a lease without an engine: unknown jobs are dropped, the others fail."""
        log.error("job dropped: %s", why, extra={"job_id": lease.job_id})
        self._queue.refuse(lease, JobError(code=code, message=why))
        self._heartbeat.release([lease])
