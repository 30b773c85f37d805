"""Waiting: a request holds on for its job, and lets go when the client, the clock or the process does."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from server.job import Job, JobStatus
from server.metrics import Outcome
from server.services import Services


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
