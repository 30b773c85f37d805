"""Archive: final answers beside their results, once Redis no longer keeps them.

An answer is what a finished job's record said, as `<hour>/<job id>/job.json` in the store. It expires there
as results do, and counts from the moment at which it was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from server.job import Job, created_ms_of, result_folders
from server.queue.records import UnreadableJobError, load_job
from server.store import ResultStore

FILE = "job.json"
SCHEMA = 2
# Of a record: what only an unfinished job needs, and where its key for repetition lay.
LEFT_OUT = frozenset(
    {"entry", "cancel", "reply_to", "finisher", "ttl_ms", "idempotency_key", "wait_us", "own_us"}
)
NAMES_OF_SCHEMA_1 = {
    "st": "status", "kd": "kind", "tn": "tenant", "pr": "priority", "req": "request", "fp": "fingerprint",
    "at": "attempt", "own": "worker", "enq": "created_ms", "beg": "started_ms", "end": "finished_ms",
    "dl": "deadline_ms", "del": "deleted_ms", "pg": "progress", "res": "outputs", "err": "error",
    "tm": "timing", "wn": "warnings", "vs": "version", "cost": "cost_us", "tp": "traceparent",
}  # fmt: skip
"""What a record's fields were called then; such answers still lie in stores."""


class ArchiveError(OSError):
    """The store does not say whether it has the answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The record of a finished job: the fields of its hash (server/README.md, "Keys")."""

    model: str
    id: str
    fields: Mapping[str, str]

    @property
    def job(self) -> Job:
        """What it says.

        Raises:
            UnreadableJobError: another version wrote it.
        """
        return load_job(self.model, self.id, self.fields)


class Archive:
    """Answers in one store. Blocking; safe to use from many threads."""

    def __init__(self, store: ResultStore) -> None:
        self._store = store

    def write(self, answers: Sequence[Answer]) -> None:
        """Store answers; those that are there already are replaced. On return they survive power loss.

        Raises:
            OSError: not all of them are stored.
        """
        files = {archive_key(answer.id): _dump(answer) for answer in answers}
        self._store.put_all(files, "application/json")

    def read(self, job_id: str) -> Answer | None:
        """The answer of a job; None if it is not here (any longer).

        Raises:
            ArchiveError: the store does not answer.
            UnreadableJobError: another version wrote it.
        """
        if created_ms_of(job_id) is None:
            return None
        try:
            return _load(job_id, self._store.get(archive_key(job_id)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ArchiveError(f"answer of job {job_id}: {error}") from error


def archive_key(job_id: str) -> str:
    """Where in the store the answer of a job lies."""
    return f"{result_folders(job_id)[0]}/{FILE}"


def _dump(answer: Answer) -> bytes:
    kept = {name: value for name, value in answer.fields.items() if name not in LEFT_OUT}
    content = {"schema": SCHEMA, "id": answer.id, "model": answer.model, "record": kept}
    return json.dumps(content, ensure_ascii=False).encode()


def _load(job_id: str, data: bytes) -> Answer:
    try:
        content = json.loads(data)
        record = dict(content["record"])
        if content["schema"] == 1:
            record = {NAMES_OF_SCHEMA_1.get(name, name): value for name, value in record.items()}
        elif content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r}, {SCHEMA} expected")
        return Answer(str(content["model"]), job_id, record)
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableJobError(f"answer of job {job_id} in the store: {error!r}") from error
