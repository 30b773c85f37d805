"""saq: lists and one JSON document a job; results by pub/sub."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis.asyncio import Redis
from saq import Job, Worker
from saq.job import TERMINAL_STATUSES, get_default_job_key
from saq.queue.redis import RedisQueue

from loadtests.queue.contender import Client, Engine, Promises
from loadtests.queue.task import WrongResultError, request

RETRIES = 3  # with its default of 1, a job whose worker was killed is aborted, not run again
TIMEOUT_S = 60
CONCURRENCY = 64
NOTICE_TIMEOUT_S = 5.0


class Saq:
    """`saq.queue.redis`."""

    name = "saq"
    distributions = ("saq",)
    settings: Mapping[str, Any] = {
        "retries": RETRIES,
        "timeout_s": TIMEOUT_S,
        "concurrency": CONCURRENCY,
        "max_concurrent_ops": CONCURRENCY,
    }
    promises = Promises(
        acknowledged="with the result, in one transaction",
        killed_worker=f"runs again when a sweep (every 60 s) finds it past its timeout (here {TIMEOUT_S} s)",
        heartbeat="per job, if the job's own code calls update(); not owner-checked",
        same_job_twice="one job while it is unfinished, if the client names it",
        one_result="the last finisher overwrites it",
        poison="aborted after `retries` attempts",
        waiting="pub/sub: a notice during a reconnect is lost",
    )

    @asynccontextmanager
    async def client(self, url: str, *, in_flight: int) -> AsyncIterator[Client]:
        """Listens all the time: otherwise every wait that finds no other subscribes anew."""
        queue = _queue(url, in_flight)
        await queue.connect()
        listening = asyncio.create_task(queue.listen(["nobody"], lambda *_: False, None))
        while not await queue.redis.pubsub_numpat():  # noqa: ASYNC110 - Redis sets no event of ours
            await asyncio.sleep(0.01)
        try:
            yield _Client(queue)
        finally:
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening
            await queue.disconnect()

    def serve(self, url: str, engine: Engine) -> None:
        """The worker loop of saq itself, with its sweep and the rest of its upkeep."""

        async def draw(_context: Any, *, request: dict[str, Any]) -> dict[str, Any]:
            return engine(request)

        async def run() -> None:
            queue = _queue(url, CONCURRENCY)
            await Worker(queue, functions=[("draw", draw)], concurrency=CONCURRENCY).start()
            await queue.disconnect()

        asyncio.run(run())


class _Client:
    def __init__(self, queue: RedisQueue) -> None:
        self._queue = queue

    async def enqueue(self, serial: int) -> tuple[Job, "asyncio.Task[None]"]:
        """Listens before it enqueues, since a notice is sent once."""
        key = get_default_job_key()
        job = Job(
            function="draw", kwargs={"request": request(serial)}, key=key, retries=RETRIES, timeout=TIMEOUT_S
        )
        ended = asyncio.create_task(
            self._queue.listen([key], lambda _, status: status in TERMINAL_STATUSES, NOTICE_TIMEOUT_S)
        )
        await asyncio.sleep(0)  # let it subscribe
        if await self._queue.enqueue(job) is None:
            raise WrongResultError(f"job {serial} is not new")
        return job, ended

    async def result(self, handle: tuple[Job, "asyncio.Task[None]"]) -> Any:
        job, ended = handle
        while True:
            with suppress(TimeoutError):  # a notice was lost: look, and listen again
                await ended
            await job.refresh()
            if job.completed:
                return job.result
            ended = asyncio.create_task(job.refresh(until_complete=NOTICE_TIMEOUT_S))


def _queue(url: str, max_concurrent_ops: int) -> RedisQueue:
    return RedisQueue(Redis.from_url(url, socket_timeout=None), max_concurrent_ops=max_concurrent_ops)
