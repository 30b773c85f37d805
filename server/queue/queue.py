"""JobQueue: the api process's side of the queue (enqueue, look up, wait, cancel, count)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from server.job import Job
from server.queue.records import EnqueueResult, QueueStats


def system_now_ms() -> int:
    """Unix time in ms."""
    return time.time_ns() // 1_000_000


class JobQueue:
    """All queue classes of one Redis, as one api process sees them. One instance per event loop.

    Raises `redis.exceptions.RedisError` (ConnectionError, TimeoutError, ...) where Redis cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        max_waiting: int = 256,
        max_live_per_tenant: int | None = None,
        result_ttl_s: int = 86_400,
        clock: Callable[[], int] = system_now_ms,
    ) -> None:
        """Connects lazily: nothing is sent before the first verb.

        Args:
            url: redis://, rediss:// or unix:// URL of Redis 7.0+ or Valkey 8+.
            max_waiting: queued jobs a class may hold; one more is QUEUE_FULL.
            max_live_per_tenant: queued and running jobs a tenant may have in a class; None: no limit.
            result_ttl_s: how long the record of a finished job is kept.
            clock: unix ms.
        """
        raise NotImplementedError

    async def start(self) -> None:
        """Start the sweep; reply readers start with the first job of their class."""
        raise NotImplementedError

    async def close(self) -> None:
        """Stop the background tasks and disconnect. Waiting futures are cancelled."""
        raise NotImplementedError

    async def ping(self) -> None:
        """Return if Redis answers, else raise its error."""
        raise NotImplementedError

    async def enqueue(self, job: Job, *, idempotency_key: str | None = None) -> EnqueueResult:
        """Accept `job` or say why not, atomically. With OK the job has reached Redis's append-only file.

        Raises:
            ValueError: request larger than 64 KiB, or key longer than 255 characters.
        """
        raise NotImplementedError

    async def get(self, job_id: str) -> Job | None:
        """The job, or None where no such id is (any longer) known."""
        raise NotImplementedError

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel at once while queued, at the next step boundary while running. Returns the job as it is."""
        raise NotImplementedError

    async def wait(self, job_id: str, timeout_s: float) -> Job | None:
        """The job once it is finished, or as it stands after `timeout_s`; None for an unknown id."""
        raise NotImplementedError

    async def stats(self, model: str) -> QueueStats:
        """Counts of one class and its live workers."""
        raise NotImplementedError

    async def models(self) -> dict[str, Mapping[str, Any]]:
        """Every model a worker has ever announced here: name -> its bundle's manifest.json, as a dict.

        A model stays known while no worker serves it, so its jobs can wait.
        """
        raise NotImplementedError
