"""The worker process: lease -> batch -> encode, denoise, decode -> pack, store, complete. One engine thread.

The loop below is all that the engine's thread does. Beside it: a heartbeat thread keeps the leases, finisher
threads end jobs, and a prefetch thread leases the next batch during the last step of this one.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from engines.bucket import Bucket, pick_batch
from engines.bundle import Manifest, read_manifest
from engines.errors import EngineError
from engines.runtime.pipeline import BatchRun, Pipeline, Sample
from engines.signature import read_key
from server.batching import CostModel, Row
from server.cost import batch_cost
from server.expiry import Expiry
from server.finisher import Finisher
from server.heartbeat import Heartbeat
from server.inbox import Inbox
from server.job import JobError, JobErrorCode, JobKind, JobStatus
from server.metrics import Metrics, start_metrics_server
from server.queue.connection import system_now_ms
from server.queue.errors import QueueError
from server.queue.records import WorkerInfo
from server.queue.routes import Routes
from server.queue.worker_queue import Lease, Verdict, WorkerQueue
from server.settings import WorkerSettings
from server.store import ResultStore
from server.work import LeasedJob

log = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_ENGINE_LOST = 1
EXIT_UNUSABLE = 2
# An engine that takes this many times its measured time for one batch, and a minute at least, counts as hung.
STALL_FACTOR = 20
MIN_STALL_S = 60.0
# Finished jobs whose pixels wait in memory for packing; a 49-frame video of 720 x 480 is 51 MB.
MAX_PENDING = {JobKind.IMAGE: 64, JobKind.VIDEO: 4}
CANCELLED = JobError(code=JobErrorCode.CANCELLED, message="cancelled on request")
TOO_LATE = JobError(code=JobErrorCode.DEADLINE, message="the deadline passed while the job was running")


class EngineLostError(RuntimeError):
    """The device is in a state that only a new process gets out of."""


class Worker:
    """The engine's loop over one bundle."""

    def __init__(
        self,
        pipeline: Pipeline,
        inbox: Inbox,
        finisher: Finisher,
        heartbeat: Heartbeat,
        metrics: Metrics,
        *,
        clock: Callable[[], int],
    ) -> None:
        """Ties the parts together; `run` starts them."""
        self._pipeline = pipeline
        self._inbox = inbox
        self._finisher = finisher
        self._heartbeat = heartbeat
        self._metrics = metrics
        self._clock = clock
        self._model = pipeline.manifest.name
        self._device = str(pipeline.device)

    def run(self) -> None:
        """Draw batches until the inbox says to stop.

        Raises:
            EngineLostError: the process must end; its leases lapse and other workers take them.
        """
        is_first = True
        while (batch := self._inbox.next_batch()) is not None:
            if is_first:
                log_start("first job", self._model, {"first_job": process_ages_s()})
            is_first = False
            self._draw(batch)

    def _draw(self, batch: Sequence[Row[LeasedJob]]) -> None:
        """Draw a batch. If that fails, draw its halves; a sample that fails by itself fails its job."""
        batch = [row for row in batch if not row.leased_job.ended]
        if not batch:
            return
        try:
            self._run(batch)
        except Exception as error:  # the one broad place: fail these jobs, go on with the next
            if _device_lost(error):
                raise EngineLostError(str(error)) from error
            log.exception("a batch of %d failed", len(batch), extra={"model": self._model})
            if _out_of_memory(error):
                self._metrics.gpu_oom.labels(self._device).inc()
                self._inbox.limit(batch[0].leased_job.bucket, len(batch) // 2)
            if len(batch) == 1:
                self._finisher.fail(batch[0].leased_job, _job_error(error))
                return
            middle = len(batch) // 2
            self._draw(batch[:middle])
            self._draw(batch[middle:])

    def _run(self, batch: Sequence[Row[LeasedJob]]) -> None:
        """One batch through the engine."""
        start = time.perf_counter()
        run = self._pipeline.prepare([_sample(row) for row in batch])
        rows = list(batch)
        while not run.finished:
            if _steps_left(run) == 1:
                self._inbox.prefetch()
            self._pipeline.step(run)
            self._heartbeat.report(_progress(run, rows))
            rows = self._drop_ended(run, rows)
        for row, pixels in zip(rows, self._pipeline.decode(run), strict=True):
            row.leased_job.pixels[row.index] = pixels
        self._heartbeat.pulse()
        self._count(batch, run, (time.perf_counter() - start) * 1000)
        for leased in dict.fromkeys(row.leased_job for row in rows):
            for stage, spent_ms in run.timing_ms.items():
                leased.timing_ms[stage] = leased.timing_ms.get(stage, 0.0) + spent_ms
            if leased.drawn:
                self._finisher.finish(leased)

    def _drop_ended(self, run: BatchRun, rows: Sequence[Row[LeasedJob]]) -> list[Row[LeasedJob]]:
        """Between two steps: take out the rows whose job is cancelled, too late, or over elsewhere."""
        for leased in dict.fromkeys(row.leased_job for row in rows):
            verdict = self._heartbeat.verdict(leased.lease)
            if verdict is Verdict.CANCEL:
                self._finisher.fail(leased, CANCELLED, JobStatus.CANCELLED)
            elif verdict is Verdict.GONE:
                leased.ended = True
                self._heartbeat.release([leased.lease])
            elif self._clock() >= leased.job.deadline_ms:
                self._finisher.fail(leased, TOO_LATE)
        ended = [place for place, row in enumerate(rows) if row.leased_job.ended]
        if ended:
            run.drop(ended)
        return [row for row in rows if not row.leased_job.ended]

    def _count(self, batch: Sequence[Row[LeasedJob]], run: BatchRun, busy_ms: float) -> None:
        self._metrics.observe_batch(
            self._model,
            size=len(batch),
            capacity=pick_batch(len(batch), self._pipeline.manifest.batch_sizes),
            num_steps=sum(run.step_index),
            busy_ms=busy_ms,
            gpu=self._device,
        )


def load_pipeline(settings: WorkerSettings, kind: type[Pipeline] = Pipeline) -> Pipeline:
    """The bundle that the settings name, in memory."""
    key = None if settings.bundle_key_file is None else read_key(settings.bundle_key_file)
    return kind.load(settings.bundle, backend=settings.backend, num_threads=settings.num_threads, key=key)


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
    manifest, clock = pipeline.manifest, system_now_ms
    info = _worker_info(pipeline)
    queue = WorkerQueue(
        settings.redis_url, model=manifest.name, version=manifest.version, consumer=info.id, clock=clock
    )
    cost_ms = _cost_model(manifest, pipeline.backend)
    heartbeat = Heartbeat(
        queue,
        info,
        manifest.model_dump_json(),
        metrics,
        lease_s=settings.lease_s,
        stall_s=_stall_s(manifest, cost_ms),
        on_stall=lambda: os._exit(EXIT_ENGINE_LOST),  # a hung device call never returns to an orderly end
    )
    store = ResultStore(settings.store_url)
    finisher = Finisher(
        queue,
        store,
        heartbeat,
        metrics,
        version=manifest.version,
        unheard=pipeline.unheard,
        store_patience_s=settings.lease_s,
        max_pending=MAX_PENDING[JobKind(manifest.kind)],
        clock=clock,
    )
    inbox = Inbox(
        queue,
        heartbeat,
        metrics,
        max_batch=manifest.max_batch,
        cost_ms=cost_ms,
        lease_s=settings.lease_s,
        stopping=stopping,
        settle=finisher.settle,
        clock=clock,
    )
    worker = Worker(pipeline, inbox, finisher, heartbeat, metrics, clock=clock)
    status = EXIT_OK
    try:
        with ExitStack() as ends:  # from the last to the first, each whatever becomes of the others
            ends.callback(queue.close)
            if not _announce(heartbeat, stopping):
                return EXIT_OK
            ends.callback(queue.leave)
            ends.callback(heartbeat.close)
            ends.callback(finisher.close)
            ends.callback(inbox.close)
            if settings.expires:
                expiry = Expiry(store, settings.result_ttl_s)
                expiry.start()
                ends.callback(expiry.close)
            log.info("ready on %s", pipeline.backend, extra={"model": manifest.name, "worker": info.id})
            try:
                worker.run()
            except EngineLostError:
                log.exception("the device is lost")
                status = EXIT_ENGINE_LOST
    except QueueError as error:
        log.warning("ended while Redis was away; leases lapse by themselves: %s", error)
    return status


def _tell_why(settings: WorkerSettings, message: str) -> None:
    """Leave word for whoever waits for this worker, as far as the bundle can be named at all."""
    with suppress(EngineError, QueueError):
        manifest = read_manifest(settings.bundle)
        routes = Routes(settings.redis_url)
        routes.tell_failure(manifest.name, manifest.version, message)
        routes.close()


def process_ages_s() -> tuple[float, float] | None:
    """Seconds since this process was started, and of CPU time since; None where the kernel does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return None
    ticks = int(fields[19])  # the 22nd field, `starttime`: proc(5)
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return round(age_s, 2), round(time.process_time(), 2)


def log_start(message: str, model: str, ages_s: Mapping[str, tuple[float, float] | None]) -> None:
    """Log how old the process was at the end of each phase of its start, where that is known."""
    known = {phase: ages for phase, ages in ages_s.items() if ages is not None}
    start_s = {phase: age_s for phase, (age_s, _) in known.items()}
    cpu_s = {phase: spent_s for phase, (_, spent_s) in known.items()}
    log.info(message, extra={"model": model, "start_s": start_s, "cpu_s": cpu_s})


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


def _worker_info(pipeline: Pipeline) -> WorkerInfo:
    manifest, host = pipeline.manifest, socket.gethostname()
    return WorkerInfo(
        id=f"{host}-{os.getpid()}-{secrets.token_hex(4)}",
        model=manifest.name,
        kind=manifest.kind,
        version=manifest.version,
        backend=pipeline.backend,
        max_batch=manifest.max_batch,
        pid=os.getpid(),
        host=host,
        started_ms=system_now_ms(),
        warnings=tuple(pipeline.warnings),
        buckets=tuple(bucket.label for bucket in manifest.buckets),
        num_steps=tuple(manifest.num_steps),
    )


def _cost_model(manifest: Manifest, backend: str) -> CostModel:
    """The bundle's measured times on `backend`; where it has none, every batch is taken to cost the same."""

    @functools.cache
    def cost_ms(bucket: Bucket, num_steps: int, batch: int) -> float:
        cost = batch_cost(manifest, bucket, num_steps, (backend,))
        return 1.0 if cost is None else cost(batch)

    return cost_ms


def _stall_s(manifest: Manifest, cost_ms: CostModel) -> float:
    steps, batch = max(manifest.num_steps), manifest.max_batch
    slowest_ms = max(cost_ms(bucket, steps, batch) for bucket in manifest.buckets)
    return max(MIN_STALL_S, STALL_FACTOR * slowest_ms / 1000)


def _sample(row: Row[LeasedJob]) -> Sample:
    request = row.leased_job.job.request
    return Sample(
        prompt=request.prompt,
        seed=row.leased_job.seed(row.index),
        num_steps=request.num_steps,
        bucket=request.bucket,
    )


def _steps_left(run: BatchRun) -> int:
    """Denoiser calls until the whole batch is finished."""
    return max(sample.num_steps - done for sample, done in zip(run.samples, run.step_index, strict=True))


def _progress(run: BatchRun, rows: Sequence[Row[LeasedJob]]) -> dict[Lease, int]:
    """How far (0..100) the jobs of a batch are, counting the samples that they had in earlier ones."""
    in_batch: dict[LeasedJob, float] = {}
    for row, done in zip(rows, run.step_index, strict=True):
        in_batch[row.leased_job] = in_batch.get(row.leased_job, 0.0) + done / row.leased_job.num_steps
    return {
        leased.lease: int(100 * (leased.num_drawn + fraction) / leased.job.request.num_samples)
        for leased, fraction in in_batch.items()
    }


def _out_of_memory(error: Exception) -> bool:
    """True for Python's, the CPU allocator's and CUDA's ways to say so."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _device_lost(error: Exception) -> bool:
    """True for a CUDA error that leaves the context unusable: every later call would fail as well."""
    return "CUDA error" in str(error) and not _out_of_memory(error)


def _job_error(error: Exception) -> JobError:
    """What the client is told; details are in the log."""
    if _out_of_memory(error):
        return JobError(
            code=JobErrorCode.OUT_OF_MEMORY, message="one sample of this size does not fit into memory"
        )
    if isinstance(error, EngineError):
        return JobError(code=error.code, message=str(error))
    return JobError(code=JobErrorCode.GENERATION_FAILED, message="the engine failed on this request")
