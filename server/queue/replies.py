"""Replies: how one api process hears that jobs have ended, and who in it waits for that.

For each class Redis keeps a stream of replies to this process, and one reader here wakes everybody. A reply
can get lost, with Redis or at the end of a long stream: `JobQueue.sweep` asks after the jobs that are waited
for.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import redis.asyncio
from redis.exceptions import RedisError

from server.job import Job
from server.queue.keys import replies_key

log = logging.getLogger(__name__)

READ_BLOCK_MS = 2_000


class Replies:
    """Those to one process. For one event loop."""

    def __init__(self, client: redis.asyncio.Redis) -> None:
        """Reads nothing before the first wait."""
        self.address = secrets.token_hex(8)
        """What this process's streams are called by."""
        self._redis = client
        self._expected: dict[str, Job] = {}
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Stop reading, and cancel whoever still waits."""
        tasks = set(self._readers.values())
        while tasks:
            for task in tasks:
                task.cancel()
            # Again and again: before Python 3.12 asyncio.wait_for, inside redis-py, can swallow a cancel.
            _, tasks = await asyncio.wait(tasks, timeout=0.1)
        for future in [future for futures in self._waiters.values() for future in futures]:
            future.cancel()

    def expect(self, job: Job) -> None:
        """Take it that this process will be told the end of a job without asking: it has handed it in."""
        self._expected[job.id] = job

    def expect_no_more(self, job_id: str) -> None:
        """The opposite: it was not accepted."""
        self._expected.pop(job_id, None)

    def drop_overdue(self, deadline_before_ms: int) -> None:
        """Expect no more of jobs that have long ended, whose replies were lost and which nobody waits for."""
        for job in [job for job in self._expected.values() if job.deadline_ms < deadline_before_ms]:
            del self._expected[job.id]

    @property
    def waited_for(self) -> list[str]:
        """Ids of the jobs that somebody waits for."""
        return list(self._waiters)

    async def wait(self, job_id: str, timeout_s: float, watch: Callable[[], Awaitable[bool]]) -> None:
        """Return once a job has ended, at the latest after `timeout_s`.

        Args:
            job_id: of any job.
            timeout_s: from when it is known that the end will be told.
            watch: has this process told of it, and says whether there is anything to wait for.
        """
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(job_id, set()).add(future)
        try:
            if self._is_expected(job_id) or await watch():
                with suppress(TimeoutError):
                    async with asyncio.timeout(timeout_s):
                        await future
        finally:
            self._waiters[job_id].discard(future)
            if not self._waiters[job_id]:
                del self._waiters[job_id]

    def wake(self, job_id: str) -> None:
        """Have all who wait for a job look at it."""
        self._expected.pop(job_id, None)
        for future in self._waiters.get(job_id, ()):
            if not future.done():
                future.set_result(None)

    def listen(self, model: str) -> None:
        """Read the replies of a class from now on."""
        if model not in self._readers:
            name = f"queue replies {model}"
            self._readers[model] = asyncio.create_task(self._read(model), name=name)

    def _is_expected(self, job_id: str) -> bool:
        job = self._expected.get(job_id)
        if job is None:
            return False
        self.listen(job.model)
        return True

    async def _read(self, model: str) -> None:
        """Wake the waiters of one class, for as long as this process lives."""
        stream, last = replies_key(model, self.address), "0-0"
        while True:
            try:
                reply: Any = await self._redis.xread({stream: last}, block=READ_BLOCK_MS)
            except RedisError as error:
                log.warning("reply stream of %s: %s; reading on from %s", model, error, last)
                await asyncio.sleep(0.5)
                continue
            for _, entries in reply:
                for entry, fields in entries:
                    self.wake(fields["id"])
                    last = entry
