"""Jobs: what routes do with one: find it, wait for it, cancel it; when it will be finished, and its bytes."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

from fastapi import Request

from server.api.admission import own_ms, predict_eta_ms
from server.api.dependencies import Services
from server.api.errors import (
    JobNotFoundError,
    RangeNotSatisfiableError,
    ResultExpiredError,
    ResultNotReadyError,
    StoreUnavailableError,
)
from server.api.views import etag_of, failure_of
from server.job import Job, JobKind, JobStatus, OutputRef, is_over
from server.metrics import Outcome

POLL_MS = 1000.0

_RANGE = re.compile(r"bytes=(?:(\d{1,18})-(\d{0,18})|-(\d{1,18}))")


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


async def wait_for_job(services: Services, request: Request, job_id: str, timeout_s: float) -> Job | None:
    """The job once it is finished, or as it stands when the wait ends: after `timeout_s`, or when the process
    drains.

    Returns:
        None for an unknown id.

    Raises:
        ClientGoneError: the client left first.
    """
    if timeout_s <= 0 or services.draining.is_set():
        return await services.queue.get(job_id)
    done = asyncio.create_task(services.queue.wait(job_id, timeout_s))
    left = asyncio.create_task(_disconnected(request))
    draining = asyncio.create_task(services.draining.wait())
    tasks: set[asyncio.Task[object]] = {done, left, draining}
    with services.metrics.result_waiters.track_inprogress():
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks - {done}:
                task.cancel()
            if not done.done():
                done.cancel()
    if done.done() and not done.cancelled():
        return done.result()
    if left.done() and not left.cancelled():
        raise ClientGoneError
    return await services.queue.get(job_id)


async def cancel_if_queued(services: Services, job_id: str) -> None:
    """Cancel a job that nobody waits for any more. One that runs is nearly done: it finishes and is kept."""
    job = await services.queue.get(job_id)
    if job is not None and job.status is JobStatus.QUEUED:
        await cancel(services, job)


async def cancel(services: Services, job: Job) -> Job | None:
    """Cancel a job, and count it if it had not started."""
    now = await services.queue.cancel(job.id)
    if now is not None:
        count_cancelled(services, job, now)
    return now


def count_cancelled(services: Services, before: Job, now: Job) -> None:
    """Count a job that was cancelled in the queue: those that run are counted by their worker."""
    if before.status is JobStatus.QUEUED and now.status is JobStatus.CANCELLED:
        services.metrics.observe_job_end(now, Outcome.CANCELLED, now_ms=services.now_ms())


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def find_job(services: Services, job_id: str, kind: JobKind) -> Job:
    """The job of this id and kind.

    Raises:
        JobNotFoundError: there is none (any longer).
    """
    job = await services.queue.get(job_id)
    if job is None or job.kind is not kind:
        raise unknown_job(job_id, kind)
    return job


def unknown_job(job_id: str, kind: JobKind) -> JobNotFoundError:
    """What is said of an id that leads nowhere."""
    return JobNotFoundError(
        f"no {kind} job {job_id!r}; finished jobs are kept for a limited time", param="id"
    )


async def is_expired(services: Services, job: Job) -> bool:
    """Whether a completed job's results are gone: their time is over, or somebody has removed them.

    Only its samples are asked for: previews go with them, and each is a call to the store. While the store
    does not answer, the record is believed; who asks for the bytes is told then.
    """
    if job.status is not JobStatus.DONE:
        return False
    if is_over(job, services.settings.result_ttl_s, services.now_ms()):
        return True
    try:
        kept = await asyncio.gather(
            *(asyncio.to_thread(services.store.exists, output.key) for output in job.samples)
        )
    except OSError:
        return False
    return not all(kept)


def expired(job: Job) -> ResultExpiredError:
    """What is said of results that are gone."""
    return ResultExpiredError(
        f"the {job.kind}s of job {job.id} are no longer kept; draw them again with seed {job.request.seed}"
    )


async def eta_of(services: Services, job: Job, position: int | None) -> float | None:
    """Predicted ms until an unfinished job is finished; `position` is None for one that runs.

    Returns:
        None where nothing is known of such a job: its bundle may have been built anew without its size.
    """
    model = (await services.catalog.models()).get(job.model)
    batch_ms = model.batch_ms(job.request.bucket, job.request.num_steps) if model is not None else None
    if model is None or batch_ms is None:
        return None
    load = model.load
    ahead_ms = 0.0
    if position is not None:  # the queue adds up the work of all that wait: take theirs to be of a size
        ahead_ms = load.running_ms + load.waiting_ms * min(1.0, position / max(1, load.waiting))
    return predict_eta_ms(load, own_ms(load, batch_ms, job.request.num_samples), ahead_ms=ahead_ms)


async def require_done(services: Services, job: Job) -> None:
    """Return if the job's bytes are there to be asked for.

    Raises:
        ApiError: it is not finished, ended without results, or they are no longer kept.
    """
    if not job.finished:
        eta_ms = await eta_of(services, job, await services.queue.position(job))
        raise ResultNotReadyError(f"job {job.id} is not finished", retry_after_ms=eta_ms or POLL_MS)
    if job.status is not JobStatus.DONE:
        raise failure_of(job)
    if is_over(job, services.settings.result_ttl_s, services.now_ms()):  # the bytes may lie there for a while
        raise expired(job)


def content_headers(services: Services, job: Job, output: OutputRef, name: str) -> dict[str, str]:
    """Headers of a response with a result's bytes: they never change, so clients may keep them.

    Args:
        services: of this process.
        job: done.
        output: one of its results.
        name: what a browser calls the file, without suffix.
    """
    now_ms = services.now_ms()
    left_s = ((job.finished_ms or now_ms) - now_ms) // 1000 + services.settings.result_ttl_s
    return {
        "etag": etag_of(output),
        "cache-control": f"private, max-age={left_s}, immutable",
        "content-disposition": f'inline; filename="{name}.{output.key.rpartition(".")[2]}"',
    }


def has_good_copy(request: Request, output: OutputRef) -> bool:
    """Whether the client has these bytes already."""
    return etag_of(output) in request.headers.get("if-none-match", "")


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `start` up to `end`, exclusive."""

    start: int
    end: int


def range_of(request: Request, output: OutputRef) -> ByteRange | None:
    """The part of a result that is asked for; None for all of it.

    What is not understood (several ranges, other units) asks for all, as HTTP wants it.

    Raises:
        RangeNotSatisfiableError: it begins beyond the end.
    """
    if request.headers.get("if-range", etag_of(output)) != etag_of(output):
        return None
    found = _RANGE.fullmatch(request.headers.get("range", "").replace(" ", ""))
    if found is None:
        return None
    first, last, suffix = found.groups()
    size = output.size_bytes
    if suffix is not None:
        start, end = max(0, size - int(suffix)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    if start >= end:
        raise RangeNotSatisfiableError(f"the content has {size} bytes", param="range")
    return ByteRange(start, end)


async def read(services: Services, output: OutputRef, part: ByteRange | None = None) -> bytes:
    """The bytes of one result, or a part of them.

    Raises:
        ResultExpiredError: they are gone.
        StoreUnavailableError: the store does not answer.
    """
    started = time.perf_counter()
    bounds = () if part is None else (part.start, part.end)
    try:
        return await asyncio.to_thread(services.store.get, output.key, *bounds)
    except FileNotFoundError:
        raise ResultExpiredError("this result is no longer kept; draw it again with its seed") from None
    except OSError as error:
        raise StoreUnavailableError("the result store does not answer", retry_after_ms=1000) from error
    finally:
        services.metrics.storage_op.labels("get").observe(time.perf_counter() - started)
