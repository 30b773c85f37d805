"""DeadLetters: what is kept of jobs that killed every worker that started them, for an operator to judge.

The failed job itself is final, as every job's answer is. So a retry is a new job with the same request, and
the letter goes in the same transition that accepts it: of two retries at once one makes a job, one nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from server.job import ID_PREFIX, Job, JobError, JobKind, Priority, new_job
from server.queue.clock import asked_each_time
from server.queue.connection import connect
from server.queue.keys import MODELS_KEY, class_prefix
from server.queue.records import dump_cost, dump_request, load_request
from server.queue.scripts import script

PAGE = 500


class Retried(StrEnum):
    """Outcome of `DeadLetters.retry`. GONE: it was retried or dropped before. MEMORY: Redis is full."""

    OK = "ok"
    GONE = "gone"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """One job that was given up.

    Attributes:
        job_id: the failed job.
        entry: where the letter lies in the stream of its class.
        attempts: workers that died with it.
        ended_ms: when it was given up, unix ms.
        worker: consumer name of the last worker that started it.
        request: as it is stored: a letter is kept of what nobody could read, too.
        cost_ms: as of `Job`.
    """

    job_id: str
    model: str
    entry: str
    tenant: str
    priority: Priority
    attempts: int
    error: JobError
    ended_ms: int
    worker: str
    request: str
    cost_ms: float

    @property
    def kind(self) -> JobKind:
        """What was asked for, read off the id."""
        return next(kind for kind, prefix in ID_PREFIX.items() if self.job_id.startswith(f"{prefix}_"))


class DeadLetters:
    """The letters of all classes of one Redis. All methods raise `QueueError` where it cannot be reached."""

    def __init__(self, url: str, *, clock: Callable[[], int] | None = None) -> None:
        """Connects with the first call.

        Args:
            url: of Redis 7.0+ or Valkey 8+.
            clock: unix ms; None: Redis is asked each time.
        """
        self._redis = connect(url)
        self._clock = clock or asked_each_time(self._redis)
        self._retry = self._redis.register_script(script("retry"))
        self._drop = self._redis.register_script(script("drop"))

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()

    def all(self) -> list[DeadLetter]:
        """Every letter, oldest first."""
        models: Any = self._redis.hkeys(MODELS_KEY)
        return sorted(
            (letter for model in models for letter in self._of(model)),
            key=lambda letter: letter.ended_ms,
        )

    def find(self, job_id: str) -> DeadLetter | None:
        """The letter of one job."""
        return next((letter for letter in self.all() if letter.job_id == job_id), None)

    def retry(self, letter: DeadLetter, *, deadline_s: float, result_ttl_s: int) -> tuple[Retried, Job]:
        """Accept the same request as a new job, and take the letter away; all or nothing.

        The new job has the tenant and the priority of the old one; caps do not hold it up. The old one stays
        failed. An idempotency key leads to the old one still.

        Args:
            letter: from `all` or `find`.
            deadline_s: of the new job, from now.
            result_ttl_s: how long the record of the new job is kept once it is finished.
        Returns:
            What happened, and the job that exists if that is OK.
        Raises:
            UnreadableJobError: of a request that no worker could read either.
        """
        now_ms = self._clock()
        job = new_job(
            kind=letter.kind,
            model=letter.model,
            request=load_request(letter.request),
            now_ms=now_ms,
            deadline_ms=now_ms + round(deadline_s * 1000),
            priority=letter.priority,
            tenant=letter.tenant,
            cost_ms=letter.cost_ms,
        )
        about = (job.id, job.tenant, job.priority, job.kind, dump_request(job.request), job.fingerprint)
        args = (
            letter.entry,
            *about,
            job.created_ms,
            job.deadline_ms,
            result_ttl_s * 1000,
            "",
            "",
            dump_cost(job.cost_ms),
        )
        return Retried(str(self._retry(keys=[class_prefix(job.model)], args=args))), job

    def drop(self, letter: DeadLetter) -> bool:
        """Forget a letter; False if it was gone. The job stays failed."""
        return bool(self._drop(keys=[class_prefix(letter.model)], args=[letter.entry]))

    def _of(self, model: str) -> Iterator[DeadLetter]:
        start = "-"
        while True:
            page: Any = self._redis.xrange(f"{class_prefix(model)}:dead", start, "+", count=PAGE)
            if not page:
                return
            yield from (_letter(model, entry, fields) for entry, fields in page)
            start = f"({page[-1][0]}"


def _letter(model: str, entry: str, fields: Mapping[str, str]) -> DeadLetter:
    return DeadLetter(
        job_id=fields["id"],
        model=model,
        entry=entry,
        tenant=fields["tenant"],
        priority=Priority(fields["priority"]),
        attempts=int(fields["attempt"]),
        error=JobError(**json.loads(fields["error"])),
        ended_ms=int(fields["finished_ms"]),
        worker=fields["worker"],
        request=fields["request"],
        cost_ms=int(fields.get("cost_us", 0)) / 1000,
    )
