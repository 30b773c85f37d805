"""Audit: are the jobs that were accepted, their records and the stored objects one and the same?

Runs beside a live system. Whatever looks wrong is looked at a second time after a moment, and only what is
still wrong then is reported: a job that moves while it is being read is no mismatch.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from server.job import JobStatus, created_ms_of, result_folders
from server.queue.archive import Archive, archive_key
from server.queue.census import Census, Letter, Mention, Sight, Sightings, classes_of, sight_of
from server.queue.job_queue import DEADLINE_GRACE_MS, SWEEP_S
from server.queue.records import UnreadableJobError
from server.queue.worker_queue import MAX_ATTEMPTS
from server.store import ResultStore, Stored

# A sweep that is due may be under way, and clocks differ a little.
OVERDUE_MS = DEADLINE_GRACE_MS + int(SWEEP_S * 1000) + 5_000
SECOND_LOOK_S = 1.0
# What is suspicious in more folders than this is found in one listing of the whole store.
MAX_FOLDERS = 200

Objects = Mapping[str, Mapping[str, Stored]]
"""Job id -> store key -> what lies there."""


class Code(StrEnum):
    """What can be wrong; stable names for programs, explained in server/README.md."""

    MALFORMED = "malformed"
    LOST = "lost"
    OVERDUE = "overdue"
    UNFINISHED = "unfinished"
    STUCK = "stuck"
    UNCOUNTED = "uncounted"
    LINGERS = "lingers"
    ATTEMPTS = "attempts"
    NO_OBJECTS = "no_objects"
    MISSING = "missing"
    SIZE = "size"
    ORPHAN = "orphan"
    DANGLING_KEY = "dangling_key"
    DEAD_LETTER = "dead_letter"
    TWICE = "twice"
    UNEARNED = "unearned"
    PARTIAL = "partial"
    EMPTY_FOLDER = "empty_folder"


LEFTOVERS = frozenset({Code.TWICE, Code.UNEARNED, Code.PARTIAL, Code.EMPTY_FOLDER})
"""What a killed worker leaves behind: what no record names and no client can see, until it expires."""


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        id: the job's, or the name of the idempotency key.
        text: a sentence.
        object: the store's key where it is about one.
    """

    code: Code
    id: str
    text: str
    object: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What an audit found: what was compared and how much, broken promises, leftovers of killed workers."""

    counts: Mapping[str, int]
    mismatches: tuple[Finding, ...]
    leftovers: tuple[Finding, ...]


def audit(
    census: Census,
    store: ResultStore,
    *,
    result_ttl_s: int,
    clock: Callable[[], int],
    accepted: Collection[str] | None = None,
    settled: bool = False,
    wait: Callable[[], None] = lambda: time.sleep(SECOND_LOOK_S),
) -> Report:
    """Compare accepted ids, records and objects.

    Args:
        census: of the Redis.
        store: where its workers put results.
        result_ttl_s: how long finished jobs are kept: an older id without a record has expired.
        clock: unix ms.
        accepted: ids as the clients kept them, collected before this call; None takes what Redis knows.
        settled: nothing should be unfinished any more.
        wait: returns when it is time to look again at what looked wrong.
    Raises:
        QueueError: Redis cannot be reached.
        OSError: the store cannot.
    """
    ids = None if accepted is None else frozenset(accepted)
    auditor = _Auditor(census, store, ids, result_ttl_s * 1000, clock, settled)
    seen = census.sightings()
    for job_id in ids or ():
        auditor.mention(seen, job_id)
    suspected, counts = auditor.examine(seen)
    found: list[Finding] = []
    if suspected:
        wait()
        suspects = {finding.id for finding in suspected}
        again, _ = auditor.examine(seen.only(suspects), _places_of(suspected))
        wrong = {(finding.code, finding.id, finding.object) for finding in suspected}
        found = sorted(finding for finding in again if (finding.code, finding.id, finding.object) in wrong)
    return Report(
        counts=counts,
        mismatches=tuple(finding for finding in found if finding.code not in LEFTOVERS),
        leftovers=tuple(finding for finding in found if finding.code in LEFTOVERS),
    )


class _Auditor:
    """One audit's questions and what they are judged by."""

    def __init__(
        self,
        census: Census,
        store: ResultStore,
        accepted: frozenset[str] | None,
        ttl_ms: int,
        clock: Callable[[], int],
        settled: bool,
    ) -> None:
        self._accepted = accepted
        self._census = census
        self._store = store
        self._archive = Archive(store)
        self._ttl_ms = ttl_ms
        self._clock = clock
        self._settled = settled

    def mention(self, seen: Sightings, job_id: str) -> None:
        """Have an id looked for wherever it could be."""
        for model in classes_of(job_id, seen.classes):
            seen.add(job_id, Mention(model))
        seen.jobs.setdefault(job_id, set())

    def examine(
        self, seen: Sightings, places: Collection[str] = ("",)
    ) -> tuple[list[Finding], dict[str, int]]:
        """Judge everything seen, and the objects in some folders of the store; "" is all of it."""
        holders = self._census.holders(seen.keys)
        letters = self._census.kept(seen.letters)
        for job_id in [*(holder for holder, _ in holders.values()), *(letter.job_id for letter in letters)]:
            self.mention(seen, job_id)
        sights = self._census.look(seen.jobs)
        # Only after the records: a result is stored before its job is done, so a done one's must be there.
        objects, empty = self._objects(places)
        # And once more the records of those whose objects may have come since.
        for job_id in objects:
            self.mention(seen, job_id)
        moved = [job_id for job_id in objects if not _is_final(sights.get(job_id, []))]
        sights |= self._census.look({job_id: seen.jobs[job_id] for job_id in moved})
        for job_id in objects:
            if _record(sights[job_id]) is None and archive_key(job_id) in objects[job_id]:
                sights[job_id] += self._archived(job_id)
        findings = [
            finding
            for job_id, looks in sights.items()
            for finding in self._judge(job_id, looks, objects.get(job_id, {}))
        ]
        findings += self._judge_keys(holders, sights)
        findings += self._judge_letters(letters, sights)
        findings += [
            Finding(Code.EMPTY_FOLDER, _job_of(folder), "a folder without a file", folder) for folder in empty
        ]
        return findings, self._count(sights, objects, letters, holders)

    def _archived(self, job_id: str) -> list[Sight]:
        """A job whose answer is in the store."""
        try:
            answer = self._archive.read(job_id)
        except UnreadableJobError:
            return []
        return [sight_of(answer)] if answer else []

    def _objects(self, places: Collection[str]) -> tuple[Objects, list[str]]:
        """The files in some folders, and which folders there are empty."""
        objects: dict[str, dict[str, Stored]] = defaultdict(dict)
        empty: list[str] = []
        for place in places:
            for key, found in self._store.listing(place).items():
                objects[_job_of(key)][key] = found
            empty += self._store.empty_folders(place)
        return objects, empty

    def _judge(self, job_id: str, looks: Sequence[Sight], objects: Mapping[str, Stored]) -> Iterator[Finding]:
        job = _record(looks)
        if created_ms_of(job_id) is None and job_id in (self._accepted or ()):
            yield Finding(Code.MALFORMED, job_id, "this is not a job id")
        elif job is None:
            yield from self._judge_unknown(job_id, objects)
        elif job.unfinished:
            yield from self._judge_unfinished(job)
        else:
            yield from self._judge_objects(job, objects)
        yield from _judge_lingering(job_id, looks)
        if job is not None and job.attempt > MAX_ATTEMPTS:
            yield Finding(Code.ATTEMPTS, job_id, f"started {job.attempt} times; {MAX_ATTEMPTS} are allowed")

    def _judge_unknown(self, job_id: str, objects: Mapping[str, Stored]) -> Iterator[Finding]:
        if job_id in (self._accepted or ()) and not self._may_have_expired(job_id):
            yield Finding(Code.LOST, job_id, "accepted and too young to have expired, but there is no record")
        horizon_s = (self._clock() - self._ttl_ms) / 1000
        for key, found in objects.items():
            if found.stored_s > horizon_s:  # older ones only wait for the store's own sweep
                code = Code.PARTIAL if _is_partial(key) else Code.ORPHAN
                yield Finding(code, job_id, "stored, but no job of that id is known", key)

    def _judge_unfinished(self, job: Sight) -> Iterator[Finding]:
        now_ms = self._clock()
        if job.deadline_ms + OVERDUE_MS <= now_ms:
            late_s = (now_ms - job.deadline_ms) / 1000
            yield Finding(Code.OVERDUE, job.id, f"still {job.status}, {late_s:.0f} s after its deadline")
        if self._settled:
            yield Finding(Code.UNFINISHED, job.id, f"still {job.status}")
        if not job.listed and not job.reachable:
            yield Finding(Code.STUCK, job.id, f"{job.status}, but no worker will be given it")
        if not job.live:
            yield Finding(Code.UNCOUNTED, job.id, f"{job.status}, but its deadline is not watched")
        if job.waiting != (job.status is JobStatus.QUEUED):
            counted = "counted as waiting" if job.waiting else "not counted as waiting"
            yield Finding(Code.UNCOUNTED, job.id, f"{job.status}, but {counted}")
        if not job.in_flight and job.deadline_ms > now_ms:
            yield Finding(Code.UNCOUNTED, job.id, f"{job.status}, but not counted against its tenant's cap")

    def _judge_objects(self, job: Sight, objects: Mapping[str, Stored]) -> Iterator[Finding]:
        if job.status is JobStatus.DONE and not job.outputs:
            yield Finding(Code.NO_OBJECTS, job.id, "done, but its record names no result")
        named = {output.key: output.size_bytes for output in job.outputs}
        for key, size_bytes in named.items():
            if key not in objects:
                if job.deleted or self._may_have_expired(job.id):  # the record stays longer, to say so
                    continue
                yield Finding(Code.MISSING, job.id, "done, but this result is not in the store", key)
            elif objects[key].size_bytes != size_bytes:
                stored_bytes = objects[key].size_bytes
                text = f"{stored_bytes} bytes in the store, {size_bytes} in the record"
                yield Finding(Code.SIZE, job.id, text, key)
        for key in objects.keys() - named.keys() - {archive_key(job.id)}:
            if _is_partial(key):
                yield Finding(Code.PARTIAL, job.id, "half written, by a worker that was killed", key)
            elif job.status is JobStatus.DONE:
                yield Finding(Code.TWICE, job.id, "of an attempt that did not win", key)
            else:
                yield Finding(Code.UNEARNED, job.id, f"of a job that is {job.status}", key)

    def _judge_keys(
        self, holders: Mapping[str, tuple[str, str]], sights: Mapping[str, Sequence[Sight]]
    ) -> Iterator[Finding]:
        for key, (job_id, fingerprint) in holders.items():
            job = _record(sights[job_id])
            if job is None and not self._may_have_expired(job_id):
                yield Finding(Code.DANGLING_KEY, key, f"points to {job_id}, of which there is no record")
            elif job is not None and job.fingerprint != fingerprint:
                yield Finding(Code.DANGLING_KEY, key, f"points to {job_id}, which is of another request")

    def _judge_letters(
        self, letters: Sequence[Letter], sights: Mapping[str, Sequence[Sight]]
    ) -> Iterator[Finding]:
        for letter in letters:
            job = _record(sights[letter.job_id])
            if job is None and not self._may_have_expired(letter.job_id):
                yield Finding(Code.DEAD_LETTER, letter.job_id, "a dead letter without a record")
            elif job is not None and job.status is not JobStatus.FAILED:
                yield Finding(Code.DEAD_LETTER, letter.job_id, f"a dead letter, but the job is {job.status}")

    def _may_have_expired(self, job_id: str) -> bool:
        created_ms = created_ms_of(job_id)
        return created_ms is not None and created_ms + self._ttl_ms <= self._clock()

    def _count(
        self,
        sights: Mapping[str, Sequence[Sight]],
        objects: Objects,
        letters: Sequence[Letter],
        holders: Mapping[str, tuple[str, str]],
    ) -> dict[str, int]:
        records = {job_id: job for job_id, looks in sights.items() if (job := _record(looks))}
        ids = records.keys() if self._accepted is None else self._accepted
        statuses = Counter(str(records[job_id].status) if job_id in records else "" for job_id in ids)
        expired = sum(job_id not in records and self._may_have_expired(job_id) for job_id in ids)
        return {
            "accepted": len(ids),
            **{str(status): statuses[status] for status in JobStatus},
            "expired": expired,
            "lost": statuses[""] - expired,
            "records": len(records),
            "objects": sum(map(len, objects.values())),
            "object bytes": sum(found.size_bytes for keys in objects.values() for found in keys.values()),
            "dead letters": len(letters),
            "idempotency keys": len(holders),
        }


def _record(looks: Sequence[Sight]) -> Sight | None:
    """The look that found a record."""
    return next((sight for sight in looks if sight.status is not None), None)


def _is_final(looks: Sequence[Sight]) -> bool:
    job = _record(looks)
    return job is not None and not job.unfinished


def _places_of(findings: Sequence[Finding]) -> set[str]:
    """Where to look again at the objects that are suspicious, and at what else their jobs may have stored."""
    places: set[str] = set()
    for finding in findings:
        if finding.object:
            is_folder = finding.code is Code.EMPTY_FOLDER
            places.add(finding.object if is_folder else finding.object.rpartition("/")[0])
            if created_ms_of(finding.id) is not None:
                places.update(result_folders(finding.id))
    return {""} if "" in places or len(places) > MAX_FOLDERS else places


def _job_of(key: str) -> str:
    """The job whose file or folder this is; for what is nobody's, the folder it lies in."""
    names = key.split("/")
    return next((name for name in names if created_ms_of(name) is not None), names[0])


def _is_partial(key: str) -> bool:
    """True for a file that was never renamed to what it is to be called."""
    return key.rpartition("/")[2].startswith(".")


def _judge_lingering(job_id: str, looks: Sequence[Sight]) -> Iterator[Finding]:
    """Traces in the queue of jobs that are not, or no longer, in it."""
    places = {
        place
        for sight in looks
        for place, is_there in {
            "the list of unfinished jobs": sight.live and not sight.unfinished,
            "the count of waiting jobs": sight.waiting and not sight.unfinished,
            "its tenant's count": sight.in_flight and not sight.unfinished,
            "the dispatch window, under an entry that is not its": sight.strays,
        }.items()
        if is_there
    }
    if places:
        job = _record(looks)
        state = job.status if job else "unknown"
        yield Finding(Code.LINGERS, job_id, f"{state}, but still in {' and '.join(sorted(places))}")
