"""Finisher: from drawn pixels to a finished job (pack, store, complete), on threads beside the engine's."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from server.job import JobError, JobErrorCode, JobStatus, OutputRef, Variant, result_folders
from server.logs import bound
from server.metrics import Metrics, Outcome
from server.queue.errors import QueueError
from server.queue.worker_queue import Settled, WorkerQueue
from server.store import ResultStore
from server.worker.heartbeat import Heartbeat
from server.worker.leased_job import LeasedJob
from server.worker.pace import RecentMedian
from server.worker.packing import Packed, Provenance, pack, prompt_hash
from server.worker.spans import Spans

log = logging.getLogger(__name__)

T = TypeVar("T")

# A finished job outlasts a Redis restart; after this the lease has lapsed anyway and another worker runs it.
REDIS_PATIENCE_S = 60.0
MAX_BACKOFF_S = 5.0
REDIS_AWAY = "queue_unavailable"
"""Why an attempt failed whose job does not: its outcome could not be told."""


class Finisher:
    """Ends jobs. `finish` and `fail` return at once unless `max_pending` jobs are still being finished."""

    def __init__(
        self,
        queue: WorkerQueue,
        store: ResultStore,
        heartbeat: Heartbeat,
        metrics: Metrics,
        spans: Spans,
        *,
        version: str,
        unheard: Callable[[str], Sequence[str]] = lambda _: (),
        store_patience_s: float,
        num_threads: int = 8,
        max_pending: int = 64,
        clock: Callable[[], int],
    ) -> None:
        """Starts no thread before the first job.

        Args:
            queue: where jobs end.
            store: where results go.
            heartbeat: keeps the lease until then.
            metrics: of this process.
            spans: told how each attempt ended.
            version: content hash of the bundle, for provenance.
            unheard: what of a prompt the model does not hear, in words for whoever asked.
            store_patience_s: how long a job's files that cannot be stored are tried again.
            num_threads: jobs finished at once.
            max_pending: pixels of how many jobs may wait in memory.
            clock: unix ms.
        """
        self._queue = queue
        self._store = store
        self._heartbeat = heartbeat
        self._metrics = metrics
        self._spans = spans
        self._version = version
        self._unheard = unheard
        self._store_patience_s = store_patience_s
        self._clock = clock
        self._beside = RecentMedian(0.0, 0)
        self._pool = ThreadPoolExecutor(num_threads, "finish")
        self._room = threading.BoundedSemaphore(max_pending)
        self._unfinished: set[Future[None]] = set()

    def finish(self, leased: LeasedJob) -> None:
        """Pack, store and complete a job whose samples are all drawn."""
        drawn_at = time.monotonic()
        self._submit(leased, lambda: self._finish(leased, drawn_at))

    def fail(self, leased: LeasedJob, error: JobError, status: JobStatus = JobStatus.FAILED) -> None:
        """End a job without results."""
        leased.ended = True
        self._submit(leased, lambda: self._fail(leased, error, status))

    def settle(self) -> None:
        """Return when every job handed over so far has ended. For the thread that hands them over."""
        while self._unfinished:
            self._unfinished = wait(self._unfinished, timeout=1.0).not_done
            self._heartbeat.pulse()  # the engine waits for us, it does not hang

    def close(self) -> None:
        """Return when every job handed over has ended."""
        self._pool.shutdown(wait=True)

    def _submit(self, leased: LeasedJob, end: Callable[[], None]) -> None:
        while not self._room.acquire(timeout=1.0):
            self._heartbeat.pulse()  # the engine waits for us, it does not hang
        self._unfinished = {future for future in self._unfinished if not future.done()}
        self._unfinished.add(self._pool.submit(self._with_ids, leased, end))

    def _with_ids(self, leased: LeasedJob, end: Callable[[], None]) -> None:
        with bound(**leased.log_ids):
            self._guarded(leased, end)

    def _guarded(self, leased: LeasedJob, end: Callable[[], None]) -> None:
        """Run `end` so that whatever it raises leaves the job ended, or to another worker."""
        try:
            try:
                end()
            except QueueError:
                raise
            except Exception:  # the pool would swallow it, and the heartbeat keep the job for ever
                log.exception("job could not be finished")
                error = JobError(
                    code=JobErrorCode.INTERNAL, message="the finished samples could not be packed"
                )
                self._fail(leased, error, JobStatus.FAILED)
        except QueueError as error:
            log.warning("left to another worker, as Redis does not answer: %s", error)
            self._spans.end(leased, "left", REDIS_AWAY)
        finally:
            self._heartbeat.release([leased.lease])
            self._room.release()

    def _finish(self, leased: LeasedJob, drawn_at: float) -> None:
        with self._spans.stage(leased, "pack"):
            packed = self._pack(leased)
        store_until = time.monotonic() + self._store_patience_s
        outputs: list[OutputRef] = []
        try:
            with self._spans.stage(leased, "store"):
                for index, file in enumerate(packed):
                    outputs.append(self._store_file(leased, index, file, Variant.SAMPLE, store_until))
                for index, file in enumerate(packed):
                    for variant, preview in file.previews.items():
                        outputs.append(self._store_file(leased, index, preview, variant, store_until))
        except OSError:
            log.exception("result not stored")
            self._discard(outputs)
            error = JobError(code=JobErrorCode.STORAGE, message="the result store does not answer")
            self._fail(leased, error, JobStatus.FAILED)
            return
        warnings = self._unheard(leased.job.request.prompt)
        complete = self._queue.complete
        settled = self._patiently(lambda: complete(leased.job, outputs, leased.timing_ms, warnings))
        self._spans.end(leased, Outcome.DONE if settled is Settled.OK else settled)
        if settled is Settled.OK:
            self._heartbeat.note_pace(beside_ms=self._beside.observe(1000 * (time.monotonic() - drawn_at)))
            self._count_end(leased, Outcome.DONE)
            self._count_outputs(outputs)
            took_ms = self._clock() - leased.job.created_ms
            log.info("job done", extra={"model": leased.job.model, "duration_ms": took_ms})
        elif settled is Settled.CANCELLED:
            self._count_end(leased, Outcome.CANCELLED)
            self._discard(outputs)
        else:
            log.info("result came second (%s)", settled)
            self._metrics.job_duplicates.labels(leased.job.model, settled).inc()
            self._discard(outputs)

    def _fail(self, leased: LeasedJob, error: JobError, status: JobStatus) -> None:
        log.warning("job %s: %s", status, error.code, extra={"code": error.code})
        fail = self._queue.fail
        settled = self._patiently(lambda: fail(leased.job, error, leased.timing_ms, status=status))
        code = None if status is JobStatus.CANCELLED else error.code
        self._spans.end(leased, status if settled is Settled.OK else settled, code)
        if settled is Settled.OK:
            late = error.code == JobErrorCode.DEADLINE
            self._count_end(leased, Outcome.DEADLINE if late else Outcome(status))

    def _pack(self, leased: LeasedJob) -> list[Packed]:
        request = leased.job.request
        packed = []
        for index, pixels in enumerate(leased.pixels):
            assert pixels is not None, f"sample {index} of {leased.job.id} is not drawn"
            provenance = Provenance(
                model=leased.job.model,
                version=self._version,
                seed=leased.seed(index),
                num_steps=request.num_steps,
                prompt_sha256=prompt_hash(request.prompt),
            )
            packed.append(
                pack(pixels, request.output_format, provenance, quality=request.quality, fps=request.fps)
            )
            leased.pixels[index] = None  # a video's are large, and the store may take a while
        return packed

    def _store_file(
        self, leased: LeasedJob, index: int, file: Packed, variant: Variant, until: float
    ) -> OutputRef:
        name = str(index) if variant is Variant.SAMPLE else f"{index}-{variant}"
        key = f"{result_folders(leased.job.id)[0]}/{leased.job.attempt}-{name}.{file.suffix}"
        self._put(key, file, until)
        return OutputRef(
            key=key,
            content_type=file.content_type,
            size_bytes=len(file.data),
            width=file.width,
            height=file.height,
            frames=leased.job.request.bucket.frames if variant is Variant.SAMPLE else 1,
            seed=leased.seed(index),
            variant=variant,
        )

    def _put(self, key: str, file: Packed, until: float) -> None:
        """Store one file. Tried again if need be: the picture was dear, and object stores have bad seconds.

        Raises:
            OSError: it still fails after `until`, on `time.monotonic`'s clock.
        """
        backoff_s = 0.1
        while True:
            try:
                with self._metrics.storage_op.labels("put").time():
                    self._store.put(key, file.data, file.content_type)
                return
            except OSError as error:
                if time.monotonic() > until:
                    raise
                log.warning("not stored, trying again: %s", error)
                time.sleep(random.uniform(0, backoff_s))
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _discard(self, outputs: list[OutputRef]) -> None:
        """Delete objects that no job record names; what cannot be deleted now is left to expiry."""
        for output in outputs:
            try:
                self._store.delete(output.key)
            except OSError as error:
                log.warning("not deleted: %s", error)

    def _patiently(self, verb: Callable[[], T]) -> T:
        """Call a queue verb until Redis answers.

        Raises:
            QueueError: it did not for REDIS_PATIENCE_S.
        """
        deadline = time.monotonic() + REDIS_PATIENCE_S
        backoff_s = 0.1
        while True:
            try:
                return verb()
            except QueueError as error:
                self._metrics.redis_errors.labels("finish").inc()
                if time.monotonic() > deadline:
                    raise
                log.warning("trying again: %s", error)
                time.sleep(random.uniform(0, backoff_s))
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _count_end(self, leased: LeasedJob, outcome: Outcome) -> None:
        self._metrics.observe_job_end(
            leased.job,
            outcome,
            now_ms=self._clock(),
            timing_ms=leased.timing_ms if outcome is Outcome.DONE else None,
            version=self._version,
        )

    def _count_outputs(self, outputs: list[OutputRef]) -> None:
        for output in outputs:
            if output.variant is not Variant.SAMPLE:
                continue
            if output.content_type.startswith("image/"):
                self._metrics.images.labels(self._queue.model).inc()
            else:
                self._metrics.video_frames.labels(self._queue.model).inc(output.frames)
