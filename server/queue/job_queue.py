"""JobQueue: the api process's side of the queue (enqueue, look up, wait, cancel, count)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.exceptions import OutOfMemoryError, RedisError

from server.job import TERMINAL, Job, model_tag
from server.queue.archive import Answer, Archive, ArchiveError
from server.queue.calls import Calls
from server.queue.clock import RedisClock
from server.queue.connection import connect_async
from server.queue.keys import MODELS_KEY, class_prefix, job_key, turn_key, waiting_key
from server.queue.ops import Observe, observe_nothing
from server.queue.records import (
    EnqueueResult,
    EnqueueStatus,
    Outlook,
    QueueStats,
    RedisHealth,
    UnreadableJobError,
    dump_cost,
    dump_outlook,
    dump_request,
    load_job,
)
from server.queue.replies import Replies
from server.queue.stats import HEALTH_SECTIONS, ask_stats, load_health, load_stats

log = logging.getLogger(__name__)

MAX_KEY_CHARS = 255
IDEMPOTENCY_TTL_MS = 24 * 3600 * 1000
SWEEP_S = 5.0
# After its deadline a running job's worker has this long to say so, or to complete, before the sweep ends it.
DEADLINE_GRACE_MS = 30_000


class JobQueue:
    """All queue classes of one Redis, as one api process sees them. One instance per event loop.

    All verbs raise `redis.exceptions.RedisError` (ConnectionError, TimeoutError, ...) where Redis cannot be
    reached, or hangs for about two seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        max_waiting: int = 256,
        max_live_per_tenant: int | None = None,
        result_ttl_s: int = 86_400,
        archive: Archive | None = None,
        on_deadline: Callable[[Job], None] = lambda _: None,
        clock: Callable[[], int] | None = None,
        observe: Observe = observe_nothing,
    ) -> None:
        """Connects with the first verb.

        Args:
            url: redis://, rediss:// or unix:// URL of Redis 7.0+ or Valkey 8+.
            max_waiting: queued jobs a class may hold; one more is QUEUE_FULL.
            max_live_per_tenant: queued and running jobs a tenant may have in a class; None: no limit.
            result_ttl_s: how long the record of a finished job is kept.
            archive: where to look for jobs that Redis does not know; None: nowhere.
            on_deadline: called with each job that this process's sweep has ended.
            clock: unix ms; None: as Redis counts them.
            observe: told how long Redis took for each operation of `API_OPS`.
        """
        self._redis = connect_async(url)
        self._calls = Calls(self._redis, observe)
        self._max_waiting = max_waiting
        self._max_live_per_tenant = max_live_per_tenant or 0
        self._result_ttl_ms = result_ttl_s * 1000
        self._archive = archive
        self._on_deadline = on_deadline
        self.clock: Callable[[], int] = clock or RedisClock()
        self._replies = Replies(self._redis)
        self._known: set[str] = set()
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the sweep; the reader of a class's replies starts with the first wait for one of its jobs."""
        with suppress(RedisError):  # the sweep tries again
            await self._compare_clocks()
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="queue sweep")

    async def close(self) -> None:
        """Stop the background tasks, cancel whoever still waits, and disconnect."""
        while self._sweeper and not self._sweeper.done():
            self._sweeper.cancel()
            # Again and again: before Python 3.12 asyncio.wait_for, inside redis-py, can swallow a cancel.
            await asyncio.wait([self._sweeper], timeout=0.1)
        await self._replies.close()
        await self._calls.close()
        await self._redis.aclose()

    async def ping(self) -> None:
        """Return if Redis answers, else raise its error."""
        await self._calls.unless_silent("ping", self._redis.execute_command("PING"))

    async def enqueue(
        self,
        job: Job,
        *,
        idempotency_key: str | None = None,
        admit: bool = True,
        outlook: Outlook | None = None,
    ) -> EnqueueResult:
        """Accept `job` or say why not, atomically.

        Args:
            job: queued, from `new_job`. The same job again is OK and changes nothing.
            idempotency_key: scoped to the job's tenant, kept for 24 h and no longer than its job. Again with
                the same class and fingerprint it gives DUP and the job it already has, else MISMATCH.
            admit: False only looks for the job that has the key; a new one is refused as QUEUE_FULL.
            outlook: when it will be finished; None where no worker lives that would say so.
        Raises:
            ValueError: request larger than 64 KiB, or key longer than 255 characters.
        """
        if idempotency_key is not None and not 0 < len(idempotency_key) <= MAX_KEY_CHARS:
            raise ValueError(
                f"idempotency key of {len(idempotency_key)} characters: 1 to {MAX_KEY_CHARS} allowed"
            )
        max_waiting = self._max_waiting if admit else 0
        request, times = dump_request(job.request), (job.created_ms, job.deadline_ms, self._result_ttl_ms)
        args = (
            *(job.id, job.tenant, job.priority, job.kind, request, job.fingerprint, *times),
            *(job.traceparent or "", self._replies.address, dump_cost(job.cost_ms)),
            *(_digest(idempotency_key), IDEMPOTENCY_TTL_MS, max_waiting, self._max_live_per_tenant),
            *dump_outlook(outlook),
        )
        accepted = False
        self._replies.expect(job)  # before the call: the answer may overtake its reply
        try:
            await self._know(job.model)
            status, job_id, position, ahead_us = await self._call("enqueue", job.model, *args)
            accepted = status == EnqueueStatus.OK
        except OutOfMemoryError:
            return EnqueueResult(status=EnqueueStatus.MEMORY)
        finally:
            if not accepted:
                self._replies.expect_no_more(job.id)
        return EnqueueResult(
            status=EnqueueStatus(status),
            job_id=job_id or None,
            position=int(position),
            ahead_ms=int(ahead_us) / 1000,
        )

    async def get(self, job_id: str) -> Job | None:
        """The job, or None where no such id is (any longer) known.

        Raises:
            UnreadableJobError: another version of the server wrote its record.
            ArchiveError: Redis does not know it, and the archive does not answer.
        """
        for model in await self._models_of(job_id):
            fields: Any = await self._calls.command("HGETALL", job_key(model, job_id))
            if fields:
                return load_job(model, job_id, fields)
        answer = await self._archived(job_id)
        return answer.job if answer else None

    async def _archived(self, job_id: str) -> Answer | None:
        return await asyncio.to_thread(self._archive.read, job_id) if self._archive else None

    async def _get_readable(self, job_id: str) -> Job | None:
        """The job, or None where it is unknown or cannot be read."""
        try:
            return await self.get(job_id)
        except (UnreadableJobError, ArchiveError) as error:
            log.warning("%s", error)
            return None

    async def position(self, job: Job) -> int | None:
        """Jobs of its priority that were waiting before it and still are; None once it runs or has ended."""
        rank: Any = await self._calls.command("ZRANK", waiting_key(job.model, job.priority), job.id)
        return None if rank is None else int(rank)

    async def cancel(self, job_id: str) -> Job | None:
        """Cancel at once while queued, at the next step boundary while running. Returns the job as it is."""
        for model in await self._models_of(job_id):
            await self._call("cancel", model, job_id, self.clock())
        return await self.get(job_id)

    async def delete(self, job_id: str) -> Job | None:
        """Cancel an unfinished job; of a finished one the results count as gone. Either is no longer listed.

        Returns:
            The job as it is; its objects in the store are the caller's to delete.
        """
        models = await self._models_of(job_id)
        found = [await self._call("delete", model, job_id, self.clock()) for model in models]
        if not any(found):
            await self._delete_archived(job_id)
        return await self.get(job_id)

    async def _delete_archived(self, job_id: str) -> None:
        answer = await self._archived(job_id)
        if answer is None or self._archive is None:
            return
        catalog = f"{class_prefix(answer.model)}:l:{answer.fields['tenant']}"
        await self._calls.command("ZREM", catalog, job_id)
        if "deleted_ms" not in answer.fields:
            deleted = Answer(answer.model, job_id, {**answer.fields, "deleted_ms": str(self.clock())})
            await asyncio.to_thread(self._archive.write, [deleted])

    async def listing(
        self, models: Iterable[str], *, tenant: str, after: str | None, limit: int, newest_first: bool
    ) -> tuple[list[Job], bool]:
        """A tenant's video jobs, by age.

        Args:
            models: the classes to look into.
            tenant: whose.
            after: the last id of the page before; None begins.
            limit: at most this many, at least 1.
            newest_first: or oldest first.

        Returns:
            The jobs, and whether more come after the last of them.
        """
        models = list(models)
        found: list[Job] = []
        while len(found) <= limit:
            ids = sorted(
                [
                    job_id
                    for model in models
                    for job_id in await self._listed(model, tenant, after, limit + 1, newest_first)
                ],
                reverse=newest_first,
            )[: limit + 1]
            if not ids:
                break
            after = ids[-1]
            jobs = await asyncio.gather(*map(self._get_readable, ids))  # None: expired since it was listed
            found += [job for job in jobs if job is not None]
        return found[:limit], len(found) > limit

    async def _listed(
        self, model: str, tenant: str, after: str | None, limit: int, newest_first: bool
    ) -> list[str]:
        name, start = f"{class_prefix(model)}:l:{tenant}", f"({after}" if after else ""
        command, bounds = (
            ("ZREVRANGEBYLEX", (start or "+", "-")) if newest_first else ("ZRANGEBYLEX", (start or "-", "+"))
        )
        ids: Any = await self._calls.command(command, name, *bounds, "LIMIT", 0, limit)
        return list(ids)

    async def wait(self, job_id: str, timeout_s: float) -> Job | None:
        """The job once it is finished, or as it stands after `timeout_s`; None for an unknown id."""
        await self._replies.wait(job_id, timeout_s, lambda: self._watch(job_id))
        return await self.get(job_id)

    async def stats(self, model: str) -> QueueStats:
        """Counts of one class and its live workers."""
        now_ms = self.clock()
        pipeline = self._redis.pipeline(transaction=False)
        ask_stats(pipeline, model, now_ms)
        return load_stats(await self._calls.unless_silent("stats", pipeline.execute()), now_ms)

    async def memory_use(self) -> float:
        """Share of Redis's memory limit that is used; 0 where there is no limit.

        From 0.8 on no job is accepted before finished ones were forgotten.
        """
        return (await self.health()).memory_use

    async def health(self) -> RedisHealth:
        """Redis's memory, its append-only file and its load."""
        return load_health(await self._calls.unless_silent("info", self._redis.info(*HEALTH_SECTIONS)))

    async def takes_turn(self, task: str, period_ms: int) -> bool:
        """True for one api process in every `period_ms`: that one does the task."""
        taken = await self._calls.command("SET", turn_key(task), self._replies.address, "NX", "PX", period_ms)
        return taken is not None

    async def answers(self, model: str, *, ended_before_ms: int, limit: int) -> list[Answer]:
        """Records of jobs of one class that ended before a moment (unix ms), the oldest first."""
        horizon = ended_before_ms + self._result_ttl_ms  # the set is ordered by when records expire
        ids: Any = await self._calls.command(
            "ZRANGEBYSCORE", f"{class_prefix(model)}:ended", "-inf", horizon, "LIMIT", 0, limit
        )
        pipeline = self._redis.pipeline(transaction=False)
        for job_id in ids:
            pipeline.hgetall(job_key(model, job_id))
        records: list[Any] = await self._calls.unless_silent("answers", pipeline.execute())
        return [Answer(model, job_id, fields) for job_id, fields in zip(ids, records, strict=True) if fields]

    async def forget(self, answers: Sequence[Answer], *, kept_ms: int) -> int:
        """Take jobs of one class out of Redis whose answers are in the archive.

        Args:
            answers: as they were read; what has changed since stays.
            kept_ms: how long they will be found there, from now on.

        Returns:
            How many are out.
        """
        if not answers:
            return 0
        args: list[str | int] = []
        for answer in answers:
            # A record that nobody can read must not keep the others here.
            created_ms = answer.fields.get("created_ms", "")
            known_until_ms = (int(created_ms) if created_ms.isdecimal() else 0) + IDEMPOTENCY_TTL_MS
            seen = (answer.fields.get("finished_ms", ""), answer.fields.get("deleted_ms", ""))
            args += [answer.id, *seen, min(kept_ms, known_until_ms - self.clock())]
        return int(await self._call("forget", answers[0].model, *args))

    async def models(self) -> dict[str, Mapping[str, Any]]:
        """Every model a worker has ever announced here: name -> its bundle's manifest.json, as a dict.

        A model stays known while no worker serves it, so its jobs can wait.
        """
        manifests: Any = await self._calls.command("HGETALL", MODELS_KEY)
        self._known |= manifests.keys()
        return {name: json.loads(text) for name, text in manifests.items() if text}

    async def manifests(self, model: str, versions: Iterable[str]) -> list[Mapping[str, Any]]:
        """Of these versions, as far as their workers announced them; what a route calls base comes first."""
        prefix, versions = class_prefix(model), list(versions)
        pipeline = self._redis.pipeline(transaction=False)
        pipeline.hget(f"{prefix}:route", "base")
        pipeline.hmget(f"{prefix}:m", versions)
        base, texts = await self._calls.unless_silent("manifests", pipeline.execute())
        found: list[Mapping[str, Any]] = [json.loads(text) for text in texts if text]
        return sorted(found, key=lambda manifest: manifest.get("version") != base)

    async def _know(self, model: str) -> None:
        """Note a class where every api process finds it when it sees one of its job ids."""
        if model not in self._known:
            await self._calls.command("HSETNX", MODELS_KEY, model, "")
            self._known.add(model)

    async def _models_of(self, job_id: str) -> list[str]:
        """The classes whose tag the id ends with: one, unless two names share their 16 bits."""
        tag = job_id[-4:]
        found = [model for model in self._known if model_tag(model) == tag]
        if not found:
            await self.models()
            found = [model for model in self._known if model_tag(model) == tag]
        return found

    async def _watch(self, job_id: str) -> bool:
        """Have this process told when the job ends; False if there is nothing to wait for."""
        for model in await self._models_of(job_id):
            self._replies.listen(model)
            status = await self._call("watch", model, job_id, self._replies.address)
            if status is not None:
                return status not in TERMINAL
        return False

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except RedisError as error:
                log.warning("queue sweep: %s", error)

    async def sweep(self) -> None:
        """End jobs past their deadline, wake waiters of ended jobs whose reply got lost; every SWEEP_S."""
        await self._compare_clocks()
        await self.models()
        for model in list(self._known):
            # Again, should Redis have lost its data; a full one must not keep late jobs from ending.
            with suppress(OutOfMemoryError):
                await self._calls.command("HSETNX", MODELS_KEY, model, "")
            for job_id in await self._call("expire", model, self.clock(), DEADLINE_GRACE_MS, 1000):
                if job := await self._get_readable(job_id):
                    self._on_deadline(job)
        waited_for = self._replies.waited_for
        jobs = await asyncio.gather(*map(self._get_readable, waited_for))
        for job_id, job in zip(waited_for, jobs, strict=True):
            if job is None or job.finished:
                self._replies.wake(job_id)
        self._replies.drop_overdue(self.clock() - 2 * DEADLINE_GRACE_MS)

    async def _compare_clocks(self) -> None:
        if isinstance(self.clock, RedisClock):
            await self.clock.compare_async(lambda: self._calls.command("TIME"))

    async def _call(self, verb: str, model: str, *args: str | int) -> Any:
        return await self._calls.verb(verb, class_prefix(model), *args)


def _digest(idempotency_key: str | None) -> str:
    return hashlib.sha256(idempotency_key.encode()).hexdigest() if idempotency_key is not None else ""
