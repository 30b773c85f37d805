"""Census: everything Redis holds of every job, gathered from a live system without stopping it.

Two steps, because nothing can read millions of keys at one moment. `sightings` walks the keyspace and finds
where ids turn up; what it returns is older than the reply. `look` asks about single jobs, each of them at one
moment, so that what it says of a job is never half of a change.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from redis.exceptions import ResponseError

from server.job import JobStatus, OutputRef, Priority, model_tag
from server.queue.archive import Answer
from server.queue.clock import asked_each_time
from server.queue.connection import connect
from server.queue.keys import GROUP, MODELS_KEY, ROOT, class_prefix, stream_of, waiting_key
from server.queue.records import load_outputs
from server.queue.scripts import script

PAGE = 500
SEEN = ("status", "attempt", "created_ms", "deadline_ms", "fingerprint", "outputs", "error", "deleted_ms")
"""Fields of a record that `lua/look.lua` gives, in its order."""
"""Elements asked for at once: small enough that nobody notices the wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """One job as a class holds it at one moment.

    Attributes:
        status: None without a record; then all fields of the record are empty.
        deleted: its results were deleted on request.
        live: it is among the unfinished, which the sweep ends at their deadline.
        waiting: it is counted as waiting.
        in_flight: it is counted against its tenant's cap.
        listed: it waits in its tenant's list and the tenant gets its turn.
        reachable: its entry is in the dispatch window, and a worker will be given it or has it.
        strays: an entry that is not the one in its record names it.
    """

    id: str
    model: str
    status: JobStatus | None
    attempt: int
    created_ms: int
    deadline_ms: int
    fingerprint: str
    outputs: tuple[OutputRef, ...]
    error_code: str
    deleted: bool
    live: bool
    waiting: bool
    in_flight: bool
    listed: bool
    reachable: bool
    strays: bool

    @property
    def unfinished(self) -> bool:
        """True while the job waits or runs."""
        return self.status in (JobStatus.QUEUED, JobStatus.RUNNING)


@dataclass(frozen=True, slots=True)
class Mention:
    """Where an id was seen: the class, and which tenant's set, or entry of which lane, if it was there."""

    model: str
    tenant: str = ""
    entry: str = ""
    lane: str = ""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: its entry in the stream of its class, and the job it is about."""

    model: str
    entry: str
    job_id: str


@dataclass(slots=True)
class Sightings:
    """Where ids turned up.

    Attributes:
        classes: every class of which there is any trace.
        jobs: id -> where it was seen; an id without a record can be in more than one place.
        keys: names of idempotency keys, by class.
        letters: the dead letters.
    """

    classes: set[str] = field(default_factory=set)
    jobs: dict[str, set[Mention]] = field(default_factory=dict)
    keys: list[tuple[str, str]] = field(default_factory=list)
    letters: list[Letter] = field(default_factory=list)

    def add(self, job_id: str, mention: Mention) -> None:
        """Note one place."""
        self.jobs.setdefault(job_id, set()).add(mention)

    def only(self, subjects: Collection[str]) -> Sightings:
        """The part that is about some ids and keys."""
        return replace(
            self,
            jobs={job_id: seen for job_id, seen in self.jobs.items() if job_id in subjects},
            keys=[(model, key) for model, key in self.keys if key in subjects],
            letters=[letter for letter in self.letters if letter.job_id in subjects],
        )


class Census:
    """Reads one Redis. All methods raise `QueueError` where it cannot be reached."""

    def __init__(self, url: str) -> None:
        """Connects with the first question.

        Args:
            url: redis://, rediss:// or unix:// URL.
        """
        self._redis = connect(url)
        self._look = self._redis.register_script(script("look"))

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()

    def now_ms(self) -> int:
        """Unix ms by the clock of Redis."""
        return asked_each_time(self._redis)()

    def sightings(self) -> Sightings:
        """Every id in any key of the queue. What comes or goes meanwhile may or may not be in it."""
        seen = Sightings()
        models: Any = self._redis.hkeys(MODELS_KEY)
        seen.classes.update(models)
        in_flight: list[tuple[str, str]] = []
        lanes: list[tuple[str, str]] = []
        for name in self._redis.scan_iter(match=f"{ROOT}:{{*", count=PAGE):
            model, _, rest = name.removeprefix(f"{ROOT}:{{").partition("}:")
            kind, _, rest = rest.partition(":")
            seen.classes.add(model)
            if kind == "j":
                seen.add(rest, Mention(model))
            elif kind == "f":
                in_flight.append((model, rest))
            elif kind == "s":
                lanes.append((model, rest))
            elif kind == "i":
                seen.keys.append((model, name))
        for model, tenant in in_flight:
            for job_id in self._members(f"{class_prefix(model)}:f:{tenant}"):
                seen.add(job_id, Mention(model, tenant=tenant))
        for model, version in lanes:
            self._add_lane(seen, model, version)
        for model in seen.classes:
            self._add_class(seen, model)
        return seen

    def holders(self, keys: Sequence[tuple[str, str]]) -> dict[str, tuple[str, str]]:
        """Idempotency key -> id and fingerprint it holds; without those that are gone."""
        values: list[Any] = []
        for page in _pages(keys):
            pipeline = self._redis.pipeline(transaction=False)
            for _, name in page:
                pipeline.get(name)
            values += pipeline.execute()
        return {
            name: (value.split("|")[0], value.split("|")[1])
            for (_, name), value in zip(keys, values, strict=True)
            if value is not None
        }

    def kept(self, letters: Sequence[Letter]) -> list[Letter]:
        """Those of the dead letters that are still there."""
        found: list[Any] = []
        for page in _pages(letters):
            pipeline = self._redis.pipeline(transaction=False)
            for letter in page:
                pipeline.xrange(f"{class_prefix(letter.model)}:dead", letter.entry, letter.entry)
            found += pipeline.execute()
        return [letter for letter, entries in zip(letters, found, strict=True) if entries]

    def look(self, jobs: Mapping[str, Iterable[Mention]]) -> dict[str, list[Sight]]:
        """Each job, at one moment of its own, as each class holds it in which it was mentioned."""
        asked = [(job_id, mention) for job_id, mentions in jobs.items() for mention in mentions]
        sights: dict[str, list[Sight]] = {job_id: [] for job_id in jobs}
        for page in _pages(asked):
            pipeline = self._redis.pipeline(transaction=False)
            for job_id, mention in page:
                keys, args = (
                    [class_prefix(mention.model)],
                    [job_id, mention.tenant, mention.entry, mention.lane],
                )
                self._look(keys=keys, args=args, client=pipeline)
            for (job_id, mention), reply in zip(page, pipeline.execute(), strict=True):
                sights[job_id].append(_sight(job_id, mention.model, reply))
        return sights

    def _add_class(self, seen: Sightings, model: str) -> None:
        prefix = class_prefix(model)
        for name in (f"{prefix}:live", *(waiting_key(model, priority) for priority in Priority)):
            for job_id in self._members(name):
                seen.add(job_id, Mention(model))
        for entry, fields in self._entries(f"{prefix}:dead"):
            seen.letters.append(Letter(model, entry, fields["id"]))

    def _add_lane(self, seen: Sightings, model: str, version: str) -> None:
        stream = stream_of(model, version)
        named: set[str] = set()
        for entry, fields in self._entries(stream):
            named.add(entry)
            seen.add(fields["id"], Mention(model, entry=entry, lane=version))
        for entry in self._pending(stream):
            if entry not in named:  # XDEL without XACK: no id any more, only the lease
                seen.add("", Mention(model, entry=entry, lane=version))

    def _members(self, name: str) -> Iterator[str]:
        for member, _ in self._redis.zscan_iter(name, count=PAGE):
            yield member

    def _entries(self, name: str) -> Iterator[tuple[str, Mapping[str, str]]]:
        start = "-"
        while page := self._range(name, start):
            yield from page
            start = f"({page[-1][0]}"

    def _range(self, name: str, start: str) -> list[tuple[str, Mapping[str, str]]]:
        page: Any = self._redis.xrange(name, start, "+", count=PAGE)
        return list(page)

    def _pending(self, name: str) -> Iterator[str]:
        start = "-"
        while True:
            try:
                page: Any = self._redis.xpending_range(name, GROUP, start, "+", PAGE)
            except ResponseError as error:
                if not str(error).startswith("NOGROUP"):
                    raise
                return  # no worker has ever been here
            if not page:
                return
            yield from (item["message_id"] for item in page)
            start = f"({page[-1]['message_id']}"


def classes_of(job_id: str, models: Iterable[str]) -> list[str]:
    """The classes whose tag the id ends with: one, unless two names share their 16 bits."""
    return [model for model in models if model_tag(model) == job_id[-4:]]


def sight_of(answer: Answer) -> Sight:
    """A job that Redis does not know any more, as its answer has it."""
    fields = answer.fields
    return _sight(answer.id, answer.model, [*(fields.get(name) for name in SEEN), *(0,) * 6])


def _pages(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), PAGE):
        yield items[start : start + PAGE]


def _sight(job_id: str, model: str, reply: list[Any]) -> Sight:
    st, at, enq, dl, fp, res, err, deleted, *places = reply
    live, waiting, in_flight, listed, reachable, strays = map(bool, places)
    return Sight(
        id=job_id,
        model=model,
        status=JobStatus(st) if st else None,
        attempt=int(at or 0),
        created_ms=int(enq or 0),
        deadline_ms=int(dl or 0),
        fingerprint=fp or "",
        outputs=load_outputs(res or "[]"),
        error_code=json.loads(err)["code"] if err else "",
        deleted=bool(deleted),
        live=live,
        waiting=waiting,
        in_flight=in_flight,
        listed=listed,
        reachable=reachable,
        strays=strays,
    )
