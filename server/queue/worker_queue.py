"""WorkerQueue: the worker's side of the queue (lease, start, extend, finish, hand back)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from redis.exceptions import NoScriptError, OutOfMemoryError, ResponseError

from server.job import Job, JobError, JobStatus, OutputRef, Priority
from server.queue.clock import RedisClock
from server.queue.connection import SOCKET_TIMEOUT_S, connect
from server.queue.keys import GROUP, MODELS_KEY, class_prefix, job_key, stream_of, waiting_key
from server.queue.ops import Observe, observe_nothing, timed
from server.queue.records import (
    NO_PACE,
    Pace,
    UnreadableJobError,
    WorkerInfo,
    dump_error,
    dump_outputs,
    dump_pace,
    dump_worker,
    load_job,
)
from server.queue.scripts import script, script_sha

log = logging.getLogger(__name__)

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
    """What became of a result or a failure.

    STALE: another stands and ours is to be discarded. CANCELLED: so is ours, for the job was deleted.
    """

    OK = "ok"
    STALE = "stale"
    UNKNOWN = "unknown"
    CANCELLED = "cancelled"


class Dropped(StrEnum):
    """Why a leased job was not started.

    LOST: another worker has it. UNKNOWN: there is no such job, or this is not its entry. DEADLINE, POISON:
    ended by this very start; CANCELLED: by it, or before. DONE, FAILED: it was over.
    """

    LOST = "lost"
    UNKNOWN = "unknown"
    DEADLINE = "deadline"
    POISON = "poison"
    CANCELLED = "cancelled"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Started:
    """The job as it now runs; or None, and why not."""

    job: Job | None
    dropped: Dropped | None = None


class WorkerQueue:
    """One queue class as one worker process sees it.

    Every verb may be called from any thread, and again after a connection error: repeating one whose reply
    was lost has no second effect. All raise `redis.exceptions.RedisError` where Redis cannot be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        version: str,
        consumer: str,
        clock: Callable[[], int] | None = None,
        observe: Observe = observe_nothing,
    ) -> None:
        """Connects with the first verb.

        Args:
            url: redis://, rediss:// or unix:// URL of Redis 7.0+ or Valkey 8+.
            model: the class to serve.
            version: of the bundle that is served; its lane is what this worker reads.
            consumer: unique per process life and never used again; the lease is its.
            clock: unix ms; None: as Redis counts them, compared with each beat.
            observe: told how long Redis took for each operation of `WORKER_OPS`.
        """
        self.model = model
        self.version = version
        self.consumer = consumer
        self.clock: Callable[[], int] = clock or RedisClock()
        self._redis = connect(url)
        self._observe = observe
        self._prefix = class_prefix(model)
        self._stream = stream_of(model, version)
        self._announcement: tuple[WorkerInfo, str, Pace] | None = None
        self._announce = False

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()

    def beat(self, info: WorkerInfo, manifest_json: str, pace: Pace = NO_PACE) -> None:
        """Announce this worker, or say that it still lives; due every few seconds.

        The first time, and again if Redis lost its data, this also creates the consumer group and leaves the
        bundle's manifest for the api processes.

        Args:
            info: the worker.
            manifest_json: its bundle's manifest.
            pace: how fast it is.
        """
        self._announcement = info, manifest_json, pace
        if isinstance(self.clock, RedisClock):
            with timed(self._observe, "time"):
                self.clock.compare(self._redis.time)
        fresh = self._call(
            "beat", *self._who, self.clock(), WORKER_TTL_MS, dump_worker(info), dump_pace(pace)
        )
        self._announce = self._announce or bool(fresh)
        if self._announce:
            # A full Redis still serves; this comes with a later beat.
            with suppress(OutOfMemoryError), timed(self._observe, "announce"):
                self._redis.hset(f"{self._prefix}:m", self.version, manifest_json)
                self._redis.hset(MODELS_KEY, self.model, manifest_json)
                self._announce = False

    def leave(self) -> None:
        """Say that this worker ends in good order."""
        self._call("leave", *self._who, self.clock())

    def read(self, count: int, block_ms: int = 0) -> list[Lease]:
        """Lease up to `count` jobs from the dispatch window.

        Args:
            count: at least 1.
            block_ms: how long to wait for a first one; 0 does not wait, more than MAX_BLOCK_MS is shortened.
        """
        streams: dict[Any, Any] = {self._stream: ">"}
        block = min(block_ms, MAX_BLOCK_MS) or None
        observe = self._observe if block is None else observe_nothing  # or it would tell how idle we are
        try:
            with timed(observe, "xreadgroup"):
                reply: Any = self._redis.xreadgroup(GROUP, self.consumer, streams, count=count, block=block)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
            self._rejoin()
            return []
        return [_lease(entry) for _, entries in reply for entry in entries]

    def reclaim(self, count: int, lease_ms: int) -> list[Lease]:
        """Take over up to `count` leases that nobody extended for `lease_ms`, this worker's own included.

        Those on jobs of a version that has no live worker any more go back to the queue.
        """
        self._call("adopt", lease_ms)
        leases: list[Lease] = []
        cursor = "0-0"
        while len(leases) < count:
            try:
                with timed(self._observe, "xautoclaim"):
                    reply: Any = self._redis.xautoclaim(
                        self._stream, GROUP, self.consumer, lease_ms, cursor, count=count - len(leases)
                    )
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                self._rejoin()
                break
            cursor = reply[0]
            leases += [_lease(entry) for entry in reply[1]]
            if cursor == "0-0":
                break
        return leases

    def look(self, leases: Sequence[Lease]) -> tuple[list[Job | UnreadableJobError | None], int]:
        """The leased jobs, unstarted (None: no longer known), and how many wait in the whole class."""
        pipeline = self._redis.pipeline(transaction=False)
        for lease in leases:
            pipeline.hgetall(job_key(self.model, lease.job_id))
        for priority in Priority:
            pipeline.zcard(waiting_key(self.model, priority))
        with timed(self._observe, "look"):
            replies: list[Any] = pipeline.execute()
        hashes, counts = replies[: len(leases)], replies[len(leases) :]
        jobs = [self._read(lease, fields) for lease, fields in zip(leases, hashes, strict=True)]
        return jobs, sum(counts)

    def refuse(self, lease: Lease, error: JobError) -> None:
        """End a leased job that cannot be worked on, without reading more of its record than must be."""
        try:
            (reply,) = self._begin([lease], self.clock())
            if reply[0] != "run":
                return  # it is ended, gone, or somebody else's
            now_ms, err = self.clock(), dump_error(error)
            self._call("fail", *self._who, reply[1], lease.job_id, now_ms, JobStatus.FAILED, err, "{}")
        except ResponseError as broken:  # the script itself cannot make sense of it
            log.error("job %s cannot be ended: %s", lease.job_id, broken)  # noqa: TRY400

    def start(self, leases: Sequence[Lease], seen: Mapping[str, Job] = MappingProxyType({})) -> list[Started]:
        """Begin the next attempt of each leased job, in one script.

        A job past its deadline, cancelled, or already tried MAX_ATTEMPTS times is ended here instead.

        Args:
            leases: of jobs.
            seen: some of these jobs by id, as `look` returned them. The others are read now.
        """
        if not leases:
            return []
        replies = self._begin(leases, self.clock())
        unseen = [
            lease
            for lease, reply in zip(leases, replies, strict=True)
            if reply[0] == "run" and lease.job_id not in seen
        ]
        if unseen:
            jobs, _ = self.look(unseen)
            seen = {**seen, **{job.id: job for job in jobs if isinstance(job, Job)}}
        return [
            self._started(seen.get(lease.job_id), *reply)
            for lease, reply in zip(leases, replies, strict=True)
        ]

    def _begin(self, leases: Sequence[Lease], now_ms: int) -> list[list[str]]:
        args = [arg for lease in leases for arg in (lease.entry, lease.job_id)]
        replies: list[list[str]] = self._call("start", *self._who, now_ms, MAX_ATTEMPTS, *args)
        return replies

    def extend(self, progress: Mapping[Lease, int]) -> dict[Lease, Verdict]:
        """Keep leases for another lease time, and record how far (0..100) each job is."""
        if not progress:
            return {}
        args = [arg for lease, percent in progress.items() for arg in (lease.entry, lease.job_id, percent)]
        verdicts: Any = self._call("extend", *self._who, *args)
        return {lease: Verdict(verdict) for lease, verdict in zip(progress, verdicts, strict=True)}

    def complete(
        self,
        job: Job,
        outputs: Sequence[OutputRef],
        timing: Mapping[str, float],
        warnings: Sequence[str] = (),
    ) -> Settled:
        """Record the results of a started job; the first finisher wins, with or without the lease.

        Args:
            job: as `start` returned it.
            outputs: its objects in the store.
            timing: as `Job.timing`.
            warnings: as `Job.warnings`.
        """
        return self.complete_all([(job, outputs, timing, warnings)])[0]

    def complete_all(
        self, results: Sequence[tuple[Job, Sequence[OutputRef], Mapping[str, float], Sequence[str]]]
    ) -> list[Settled]:
        """`complete` for each of several jobs, in one round trip."""
        if not results:
            return []
        args = [
            arg
            for job, outputs, timing, warnings in results
            for arg in (
                job.attempt,
                job.id,
                dump_outputs(outputs),
                json.dumps(timing),
                json.dumps(warnings) if warnings else "",
            )
        ]
        replies = self._call("complete", *self._who, self.clock(), *args)
        return [Settled(str(reply)) for reply in replies]

    def fail(
        self, job: Job, error: JobError, timing: Mapping[str, float], *, status: JobStatus = JobStatus.FAILED
    ) -> Settled:
        """End a started job without results. Without the lease it is STALE: the next attempt decides."""
        now_ms, err = self.clock(), dump_error(error)
        args = (*self._who, job.attempt, job.id, now_ms, status, err, json.dumps(timing))
        return Settled(str(self._call("fail", *args)))

    def hand_back(self, leases: Sequence[Lease]) -> int:
        """Return leases that were not started to the front of the queue; how many went back."""
        if not leases:
            return 0
        args = [arg for lease in leases for arg in (lease.entry, lease.job_id)]
        return int(self._call("hand_back", *self._who, *args))

    @property
    def _who(self) -> tuple[str, str]:
        return self.version, self.consumer

    def _call(self, verb: str, *args: str | int | float) -> Any:
        with timed(self._observe, verb):
            try:
                return self._redis.evalsha(script_sha(verb), 1, self._prefix, *map(str, args))
            except NoScriptError:  # a server that was restarted, or never saw it
                self._redis.script_load(script(verb))
                return self._redis.evalsha(script_sha(verb), 1, self._prefix, *map(str, args))

    def _rejoin(self) -> None:
        """Announce this worker again: Redis lost its data, or took the worker for dead and the lane away."""
        if self._announcement is not None:
            self.beat(*self._announcement)

    def _read(self, lease: Lease, fields: Mapping[str, str]) -> Job | UnreadableJobError | None:
        try:
            return load_job(self.model, lease.job_id, fields) if fields else None
        except UnreadableJobError as error:
            return error

    def _started(self, job: Job | None, verdict: str, *rest: str) -> Started:
        """What became of a job, from the script's reply and its record of before or after."""
        if verdict != "run":
            return Started(None, Dropped(rest[0] if rest else verdict))
        if job is None:  # deleted by hand a moment ago
            return Started(None, Dropped.UNKNOWN)
        attempt, started_ms = rest
        begun = replace(
            job,
            status=JobStatus.RUNNING,
            attempt=int(attempt),
            started_ms=int(started_ms),
            progress=0,
            worker=self.consumer,
            version=self.version,
        )
        return Started(begun)


def _lease(entry: tuple[str, Mapping[str, str]]) -> Lease:
    return Lease(entry[0], entry[1]["id"])
