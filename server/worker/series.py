"""Series: what a worker counts, at 0 from the start (`server/metrics.py` says why)."""

from __future__ import annotations

from engines.bundle.manifest import Manifest
from server.job import JobKind, Priority
from server.metrics import Metrics, Outcome
from server.queue.ops import WORKER_OPS
from server.queue.worker_queue import Settled

STAGES = ("queue", "batch_wait", "encode", "denoise", "decode", "pack", "store")
FAILING = ("lease", "heartbeat", "finish")
"""Where this process notices that Redis does not answer."""
SECOND = ("start", Settled.STALE, Settled.UNKNOWN)
"""Where a result, or a job, turns out to come second."""


def begin_series(metrics: Metrics, manifest: Manifest, device: str) -> None:
    """Begin all that a worker with this bundle on this device can count.

    Of jobs that end otherwise than done there is no latency yet: which priorities will, nobody knows.
    """
    model, kind = manifest.name, JobKind(manifest.kind)
    for outcome in Outcome:
        metrics.jobs.labels(model, kind, outcome)
        metrics.version_jobs.labels(model, manifest.version, outcome)
    metrics.job_e2e.labels(model, kind, Priority.NORMAL, Outcome.DONE)
    for stage in STAGES:
        metrics.job_stage.labels(model, kind, stage)
    metrics.job_redeliveries.labels(model, "lease_lapsed")
    for cause in SECOND:
        metrics.job_duplicates.labels(model, cause)
    metrics.heartbeats_lost.labels(model, "reclaimed")
    metrics.dead_letters.labels(model, Outcome.POISON)
    for by_model in (metrics.batch_size, metrics.batch_fill_ratio, metrics.output_engine):
        by_model.labels(model)
    outputs = metrics.images if kind is JobKind.IMAGE else metrics.video_frames
    for counted in (outputs, metrics.padding, metrics.denoise_steps):
        counted.labels(model)
    metrics.pace.labels(model).set(1)
    metrics.gpu_busy.labels(device)
    metrics.gpu_oom.labels(device)
    for op in WORKER_OPS:
        metrics.redis_op.labels(op)
    for op in FAILING:
        metrics.redis_errors.labels(op)
    metrics.storage_op.labels("put")
