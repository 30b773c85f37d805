"""WorkerQueue: the worker's side of the queue (lease, start, extend, finish, hand back)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from redis.exceptions import ResponseError

from server.job import Job, JobError, JobStatus, OutputRef, Priority
from server.queue.connection import SOCKET_TIMEOUT_S, connect, system_now_ms
from server.queue.records import WorkerInfo, dump_error, dump_outputs, dump_worker, load_job
from server.queue.scripts import VERBS, script

GROUP = "w"
MAX_ATTEMPTS = 3
WORKER_TTL_MS = 15_000
MAX_BLOCK_MS = int(SOCKET_TIMEOUT_S * 1000) // 2


@dataclass(frozen=True, slots=True)
class Lease:
    """One worker's time-limited hold on one job: the stream entry that delivered it, and the job's id."""

    entry: str
    job_id: str


class Verdict(StrEnum):
    """What `extend` learns about a lease.

    CANCEL: the client asks to stop. LOST: it lapsed and another worker has the job; our result may still come
    first. GONE: the job is finished or unknown, our work is of no use.
    """

    OK = "ok"
    CANCEL = "cancel"
    LOST = "lost"
    GONE = "gone"


class Settled(StrEnum):
    """What became of a result or a failure. STALE: another stands and ours is to be discarded."""

    OK = "ok"
    STALE = "stale"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Started:
    """The job as it now runs; or None, and why not: "lost", "unknown", "deadline", "poison" or a status."""

    job: Job | None
    dropped: str = ""


class WorkerQueue:
    """One queue class as one worker process sees it.

    Every verb may be called from any thread, and again after a connection error: repeating one whose reply
    was lost has no second effect. All raise `redis.exceptions.RedisError` where Redis cannot be reached.
    """

    def __init__(
        self, url: str, *, model: str, consumer: str, clock: Callable[[], int] = system_now_ms
    ) -> None:
        """Connects with the first verb.

        Args:
            url: redis://, rediss:// or unix:// URL of Redis 7.0+ or Valkey 8+.
            model: the class to serve.
            consumer: unique per process life and never used again; the lease is its.
            clock: unix ms.
        """
        self.model = model
        self.consumer = consumer
        self._clock = clock
        self._redis = connect(url)
        self._prefix = class_prefix(model)
        self._stream = f"{self._prefix}:s"
        self._scripts = {verb: self._redis.register_script(script(verb)) for verb in VERBS}

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()

    def beat(self, info: WorkerInfo, manifest_json: str) -> None:
        """Announce this worker, or say that it still lives; due every few seconds.

        The first time, and again if Redis lost its data, this also creates the consumer group and leaves the
        bundle's manifest for the api processes.
        """
        fresh = self._call("beat", self.consumer, self._clock(), WORKER_TTL_MS, dump_worker(info))
        if fresh:
            self._redis.hset("q:models", self.model, manifest_json)

    def leave(self) -> None:
        """Say that this worker ends in good order."""
        self._call("leave", self.consumer)

    def read(self, count: int, block_ms: int = 0) -> list[Lease]:
        """Lease up to `count` jobs from the dispatch window.

        Args:
            count: at least 1.
            block_ms: how long to wait for a first one; 0 does not wait, more than MAX_BLOCK_MS is shortened.
        """
        streams: dict[Any, Any] = {self._stream: ">"}
        block = min(block_ms, MAX_BLOCK_MS) or None
        try:
            reply: Any = self._redis.xreadgroup(GROUP, self.consumer, streams, count=count, block=block)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            self._create_group()
            return []
        return [_lease(entry) for _, entries in reply for entry in entries]

    def reclaim(self, count: int, lease_ms: int) -> list[Lease]:
        """Take over up to `count` leases that nobody extended for `lease_ms`, this worker's own included."""
        leases: list[Lease] = []
        cursor = "0-0"
        while len(leases) < count:
            try:
                reply: Any = self._redis.xautoclaim(
                    self._stream, GROUP, self.consumer, lease_ms, cursor, count=count - len(leases)
                )
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                self._create_group()
                break
            cursor = reply[0]
            leases += [_lease(entry) for entry in reply[1]]
            if cursor == "0-0":
                break
        return leases

    def look(self, leases: Sequence[Lease]) -> tuple[list[Job | None], int]:
        """The leased jobs, unstarted (None: no longer known), and how many wait in the whole class."""
        pipeline = self._redis.pipeline(transaction=False)
        for lease in leases:
            pipeline.hgetall(f"{self._prefix}:j:{lease.job_id}")
        for priority in Priority:
            pipeline.zcard(f"{self._prefix}:n:{priority}")
        replies: list[Any] = pipeline.execute()
        hashes, counts = replies[: len(leases)], replies[len(leases) :]
        jobs = [
            load_job(self.model, lease.job_id, fields) if fields else None
            for lease, fields in zip(leases, hashes, strict=True)
        ]
        return jobs, sum(counts)

    def start(self, leases: Sequence[Lease]) -> list[Started]:
        """Begin the next attempt of each leased job, in one round trip.

        A job past its deadline, cancelled, or already tried MAX_ATTEMPTS times is ended here instead.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for lease in leases:
            args = (self.consumer, lease.entry, lease.job_id, self._clock(), MAX_ATTEMPTS)
            self._scripts["start"](keys=[self._prefix], args=args, client=pipeline)
        return [self._started(lease, reply) for lease, reply in zip(leases, pipeline.execute(), strict=True)]

    def extend(self, progress: Mapping[Lease, int]) -> dict[Lease, Verdict]:
        """Keep leases for another lease time, and record how far (0..100) each job is."""
        if not progress:
            return {}
        args = [arg for lease, percent in progress.items() for arg in (lease.entry, lease.job_id, percent)]
        verdicts: Any = self._call("extend", self.consumer, *args)
        return {lease: Verdict(verdict) for lease, verdict in zip(progress, verdicts, strict=True)}

    def complete(self, job: Job, outputs: Sequence[OutputRef], timing: Mapping[str, float]) -> Settled:
        """Record the results of a started job; the first finisher wins, with or without the lease."""
        args = (self.consumer, job.attempt, job.id, self._clock(), dump_outputs(outputs), json.dumps(timing))
        return Settled(str(self._call("complete", *args)))

    def fail(
        self, job: Job, error: JobError, timing: Mapping[str, float], *, status: JobStatus = JobStatus.FAILED
    ) -> Settled:
        """End a started job without results. Without the lease it is STALE: the next attempt decides."""
        now_ms, err = self._clock(), dump_error(error)
        args = (self.consumer, job.attempt, job.id, now_ms, status, err, json.dumps(timing))
        return Settled(str(self._call("fail", *args)))

    def hand_back(self, leases: Sequence[Lease]) -> int:
        """Return leases that were not started to the front of the queue; how many went back."""
        if not leases:
            return 0
        args = [arg for lease in leases for arg in (lease.entry, lease.job_id)]
        return int(self._call("hand_back", self.consumer, *args))

    def _call(self, verb: str, *args: str | int | float) -> Any:
        return self._scripts[verb](keys=[self._prefix], args=args)

    def _create_group(self) -> None:
        """After data loss, or before the first worker ever. From entry 0: what is already enqueued counts."""
        try:
            self._redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # another worker was faster
                raise

    def _started(self, lease: Lease, reply: list[str]) -> Started:
        verdict, *rest = reply
        if verdict != "run":
            return Started(None, rest[0] if rest else verdict)
        return Started(load_job(self.model, lease.job_id, dict(zip(rest[::2], rest[1::2], strict=True))))


def class_prefix(model: str) -> str:
    """Prefix of every key of a class; the braces keep them in one cluster slot."""
    return f"q:{{{model}}}"


def _lease(entry: tuple[str, Mapping[str, str]]) -> Lease:
    return Lease(entry[0], entry[1]["id"])
