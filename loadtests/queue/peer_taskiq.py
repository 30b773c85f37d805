"""taskiq with taskiq-redis: a stream, acknowledged once the result is saved; clients poll for results."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from taskiq import AsyncTaskiqTask
from taskiq.acks import AcknowledgeType
from taskiq.api import run_receiver_task
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from loadtests.queue.contender import Client, Engine, Promises
from loadtests.queue.task import request

RESULT_TTL_S = 600
CONCURRENCY = 100  # its default
# Its default interval of 0.2 s would be most of an idle round trip; these were the best of a few tried.
IDLE_POLL_S = 0.001
BUSY_POLL_S = 0.03


class Taskiq:
    """`taskiq_redis.RedisStreamBroker` with its result backend."""

    name = "taskiq-redis"
    distributions = ("taskiq", "taskiq-redis")
    settings: Mapping[str, Any] = {
        "ack": "when_saved",
        "consumer_id": "0",
        "max_async_tasks": CONCURRENCY,
        "idle_poll_s": IDLE_POLL_S,
        "busy_poll_s": BUSY_POLL_S,
    }
    promises = Promises(
        acknowledged="after the result, in a second command",
        killed_worker="runs again when another worker claims what was idle for 10 min",
        heartbeat="none: a job of more than 10 min runs twice",
        same_job_twice="two jobs",
        one_result="the last finisher overwrites it",
        poison="runs again for ever",
        waiting="polling; entries stay in the stream",
    )

    @asynccontextmanager
    async def client(self, url: str, *, in_flight: int) -> AsyncIterator[Client]:
        """A broker that only sends."""
        broker = _broker(url)
        await broker.startup()
        try:
            yield _Client(broker, IDLE_POLL_S if in_flight == 1 else BUSY_POLL_S)
        finally:
            await broker.shutdown()

    def serve(self, url: str, engine: Engine) -> None:
        """The receiver that taskiq's own worker command runs."""
        logging.getLogger("taskiq").setLevel(logging.ERROR)

        async def run() -> None:
            broker = _broker(url, engine)
            broker.is_worker_process = True
            await broker.startup()
            receiver = asyncio.create_task(
                run_receiver_task(broker, max_async_tasks=CONCURRENCY, ack_time=AcknowledgeType.WHEN_SAVED)
            )
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, receiver.cancel)
            with suppress(asyncio.CancelledError):
                await receiver
            await broker.shutdown()

        asyncio.run(run())


class _Client:
    def __init__(self, broker: RedisStreamBroker, poll_s: float) -> None:
        self._task = broker.find_task("draw")
        self._poll_s = poll_s

    async def enqueue(self, serial: int) -> AsyncTaskiqTask[Any]:
        assert self._task is not None, "the broker was made without its task"
        sent: AsyncTaskiqTask[Any] = await self._task.kiq(request(serial))
        return sent

    async def result(self, handle: AsyncTaskiqTask[Any]) -> Any:
        return (await handle.wait_result(check_interval=self._poll_s)).return_value


def _broker(url: str, engine: Engine | None = None) -> RedisStreamBroker:
    results: RedisAsyncResultBackend[Any] = RedisAsyncResultBackend(url, result_ex_time=RESULT_TTL_S)
    # From entry 0: with its default "$" jobs sent before the first worker are never run.
    broker = RedisStreamBroker(url, consumer_id="0").with_result_backend(results)

    async def draw(request: dict[str, Any]) -> dict[str, Any]:
        assert engine is not None, "only workers draw"
        return engine(request)

    broker.register_task(draw, task_name="draw")
    return broker
