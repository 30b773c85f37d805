"""The loop of the engine, all that its thread does: next batch, encode, denoise, decode, to the finisher."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from engines.bundle.bucket import pick_batch
from engines.errors import EngineError
from engines.runtime.pipeline import BatchRun, Pipeline, Sample
from server.job import JobError, JobErrorCode, JobStatus
from server.logs import bound
from server.metrics import Metrics
from server.queue.worker_queue import Lease, Verdict
from server.worker.ages import log_start, process_ages_s
from server.worker.batch_policy import Row
from server.worker.batcher import Batcher
from server.worker.finisher import Finisher
from server.worker.heartbeat import Heartbeat
from server.worker.leased_job import LeasedJob
from server.worker.pace import PacedCost
from server.worker.spans import BatchSpan, Spans

log = logging.getLogger(__name__)

CANCELLED = JobError(code=JobErrorCode.CANCELLED, message="cancelled on request")
TOO_LATE = JobError(code=JobErrorCode.DEADLINE, message="the deadline passed while the job was running")
DEVICE_LOST = "device_lost"
"""Why an attempt failed whose job does not: another process begins the next one."""


class EngineLostError(RuntimeError):
    """The device is in a state that only a new process gets out of."""


class Worker:
    """The engine's loop over one bundle."""

    def __init__(
        self,
        pipeline: Pipeline,
        batcher: Batcher,
        finisher: Finisher,
        heartbeat: Heartbeat,
        metrics: Metrics,
        spans: Spans,
        *,
        cost_ms: PacedCost,
        clock: Callable[[], int],
    ) -> None:
        """Ties the parts together; `run` starts them. `cost_ms` is told what each batch took."""
        self._pipeline = pipeline
        self._batcher = batcher
        self._finisher = finisher
        self._heartbeat = heartbeat
        self._metrics = metrics
        self._spans = spans
        self._cost_ms = cost_ms
        self._clock = clock
        self._model = pipeline.manifest.name
        self._device = str(pipeline.device)

    def run(self) -> None:
        """Draw batches until the batcher says to stop.

        Raises:
            EngineLostError: the process must end; its leases lapse and other workers take them.
        """
        is_first = True
        while (batch := self._batcher.next_batch()) is not None:
            if is_first:
                log_start("first job", self._model, {"first_job": process_ages_s()})
            is_first = False
            self._draw(batch)

    def _draw(self, batch: Sequence[Row[LeasedJob]]) -> None:
        """Draw a batch. If that fails, draw its halves; a sample that fails by itself fails its job."""
        batch = [row for row in batch if not row.leased_job.ended]
        if not batch:
            return
        traced = self._spans.batch(batch)
        try:
            with bound(batch_id=traced.id):
                self._run(batch, traced)
        except Exception as error:  # the one broad place: fail these jobs, go on with the next
            if _device_lost(error):
                traced.end(DEVICE_LOST)
                for row in batch:
                    self._spans.end(row.leased_job, "left", DEVICE_LOST)
                raise EngineLostError(str(error)) from error
            traced.end(_job_error(error).code)
            log.exception(
                "a batch of %d failed", len(batch), extra={"model": self._model, "batch_id": traced.id}
            )
            if _out_of_memory(error):
                self._metrics.gpu_oom.labels(self._device).inc()
                self._batcher.limit(batch[0].leased_job.bucket, len(batch) // 2)
            if len(batch) == 1:
                self._finisher.fail(batch[0].leased_job, _job_error(error))
                return
            middle = len(batch) // 2
            self._draw(batch[:middle])
            self._draw(batch[middle:])

    def _run(self, batch: Sequence[Row[LeasedJob]], traced: BatchSpan) -> None:
        """One batch through the engine."""
        start = time.perf_counter()
        run = self._pipeline.prepare([_sample(row) for row in batch])
        rows = list(batch)
        while not run.finished:
            if _steps_left(run) == 1:
                self._batcher.prefetch()
            self._pipeline.step(run)
            self._heartbeat.report(_progress(run, rows))
            rows = self._drop_ended(run, rows)
        for row, pixels in zip(rows, self._pipeline.decode(run), strict=True):
            row.leased_job.pixels[row.index] = pixels
        self._heartbeat.pulse()
        busy_ms = (time.perf_counter() - start) * 1000
        traced.end()
        self._count(batch, run, busy_ms)
        if len(rows) == len(batch):
            self._learn(batch, busy_ms)
        log.debug("drew a batch of %d", len(batch), extra={"duration_ms": round(busy_ms, 1)})
        for leased in dict.fromkeys(row.leased_job for row in rows):
            for stage, spent_ms in run.timing_ms.items():
                leased.timing_ms[stage] = leased.timing_ms.get(stage, 0.0) + spent_ms
            traced.note_stages(leased, run.timing_ms, busy_ms)
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
                self._spans.end(leased, verdict)
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

    def _learn(self, batch: Sequence[Row[LeasedJob]], busy_ms: float) -> None:
        """Have a batch that was drawn whole say how fast the engine is, and tell it to whoever predicts."""
        num_steps = max(row.leased_job.num_steps for row in batch)
        self._cost_ms.observe(batch[0].leased_job.bucket, num_steps, len(batch), busy_ms)
        self._heartbeat.note_pace(ratio=self._cost_ms.pace)
        self._metrics.pace.labels(self._model).set(self._cost_ms.pace)


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
