"""dramatiq: one Lua dispatcher over lists and hashes, worker threads; each waiter blocks on a connection."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from loadtests.queue.contender import Client, Engine, Promises
from loadtests.queue.task import request

NUM_THREADS = 8  # its default
RESULT_TIMEOUT_MS = 600_000


class Dramatiq:
    """`dramatiq.brokers.redis` with its Redis result backend."""

    name = "dramatiq"
    distributions = ("dramatiq",)
    settings: Mapping[str, Any] = {"worker_threads": NUM_THREADS}
    promises = Promises(
        acknowledged="after the result, in a second command",
        killed_worker="runs again after 60 s without a command of its process, when chance (0.1 % of "
        "commands) runs maintenance",
        heartbeat="per process, with every command",
        same_job_twice="two jobs",
        one_result="the last finisher overwrites it",
        poison="runs again for ever (retries count exceptions only)",
        waiting="a blocking read, one connection for each waiter",
    )

    @asynccontextmanager
    async def client(self, url: str, *, in_flight: int) -> AsyncIterator[Client]:
        """Its API blocks: each call runs on a thread, as in an asyncio server that uses it."""
        broker, backend = _broker(url), RedisBackend(url=url)
        broker.add_middleware(Results(backend=backend))
        with ThreadPoolExecutor(in_flight) as threads:
            yield _Client(_actor(broker, None), backend, threads)
        broker.close()

    def serve(self, url: str, engine: Engine) -> None:
        """The worker that dramatiq's own command runs in each process."""
        stopping = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopping.set())
        broker = _broker(url)
        broker.add_middleware(Results(backend=RedisBackend(url=url)))
        _actor(broker, engine)
        worker = dramatiq.Worker(broker, worker_threads=NUM_THREADS)
        worker.start()
        stopping.wait()
        worker.stop()
        broker.close()


class _Client:
    def __init__(self, actor: Any, backend: RedisBackend, threads: ThreadPoolExecutor) -> None:
        self._actor = actor
        self._backend = backend
        self._threads = threads

    async def enqueue(self, serial: int) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._actor.send, request(serial))

    async def result(self, handle: Any) -> Any:
        def wait() -> Any:
            return handle.get_result(backend=self._backend, block=True, timeout=RESULT_TIMEOUT_MS)

        return await asyncio.get_running_loop().run_in_executor(self._threads, wait)


def _broker(url: str) -> RedisBroker:
    return RedisBroker(url=url)


def _actor(broker: RedisBroker, engine: Engine | None) -> Any:
    def draw(request: dict[str, Any]) -> dict[str, Any]:
        assert engine is not None, "only workers draw"
        return engine(request)

    return dramatiq.actor(actor_name="draw", broker=broker, store_results=True)(draw)
