"""Spans: what a worker tells of its jobs and batches.

Each attempt of a job is a span in the trace of its request. Each batch is a trace of its own, as it belongs
to several requests; its span and those of its jobs are linked. Only jobs with a sampled traceparent are
recorded. The engine's thread makes one span for a batch and notes when the stages were; the spans of stages
are made by whoever ends the job.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from engines.bundle.bucket import pick_batch
from server.queue.records import WorkerInfo
from server.tracing import NO_SPAN, Attributes, Kind, Span, Tracing, messaging, trace_of
from server.worker.batch_policy import Row
from server.worker.leased_job import LeasedJob


@dataclass(frozen=True, slots=True)
class BatchSpan:
    """One run of the engine.

    Attributes:
        id: in the log, and in its span.
        span: recorded if that of one of its jobs is.
        begun_ns: unix ns; 0 if it is not recorded.
    """

    id: str
    span: Span
    begun_ns: int

    def note_stages(self, leased: LeasedJob, timing_ms: Mapping[str, float], busy_ms: float) -> None:
        """Note for a job of the batch when its stages were.

        Args:
            leased: one with samples in the batch.
            timing_ms: of the batch, from `BatchRun`.
            busy_ms: from the beginning of the first stage to the end of the last.
        """
        if not leased.span.is_recorded:
            return
        encoded_ns = self.begun_ns + _ns(timing_ms["encode"])
        end_ns = self.begun_ns + _ns(busy_ms)
        leased.stages += [
            ("encode", self.begun_ns, encoded_ns),
            ("denoise", encoded_ns, encoded_ns + _ns(timing_ms["denoise"])),
            ("decode", end_ns - _ns(timing_ms["decode"]), end_ns),
        ]

    def end(self, code: str | None = None) -> None:
        """The engine is through with it, or has failed for this reason."""
        if code is not None:
            self.span.fail(code)
        self.span.end()


class Spans:
    """Makes the spans of one worker, and times what it does outside of the engine."""

    def __init__(self, tracing: Tracing, worker: WorkerInfo, batch_sizes: Sequence[int]) -> None:
        """Records nothing yet.

        Args:
            tracing: of this process.
            worker: as it announces itself.
            batch_sizes: of the bundle.
        """
        self.tracing = tracing
        self._worker = worker
        self._batch_sizes = batch_sizes
        self._boot = secrets.token_hex(4)
        self._numbers = itertools.count(1)

    def begin(self, leased: LeasedJob, now_ms: int) -> None:
        """The job's attempt has begun. The first one includes its wait; another begins with its lease."""
        parent = trace_of(leased.job)
        leased.span = parent
        if not self.tracing.is_on or parent.context is None or not parent.context.sampled:
            return
        job = leased.job
        is_first = job.attempt == 1
        begun_ms = job.created_ms if is_first else leased.leased_ms
        leased.span = self.tracing.start(
            f"process {job.model}",
            Kind.CONSUMER,
            parent,
            {**messaging("process", job.model, job.id), **self._facts_of(leased)},
            start_ns=_ns(begun_ms),
        )
        if is_first:
            leased.stages.append(("queue", _ns(job.created_ms), _ns(leased.leased_ms)))
        leased.stages.append(("batch_wait", _ns(leased.leased_ms), _ns(now_ms)))

    def _facts_of(self, leased: LeasedJob) -> Attributes:
        job, request = leased.job, leased.job.request
        return {
            "messaging.client.id": self._worker.id,
            "tdm.attempt": job.attempt,
            "tdm.job.kind": job.kind.value,
            "tdm.model": job.model,
            "tdm.version": self._worker.version,
            "tdm.backend": self._worker.backend,
            "tdm.num_samples": request.num_samples,
            "tdm.num_steps": request.num_steps,
            "tdm.bucket": request.bucket.label,
        }

    def batch(self, rows: Sequence[Row[LeasedJob]]) -> BatchSpan:
        """The engine begins with these samples."""
        batch_id = f"{self._boot}-{next(self._numbers)}"
        jobs = dict.fromkeys(row.leased_job for row in rows)
        for leased in jobs:
            leased.batch_id = batch_id
        recorded = [leased for leased in jobs if leased.span.is_recorded]
        if not recorded:
            return BatchSpan(batch_id, NO_SPAN, 0)
        begun_ns = self.tracing.now_ns()
        span = self.tracing.start(
            f"batch {self._worker.model}",
            Kind.INTERNAL,
            NO_SPAN,
            {
                "messaging.batch.message_count": len(jobs),
                "messaging.client.id": self._worker.id,
                "tdm.batch.id": batch_id,
                "tdm.batch.num_samples": len(rows),
                "tdm.batch.capacity": pick_batch(len(rows), self._batch_sizes),
                "tdm.bucket": rows[0].leased_job.bucket.label,
                "tdm.model": self._worker.model,
                "tdm.version": self._worker.version,
                "tdm.backend": self._worker.backend,
            },
            links=[leased.span for leased in recorded],
            start_ns=begun_ns,
        )
        for leased in recorded:
            leased.span.link(span)
        return BatchSpan(batch_id, span, begun_ns)

    @contextmanager
    def stage(self, leased: LeasedJob, name: str) -> Iterator[None]:
        """Time a stage of a job; one that fails has no time."""
        start = time.perf_counter()
        yield
        leased.timing_ms[name] = spent_ms = (time.perf_counter() - start) * 1000
        if leased.span.is_recorded:
            end_ns = self.tracing.now_ns()
            leased.stages.append((name, end_ns - _ns(spent_ms), end_ns))

    def end(self, leased: LeasedJob, outcome: str, code: str | None = None) -> None:
        """The attempt is over; whatever else is told of it changes nothing.

        Args:
            leased: started.
            outcome: what became of it: how the job ended, or why it did not end here.
            code: why it failed, if it did.
        """
        span = leased.span
        if not span.is_recorded:
            return
        for name, start_ns, end_ns in leased.stages:
            self.tracing.start(name, Kind.INTERNAL, span, {}, start_ns=start_ns).end(end_ns)
        span.set({"tdm.job.outcome": outcome})
        if code is not None:
            span.fail(code)
        span.end()


def _ns(ms: float) -> int:
    return round(ms * 1_000_000)
