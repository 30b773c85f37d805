"""The worker process: load a bundle, wire the parts, and end in order.

The main thread is the engine's and runs `server.worker.loop`. Beside it: a heartbeat thread keeps the leases,
finisher threads end jobs, and a prefetch thread leases the next batch during the last step of this one.
"""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import Manifest, read_manifest
from engines.bundle.signature import read_key
from engines.bundle.stages import Backend
from engines.errors import EngineError
from engines.runtime.pipeline import Pipeline
from server.cost import batch_cost
from server.job import UNMEASURED_MS, GenerationRequest, JobKind
from server.metrics import Metrics
from server.queue.clock import RedisClock, system_now_ms
from server.queue.errors import QueueError
from server.queue.records import WorkerInfo
from server.queue.routes import Routes
from server.queue.worker_queue import WorkerQueue
from server.scrape import start_metrics_server
from server.settings import WorkerSettings
from server.store import ResultStore
from server.tracing import start_tracing
from server.worker.ages import log_start, process_ages_s
from server.worker.batcher import Batcher
from server.worker.finisher import Finisher
from server.worker.heartbeat import Heartbeat
from server.worker.loop import EngineLostError, Worker
from server.worker.pace import PacedCost, Table
from server.worker.series import begin_series
from server.worker.spans import Spans

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_ENGINE_LOST = 1
EXIT_UNUSABLE = 2
# An engine that takes this many times its measured time for one batch, and a minute at least, counts as hung.
STALL_FACTOR = 20
MIN_STALL_S = 60.0
# Finished jobs whose pixels wait in memory for packing; a 49-frame video of 720 x 480 is 51 MB.
MAX_PENDING = {JobKind.IMAGE: 64, JobKind.VIDEO: 4}
# How long the end waits for a collector to take the last spans.
LAST_SPANS_S = 5.0


def load_pipeline(settings: WorkerSettings, kind: type[Pipeline] = Pipeline) -> Pipeline:
    """The bundle that the settings name, in memory."""
    key = None if settings.bundle_key_file is None else read_key(settings.bundle_key_file)
    backend = settings.backend if settings.backend == "auto" else Backend(settings.backend)
    return kind.load(settings.bundle, backend=backend, num_threads=settings.num_threads, key=key)


def run_worker(
    settings: WorkerSettings, *, load: Callable[[WorkerSettings], Pipeline] = load_pipeline
) -> int:
    """Serve one bundle until SIGTERM or SIGINT. Call it from the main thread of a process of its own.

    Returns:
        0 after an orderly end, 1 if the device was lost, 2 if the bundle, Redis or the store cannot be used.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    metrics = Metrics()
    ages_s = {"imports": process_ages_s()}
    started = time.perf_counter()
    try:
        pipeline = load(settings)
    except EngineError as error:
        log.critical("%s", error, extra={"code": error.code})
        _tell_why(settings, str(error))
        return EXIT_UNUSABLE
    for warning in pipeline.warnings:
        log.warning("%s", warning)
    if pipeline.memory is not None:
        log.info("GPU memory\n%s", pipeline.memory.as_text())
    ages_s["load"] = process_ages_s()
    pipeline.warm_up()
    ages_s["warm_up"] = process_ages_s()
    log_start("loaded", pipeline.manifest.name, ages_s)
    for decision in pipeline.graphs:
        log.info(
            "CUDA graph of %s at batch %d %s: %s",
            decision.stage,
            decision.batch,
            "used" if decision.used else "not used",
            decision.reason,
            extra={"plain_ms": decision.plain_ms, "graph_ms": decision.graph_ms},
        )
    manifest = pipeline.manifest
    begin_series(metrics, manifest, str(pipeline.device))
    metrics.model_load.labels(manifest.name).set(time.perf_counter() - started)
    metrics.engine_info.labels(manifest.name, pipeline.backend, manifest.version).set(1)
    server = start_metrics_server(metrics, settings.host, settings.metrics_port)
    try:
        return EXIT_OK if stopping.is_set() else serve(settings, pipeline, metrics, stopping)
    finally:
        if server is not None:
            server.close()


def serve(settings: WorkerSettings, pipeline: Pipeline, metrics: Metrics, stopping: threading.Event) -> int:
    """Lease and draw until `stopping`, then end in order: what was started is finished, the rest handed back.

    Returns:
        As `run_worker`.
    """
    manifest = pipeline.manifest
    info = _worker_info(pipeline, _slowest_ms(manifest, pipeline.backend))
    clock = RedisClock()
    queue = _queue(settings, manifest, info, clock, metrics)
    spans = _start_spans(settings, pipeline, info, clock, metrics)
    heartbeat = _heartbeat(settings, queue, info, manifest, metrics)
    cost_ms = PacedCost(_table(manifest, pipeline.backend))
    store = ResultStore(settings.store_url)
    finisher = Finisher(
        queue,
        store,
        heartbeat,
        metrics,
        spans,
        version=manifest.version,
        unheard=pipeline.unheard,
        store_patience_s=settings.lease_s,
        max_pending=MAX_PENDING[JobKind(manifest.kind)],
        clock=clock,
    )
    batcher = Batcher(
        queue,
        heartbeat,
        metrics,
        spans,
        max_batch=manifest.max_batch,
        cost_ms=cost_ms,
        lease_s=settings.lease_s,
        stopping=stopping,
        settle=finisher.settle,
        unserved=lambda request: _unserved(manifest, request),
        clock=clock,
    )
    worker = Worker(pipeline, batcher, finisher, heartbeat, metrics, spans, cost_ms=cost_ms, clock=clock)
    status = EXIT_OK
    try:
        with ExitStack() as ends:  # from the last to the first, each whatever becomes of the others
            ends.callback(spans.tracing.close, LAST_SPANS_S)
            ends.callback(queue.close)
            if not _announce(heartbeat, stopping):
                return EXIT_OK
            ends.callback(queue.leave)
            for part in (heartbeat, finisher, batcher):
                ends.callback(part.close)
            log.info("ready on %s", pipeline.backend, extra={"model": manifest.name, "worker": info.id})
            status = _run(worker)
    except QueueError as error:
        log.warning("ended while Redis was away; leases lapse by themselves: %s", error)
    return status


def _queue(
    settings: WorkerSettings, manifest: Manifest, info: WorkerInfo, clock: RedisClock, metrics: Metrics
) -> WorkerQueue:
    return WorkerQueue(
        settings.redis_url,
        model=manifest.name,
        version=manifest.version,
        consumer=info.id,
        clock=clock,
        observe=metrics.observe_redis_op,
    )


def _heartbeat(
    settings: WorkerSettings, queue: WorkerQueue, info: WorkerInfo, manifest: Manifest, metrics: Metrics
) -> Heartbeat:
    return Heartbeat(
        queue,
        info,
        manifest.model_dump_json(),
        metrics,
        lease_s=settings.lease_s,
        stall_s=max(MIN_STALL_S, STALL_FACTOR * info.batch_ms / 1000),
        on_stall=lambda: os._exit(EXIT_ENGINE_LOST),  # a hung device call never returns to an orderly end
    )


def _start_spans(
    settings: WorkerSettings, pipeline: Pipeline, info: WorkerInfo, clock: RedisClock, metrics: Metrics
) -> Spans:
    tracing = start_tracing(
        settings.otlp_endpoint,
        settings.trace_ratio,
        service="tdm-worker",
        now_ns=clock.now_ns,
        metrics=metrics,
    )
    return Spans(tracing, info, pipeline.manifest.batch_sizes)


def _run(worker: Worker) -> int:
    """Draw until the worker is stopped; the exit status."""
    try:
        worker.run()
    except EngineLostError:
        log.exception("the device is lost")
        return EXIT_ENGINE_LOST
    return EXIT_OK


def _tell_why(settings: WorkerSettings, message: str) -> None:
    """Leave word for whoever waits for this worker, as far as the bundle can be named at all."""
    with suppress(EngineError, QueueError):
        manifest = read_manifest(settings.bundle)
        routes = Routes(settings.redis_url)
        routes.tell_failure(manifest.name, manifest.version, message)
        routes.close()


def _announce(heartbeat: Heartbeat, stopping: threading.Event) -> bool:
    """Start the heartbeat as soon as Redis answers; False if the worker is to stop before that."""
    while not stopping.is_set():
        try:
            heartbeat.start()
        except QueueError as error:
            log.warning("waiting for Redis: %s", error)
            stopping.wait(1.0)
        else:
            return True
    return False


def _worker_info(pipeline: Pipeline, slowest_ms: float) -> WorkerInfo:
    manifest, host = pipeline.manifest, socket.gethostname()
    return WorkerInfo(
        id=f"{host}-{os.getpid()}-{secrets.token_hex(4)}",
        model=manifest.name,
        kind=manifest.kind,
        version=manifest.version,
        backend=pipeline.backend,
        max_batch=manifest.max_batch,
        batch_ms=slowest_ms,
        pid=os.getpid(),
        host=host,
        started_ms=system_now_ms(),
        warnings=tuple(pipeline.warnings),
        buckets=tuple(bucket.label for bucket in manifest.buckets),
        num_steps=tuple(manifest.num_steps),
    )


def _table(manifest: Manifest, backend: str) -> Table:
    """The bundle's measured times on `backend`."""

    @functools.cache
    def table_ms(bucket: Bucket, num_steps: int, batch: int) -> float | None:
        cost = batch_cost(manifest, bucket, num_steps, (backend,))
        return None if cost is None else cost(batch)

    return table_ms


def _unserved(manifest: Manifest, request: GenerationRequest) -> str | None:
    """Why a bundle does not generate what is asked for, in words; None if it does."""
    if request.bucket not in manifest.buckets:
        return f"{manifest.name} no longer draws {request.bucket.size}, {request.bucket.frames} frames"
    if request.num_steps not in manifest.num_steps:
        return f"{manifest.name} no longer draws in {request.num_steps} steps"
    return None


def _slowest_ms(manifest: Manifest, backend: str) -> float:
    """Predicted time of the dearest batch that the bundle runs."""
    steps, batch = max(manifest.num_steps), manifest.max_batch
    costs = [batch_cost(manifest, bucket, steps, (backend,)) for bucket in manifest.buckets]
    return max(UNMEASURED_MS * batch if cost is None else cost(batch) for cost in costs)
