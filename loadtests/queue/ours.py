"""Our queue as the api and the worker use it: JobQueue; WorkerQueue, heartbeat and finisher threads."""

import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import fields
from typing import Any

from engines.bundle.bucket import Bucket
from loadtests.queue.contender import Client, Engine, Promises
from loadtests.queue.task import WrongResultError, request
from server.job import UNMEASURED_MS, GenerationRequest, Job, JobKind, OutputRef, new_job
from server.metrics import Metrics
from server.queue.clock import system_now_ms
from server.queue.job_queue import JobQueue
from server.queue.records import EnqueueStatus, WorkerInfo
from server.queue.worker_queue import Lease, Settled, WorkerQueue
from server.worker.heartbeat import Heartbeat

MODEL = "null"
MAX_BATCH = 32
LEASE_S = 20.0
DEADLINE_S = 600
RECLAIM_PERIOD_S = 5.0
READ_BLOCK_MS = 1_000
TIMING = {
    "queue": 1.0,
    "batch_wait": 0.0,
    "encode": 0.0,
    "denoise": 0.0,
    "decode": 0.0,
    "pack": 0.0,
    "store": 0.0,
}

# The others know nothing of previews.
RECORDED = [field.name for field in fields(OutputRef) if field.name != "variant"]

Result = tuple[Job, Sequence[OutputRef], Mapping[str, float], Sequence[str]]


class OurQueue:
    """`server.queue`."""

    name = "tdm-server"
    distributions = ("redis", "hiredis")
    settings: Mapping[str, Any] = {"max_batch": MAX_BATCH, "lease_s": LEASE_S}
    promises = Promises(
        acknowledged="with the result, in one script",
        killed_worker="runs again, alone, once its lease of 20 s has lapsed",
        heartbeat="per job, by the worker's thread; only the owner can extend",
        same_job_twice="one job",
        one_result="first finisher wins, never changes",
        poison="failed with a dead letter after 3 dead workers",
        waiting="a reply stream, kept over reconnects",
    )

    @asynccontextmanager
    async def client(self, url: str, *, in_flight: int) -> AsyncIterator[Client]:  # noqa: ARG002 - no limit
        """The api process's side."""
        queue = JobQueue(url, max_waiting=1_000_000)
        await queue.start()
        try:
            yield _Client(queue)
        finally:
            await queue.close()

    def serve(self, url: str, engine: Engine) -> None:
        """The worker's side: its batcher, its engine, its finishers, without a model."""
        stopping = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopping.set())
        info = _worker_info()
        queue = WorkerQueue(url, model=MODEL, version=info.version, consumer=info.id)
        heartbeat = Heartbeat(queue, info, "{}", Metrics(), lease_s=LEASE_S, stall_s=60.0)
        heartbeat.start()
        try:
            with ThreadPoolExecutor(2, "finish") as finishers:
                _Worker(queue, heartbeat, finishers, engine).run(stopping)
        finally:
            heartbeat.close()
            queue.leave()
            queue.close()


class _Client:
    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue

    async def enqueue(self, serial: int) -> str:
        now_ms = system_now_ms()
        job = new_job(
            kind=JobKind.IMAGE,
            model=MODEL,
            request=_generation_request(request(serial)),
            now_ms=now_ms,
            deadline_ms=now_ms + DEADLINE_S * 1000,
        )
        accepted = await self._queue.enqueue(job)
        if accepted.status is not EnqueueStatus.OK:
            raise WrongResultError(f"job {serial}: {accepted.status}")
        return job.id

    async def result(self, handle: str) -> Any:
        job = await self._queue.wait(handle, DEADLINE_S)
        if job is None or not job.outputs:
            return job
        return {name: getattr(job.outputs[0], name) for name in RECORDED}


class _Worker:
    """Lease, look, start, run, complete; the next batch is leased while finishers complete this one."""

    def __init__(
        self, queue: WorkerQueue, heartbeat: Heartbeat, finishers: ThreadPoolExecutor, engine: Engine
    ) -> None:
        self._queue = queue
        self._heartbeat = heartbeat
        self._finishers = finishers
        self._engine = engine
        self._next_reclaim = 0.0

    def run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            self._heartbeat.pulse()
            leases = self._lease()
            if leases:
                self._run_batch(leases)

    def _lease(self) -> list[Lease]:
        leases: list[Lease] = []
        if time.monotonic() >= self._next_reclaim:
            self._next_reclaim = time.monotonic() + RECLAIM_PERIOD_S
            reclaimed = self._queue.reclaim(MAX_BATCH, int(LEASE_S * 1000))
            leases = [lease for lease in reclaimed if not self._heartbeat.holds(lease)]
        if not leases:
            leases = self._queue.read(MAX_BATCH, READ_BLOCK_MS)
        self._heartbeat.hold(leases)
        return leases

    def _run_batch(self, leases: Sequence[Lease]) -> None:
        jobs, _ = self._queue.look(leases)  # a real worker forms batches from what it sees here
        seen = {job.id: job for job in jobs if isinstance(job, Job)}
        done: dict[Lease, Result] = {}
        for lease, started in zip(leases, self._queue.start(leases, seen), strict=True):
            if started.job is None:
                self._heartbeat.release([lease])
                continue
            output = OutputRef(**self._engine(_plain(started.job.request)))
            done[lease] = (started.job, [output], TIMING, ())
        self._heartbeat.report(dict.fromkeys(done, 100))
        self._finishers.submit(self._finish, done)

    def _finish(self, done: Mapping[Lease, Result]) -> None:
        settled = self._queue.complete_all(list(done.values()))
        assert set(settled) <= {Settled.OK}, settled
        self._heartbeat.release(done)


def _generation_request(asked: Mapping[str, Any]) -> GenerationRequest:
    """The benchmark's request as our queue carries it."""
    return GenerationRequest(
        prompt=asked["prompt"],
        num_samples=asked["n"],
        bucket=Bucket(asked["height"], asked["width"], asked["frames"]),
        seed=asked["seed"],
        num_steps=asked["num_steps"],
        output_format=asked["output_format"],
        quality=asked["output_compression"],
    )


def _plain(request: GenerationRequest) -> dict[str, Any]:
    """What of a request the null engine looks at."""
    bucket = request.bucket
    return {
        "seed": request.seed,
        "width": bucket.width,
        "height": bucket.height,
        "frames": bucket.frames,
    }


def _worker_info() -> WorkerInfo:
    return WorkerInfo(
        id=f"bench-{secrets.token_hex(8)}",
        model=MODEL,
        kind="image",
        version="0123456789ab",
        backend="null",
        max_batch=MAX_BATCH,
        batch_ms=MAX_BATCH * UNMEASURED_MS,
        pid=1,
        host="here",
        started_ms=system_now_ms(),
    )
