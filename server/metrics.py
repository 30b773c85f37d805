"""All Prometheus metrics of the api process and of workers, defined once; `Metrics` holds them for one
process.

Labels stay few and bounded: `class` is the queue class (the model's name), `kind` what it draws (image or
video), routes are templates. Never a job id, a tenant, a prompt or a raw path. Durations are in seconds, as
Prometheus wants; methods take milliseconds, as we count.

What is counted is there from the start, at 0, as far as its labels are known: `rate()` sees steps between two
samples, and would never see the first event of a series that begins with it. `server/api/series.py` and
`server/worker/series.py` begin them. `server/metrics_table.py` writes a table of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from server.job import Job, JobKind

PREFIX = "tdm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is promised of one kind of job, and what alerts watch (`deploy/prometheus/rules`).

    Attributes:
        e2e_s: a good job ends within so many seconds after it was accepted,
        queue_s: of which it waits so many for a worker;
        target: share of jobs that are good, over 30 days.
    """

    e2e_s: float
    queue_s: float
    target: float


OBJECTIVES = {
    JobKind.IMAGE: Objective(e2e_s=2.0, queue_s=1.0, target=0.99),
    JobKind.VIDEO: Objective(e2e_s=300.0, queue_s=120.0, target=0.99),
}
AVAILABILITY_TARGET = 0.999
"""Share of requests that get no 5xx, and of jobs that do not fail through our fault."""

# Images answer in fractions of a second, videos in minutes: one ladder holds both, and every objective sits
# on an edge.
REQUEST_BUCKETS = (
    0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300, 600, 1200, 1800,
)  # fmt: skip
STAGE_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 900,
)  # fmt: skip
OP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
BATCH_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
FILL_BUCKETS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)
ETA_BUCKETS = (0.1, 0.25, 0.5, 0.8, 0.9, 1.1, 1.2, 1.5, 2, 4, 10)


MetricT = TypeVar("MetricT", Counter, Gauge, Histogram)


class Outcome(StrEnum):
    """How a job ended; DEADLINE and POISON are failures that are counted apart."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    POISON = "poison"


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """One metric, as the table of all of them shows it."""

    section: str
    metric: Counter | Gauge | Histogram
    labels: tuple[str, ...]


class Metrics:
    """The metrics of one process, in a registry of their own: several can live in one test process."""

    def __init__(self) -> None:
        disable_created_metrics()  # one more series for each, which no query of ours reads
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.definitions: list[Definition] = []
        self._section = ""
        self._define_http()
        self._define_queue()
        self._define_jobs()
        self._define_work()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._defined(Counter(name, text, labels, namespace=PREFIX, registry=self.registry), labels)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return self._defined(Gauge(name, text, labels, namespace=PREFIX, registry=self.registry), labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        metric = Histogram(name, text, labels, namespace=PREFIX, registry=self.registry, buckets=buckets)
        return self._defined(metric, labels)

    def _defined(self, metric: MetricT, labels: tuple[str, ...]) -> MetricT:
        self.definitions.append(Definition(section=self._section, metric=metric, labels=labels))
        return metric

    def _define_http(self) -> None:
        """Of the api process."""
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._section = "HTTP (api)"
        self.http_requests = counter("http_requests_total", "Responses sent.", "route", "method", "code")
        self.http_request_duration = histogram(
            "http_request_duration_seconds", "First byte in to last byte out.", REQUEST_BUCKETS, "route"
        )
        self.result_waiters = gauge("result_waiters", "Requests that are waiting for their job.")
        self.jobs_rejected = counter(
            "jobs_rejected_total", "Jobs refused before the queue.", "class", "kind", "reason"
        )

        self.jobs_archived = counter(
            "jobs_archived_total", "Finished jobs whose answers were moved from Redis to the store.", "class"
        )
        self.accepted_work = counter(
            "accepted_work_seconds_total",
            "Predicted engine time of accepted jobs, in full batches; its rate: workers they keep busy.",
            "class",
        )
        self.eta = histogram(
            "eta_ratio",
            "Time a job took of the time predicted when it was accepted, where its client waited for it.",
            ETA_BUCKETS,
            "class",
            "kind",
        )

    def _define_queue(self) -> None:
        """Of the api process: read from Redis by one task."""
        gauge = self._gauge
        self._section = "Queue (api: every api process reads the same from Redis, take the maximum)"
        self.queue_waiting = gauge("queue_waiting", "Jobs that wait for a worker.", "class", "priority")
        self.queue_backlog = gauge(
            "queue_backlog_seconds", "Predicted engine time of the jobs that wait, over all workers.", "class"
        )
        self.queue_inflight = gauge("queue_inflight", "Jobs that a worker holds.", "class")
        self.queue_oldest_age = gauge("queue_oldest_age_seconds", "Age of the oldest waiting job.", "class")
        self.wait_margin = gauge(
            "wait_margin_ratio",
            "What jobs near their deadline waited, over the prediction, in all but one of twenty cases.",
            "class",
        )
        self.workers_live = gauge("workers_live", "Workers with a fresh heartbeat.", "class")
        self.version_workers = gauge(
            "version_workers", "The same by version of the bundle.", "class", "version"
        )
        self.queue_capacity = gauge("queue_capacity", "Samples that live workers can run at once.", "class")
        self.queue_limit = gauge("queue_limit", "Jobs that may wait before one more is refused.", "class")

        self._section = "Redis and what it keeps (api: every api process reads the same, take the maximum)"
        self.jobs_kept = gauge("jobs_kept", "Finished jobs whose answers are in Redis.", "class")
        self.jobs_forgotten = gauge(
            "jobs_forgotten", "Finished jobs forgotten before their time for want of memory, ever.", "class"
        )
        self.redis_memory_use = gauge(
            "redis_memory_use_ratio", "Redis's memory of its limit; from 0.8 on finished jobs are forgotten."
        )

        self.redis_memory = gauge("redis_memory_bytes", "Memory that Redis uses.")
        self.redis_memory_limit = gauge(
            "redis_memory_limit_bytes", "Its maxmemory; 0 where there is no limit, and then no ratio either."
        )
        self.redis_aof_ok = gauge(
            "redis_aof_ok", "1 if its last write to the append-only file went well, 0 if not or if it is off."
        )
        self.redis_delayed_fsyncs = gauge(
            "redis_delayed_fsyncs", "Times since its start that a write waited for an fsync before it."
        )
        self.redis_commands = gauge("redis_commands_per_second", "Commands it runs, from all its clients.")

    def _define_jobs(self) -> None:
        """Of whoever ends them."""
        counter, histogram = self._counter, self._histogram
        self._section = "Jobs (whoever ends them: worker, or api for those that never start)"
        self.jobs = counter("jobs_total", "Jobs that reached a terminal state.", "class", "kind", "outcome")
        self.job_e2e = histogram(
            "job_e2e_seconds",
            "Accepted to terminal.",
            REQUEST_BUCKETS,
            "class",
            "kind",
            "priority",
            "outcome",
        )
        self.job_stage = histogram(
            "job_stage_seconds",
            "Time of one job in one stage: queue, batch_wait, encode, denoise, decode, pack, store.",
            STAGE_BUCKETS,
            "class",
            "kind",
            "stage",
        )
        self.job_redeliveries = counter("job_redeliveries_total", "Jobs started again.", "class", "cause")
        self.job_duplicates = counter("job_duplicates_total", "Results that came second.", "class", "cause")
        self.heartbeats_lost = counter(
            "heartbeat_lost_total", "Leases found lost at a heartbeat.", "class", "cause"
        )
        self.dead_letters = counter("dead_letters_total", "Jobs given up on.", "class", "cause")

    def _define_work(self) -> None:
        """Of a worker process, and of what it and the api process depend on."""
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self._section = "Work (worker)"
        self.batch_size = histogram("batch_size", "Samples that ran together.", BATCH_BUCKETS, "class")
        self.batch_fill_ratio = histogram(
            "batch_fill_ratio", "Samples per place in the compiled batch.", FILL_BUCKETS, "class"
        )
        self.output_engine = histogram(
            "output_engine_seconds",
            "Engine time of one output: its batch's, shared by all outputs in it.",
            STAGE_BUCKETS,
            "class",
        )
        self.padding = counter(
            "padding_seconds_total", "Engine time that went into empty places of compiled batches.", "class"
        )
        self.images = counter("images_total", "Images stored.", "class")
        self.video_frames = counter("video_frames_total", "Video frames stored.", "class")
        self.denoise_steps = counter("denoise_steps_total", "Denoiser rows computed.", "class")
        self.gpu_busy = counter("gpu_busy_seconds_total", "Time inside a batch, on whatever device.", "gpu")
        self.gpu_oom = counter("gpu_oom_total", "Batches that ran out of memory.", "gpu")
        self.version_jobs = counter(
            "version_jobs_total", "Jobs that a version of a bundle has ended.", "class", "version", "outcome"
        )
        self.pace = gauge(
            "engine_pace_ratio",
            "What batches take, over the bundle's latency table: median of the last 15.",
            "class",
        )
        self.model_load = gauge("model_load_seconds", "Loading and warming up the bundle.", "class")
        self.engine_info = gauge(
            "engine_info", "1 for the bundle this worker runs.", "class", "engine", "version"
        )

        self._section = "Dependencies (both)"
        self.redis_op = histogram(
            "redis_op_seconds",
            "One answer from Redis: to a queue verb, or to a command. Without reads that wait for a job.",
            OP_BUCKETS,
            "op",
        )
        self.redis_errors = counter("redis_errors_total", "Queue verbs that failed.", "op")
        self.storage_op = histogram("storage_op_seconds", "One store verb.", OP_BUCKETS, "op")
        self.trace_spans = counter(
            "trace_spans_total",
            "Recorded spans by outcome: exported, or dropped since the collector did not take them in time.",
            "outcome",
        )

    def observe_redis_op(self, op: str, took_s: float) -> None:
        """Count one answer from Redis; `server/queue/ops.py` has the names."""
        self.redis_op.labels(op).observe(took_s)

    def observe_eta(self, job: Job, eta_ms: float | None) -> None:
        """Compare the time a finished job took with what was predicted; without a prediction, nothing.

        Args:
            job: finished; only one that is done tells anything.
            eta_ms: predicted when it was accepted.
        """
        if eta_ms and job.finished_ms is not None and job.outputs:
            self.eta.labels(job.model, job.kind).observe((job.finished_ms - job.created_ms) / eta_ms)

    def observe_job_end(
        self,
        job: Job,
        outcome: Outcome,
        *,
        now_ms: int,
        timing_ms: Mapping[str, float] | None = None,
        version: str | None = None,
    ) -> None:
        """Count one job that reached a terminal state; for whoever ends it.

        Args:
            job: as it was queued, or later.
            outcome: how it ended.
            now_ms: when, unix ms.
            timing_ms: its stages, as `Job.timing` names them.
            version: of the bundle that ended it, where one did.
        """
        self.jobs.labels(job.model, job.kind, outcome).inc()
        if version is not None:
            self.version_jobs.labels(job.model, version, outcome).inc()
        e2e_s = (now_ms - job.created_ms) / 1000
        self.job_e2e.labels(job.model, job.kind, job.priority, outcome).observe(e2e_s)
        for stage, spent_ms in (timing_ms or {}).items():
            self.job_stage.labels(job.model, job.kind, stage).observe(spent_ms / 1000)
        if outcome is Outcome.POISON:
            self.dead_letters.labels(job.model, outcome).inc()

    def observe_batch(
        self, model: str, *, size: int, capacity: int, num_steps: int, busy_ms: float, gpu: str
    ) -> None:
        """Count one finished batch.

        Args:
            model: queue class.
            size: samples in it.
            capacity: the compiled batch that it was padded to.
            num_steps: denoiser rows in it, padding not counted.
            busy_ms: encode, denoise and decode together.
            gpu: the device, `cuda:0` or `cpu`.
        """
        self.batch_size.labels(model).observe(size)
        self.batch_fill_ratio.labels(model).observe(size / capacity)
        for _ in range(size):
            self.output_engine.labels(model).observe(busy_ms / size / 1000)
        self.padding.labels(model).inc(busy_ms * (1 - size / capacity) / 1000)
        self.denoise_steps.labels(model).inc(num_steps)
        self.gpu_busy.labels(gpu).inc(busy_ms / 1000)
