"""A plain model of the queue, and how what Redis holds is compared with it."""

import asyncio
import hashlib
import math
import os
from collections import Counter, defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
)
from redis.exceptions import ResponseError

from server.job import TERMINAL, UNMEASURED_MS, Job, JobStatus, OutputRef, Priority
from server.queue.archive import LEFT_OUT, Archive
from server.queue.connection import connect
from server.queue.job_queue import JobQueue
from server.queue.keys import stream_of
from server.queue.records import EnqueueStatus, Outlook, dump_cost, load_job
from server.queue.worker_queue import (
    MAX_ATTEMPTS,
    WORKER_TTL_MS,
    Lease,
    Settled,
    WorkerQueue,
)
from server.store import ResultStore
from tests.server.conftest import MODEL, Clock, worker_info

EXAMPLES = int(os.environ.get("QUEUE_MODEL_EXAMPLES", "100"))
STEPS = 50

PREFIX = f"q:2:{{{MODEL}}}"
MAX_WAITING = 12
MAX_LIVE_PER_TENANT = 4
VERSIONS = ("aaaaaaaaaaaa", "bbbbbbbbbbbb")
# Leases lapse when the test says so, however long a step takes.
LEASE_MS = 3_600_000

COSTS = st.sampled_from([None, None, UNMEASURED_MS / 3, 7 * UNMEASURED_MS])
TENANTS = st.sampled_from(["a", "b", "c:d"])
PRIORITIES = st.sampled_from(list(Priority))
AGO = st.integers(0, 9)
"""Which job, lease or attempt: the last one, the one before, ..."""
WHO = st.integers(0, 3)
TIMES = st.sampled_from([1, 1, 1, 2])
"""How often a verb is sent: twice where its first reply was lost."""
WHICH = st.sampled_from([0, 0, 1])
"""Of which version a worker is."""


@dataclass
class ModelJob:
    """What the model knows of one job. `holder` is the worker that the entry in `lane` was delivered to."""

    job: Job
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    entry: str | None = None
    lane: str | None = None
    holder: str | None = None
    lapsed: bool = False
    worker: str | None = None
    cancelled: bool = False
    deleted: bool = False
    archived: bool = False
    wait_us: int = 0
    own_us: int = 0
    finisher: tuple[str, int] | None = None
    outputs: tuple[OutputRef, ...] = ()
    code: str = ""
    progress: int = 0
    frozen: dict[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL

    @property
    def cost(self) -> int:
        return dump_cost(self.job.cost_ms)


@dataclass(frozen=True)
class Run:
    """An attempt as its worker knows it."""

    worker: str
    job: Job


class QueueModel(RuleBasedStateMachine):
    """One queue class with two api processes and as many workers as come."""

    def __init__(self, url: str, store: ResultStore) -> None:
        super().__init__()
        self.url = url
        self.store = store
        for key in store.listing():  # of the example before
            store.delete(key)
        self.clock = Clock()
        self.redis = connect(url)
        self.redis.flushall()
        self.runner = asyncio.Runner()
        self.swept: list[str] = []
        self.archive = Archive(store)
        self.apis = [
            JobQueue(
                url,
                archive=self.archive,
                max_waiting=MAX_WAITING,
                max_live_per_tenant=MAX_LIVE_PER_TENANT,
                on_deadline=lambda job: self.swept.append(job.id),
                clock=self.clock,
            )
            for _ in range(2)
        ]
        self.queues: dict[str, WorkerQueue] = {}
        self.workers: list[str] = []
        self.leases: list[tuple[str, Lease]] = []
        self.runs: list[Run] = []
        self.num_ids = 0
        self.by_id: dict[str, ModelJob] = {}
        self.lists: dict[tuple[Priority, str], deque[str]] = defaultdict(deque)
        self.in_flight: dict[str, set[str]] = defaultdict(set)
        self.keys: dict[tuple[str, str], str] = {}
        self.alive: dict[str, int] = {}
        self.infos: dict[str, int] = {}
        self.windows: dict[str, int] = {}  # microseconds of work
        self.living = -1
        self.streams: set[str] = set()
        self.announced: set[str] = set()
        self.base: str | None = None
        self.next: str | None = None
        self.share = 0
        self.dead: list[str] = []
        self.margin = 1.0

    def told_apart(self, job: Job) -> Job:
        """With an id that a second run of the same example has again, else in another order than its age.

        Redis sorts by id what is of one age: which job is archived, say, and which rules there are then.
        """
        self.num_ids += 1
        drawn = hashlib.sha256(str(self.num_ids).encode()).hexdigest()[:16]
        return replace(job, id=job.id[:-20] + drawn + job.id[-4:])

    def total_work(self) -> int:
        return sum(one.cost for one in self.by_id.values() if not one.finished)

    def accept(self, job: Job, key: str | None, outlook: Outlook | None) -> tuple[EnqueueStatus, str | None]:
        if job.id in self.by_id:
            return EnqueueStatus.OK, job.id
        holder = self.keys.get((job.tenant, key or ""))
        if holder and self.by_id[holder].code != "storage":  # who is told to ask again gets a new job
            same = self.by_id[holder].job.fingerprint == job.fingerprint
            return (EnqueueStatus.DUP if same else EnqueueStatus.MISMATCH), holder
        live = self.in_flight[job.tenant]
        live -= {job_id for job_id in live if self.by_id[job_id].job.deadline_ms <= job.created_ms}
        if len(live) >= MAX_LIVE_PER_TENANT:
            return EnqueueStatus.TENANT_FULL, None
        if sum(other.status is JobStatus.QUEUED for other in self.by_id.values()) >= MAX_WAITING:
            return EnqueueStatus.QUEUE_FULL, None
        ahead_us = self.total_work()
        if outlook and ahead_us > outlook.max_ahead_ms * 1000:
            return EnqueueStatus.LATE, None
        self.by_id[job.id] = ModelJob(job)
        if outlook:
            self.by_id[job.id].wait_us = int(ahead_us * outlook.per_work)
            self.by_id[job.id].own_us = int(outlook.own_ms * 1000)
        self.lists[job.priority, job.tenant].append(job.id)
        live.add(job.id)
        if key:
            self.keys[job.tenant, key] = job.id
        return EnqueueStatus.OK, job.id

    def job(self, ago: int) -> ModelJob:
        return list(self.by_id.values())[-1 - ago % len(self.by_id)]

    def worker_comes(self, max_batch: int, which: int, *, announced: bool) -> str:
        name, version = f"w{len(self.queues)}:{max_batch}", VERSIONS[which]
        self.queues[name] = WorkerQueue(
            self.url, model=MODEL, version=version, consumer=name, clock=self.clock
        )
        self.workers.append(name)
        if announced:
            self.announce(name)
        return name

    def worker(self, who: int) -> str:
        return self.workers[who % len(self.workers)]

    def announce(self, worker: str) -> None:
        self.model_beat(worker)
        version, max_batch = self.queues[worker].version, int(worker.partition(":")[2])
        self.queues[worker].beat(worker_info(worker, max_batch=max_batch, version=version), "{}")
        self.see_lanes()

    def model_beat(self, worker: str) -> None:
        self.announced.add(worker)
        self.streams.add(self.queues[worker].version)
        now_ms, max_batch = self.clock.now_ms, int(worker.partition(":")[2])
        fresh, gone = worker not in self.alive, 0
        revived = not fresh and self.alive[worker] <= now_ms
        self.alive[worker] = now_ms + WORKER_TTL_MS
        if fresh:
            self.infos[worker] = max_batch
        for other in [name for name, until in self.alive.items() if until <= now_ms]:
            if not self.held_by(other):
                del self.alive[other]
                gone += self.infos.pop(other, None) is not None
        if fresh or gone or revived or self.living != self.count_living():
            self.fit_lanes()

    def model_rejoin(self, worker: str) -> None:
        """A worker that finds no lane announces itself again."""
        if self.queues[worker].version not in self.streams and worker in self.announced:
            self.model_beat(worker)

    def count_living(self) -> int:
        return sum(until > self.clock.now_ms for until in self.alive.values())

    def fit_lanes(self) -> None:
        """What waits in a lane that closes goes back to the front."""
        self.living = self.count_living()
        windows = dict.fromkeys(self.windows, 0)
        for worker, max_batch in self.infos.items():
            if self.alive[worker] > self.clock.now_ms:
                version = self.queues[worker].version
                windows[version] = windows.get(version, 0) + max_batch * dump_cost(UNMEASURED_MS)
        self.windows = windows
        for version, window in windows.items():
            if not window:
                self.empty_lane(version)

    def empty_lane(self, version: str) -> None:
        self.put_back([one for one in self.in_lane(version) if one.holder is None])

    def put_back(self, jobs: list[ModelJob]) -> None:
        for one in reversed(jobs):
            one.status, one.entry, one.holder, one.lapsed = JobStatus.QUEUED, None, None, False
            self.lists[one.job.priority, one.job.tenant].appendleft(one.job.id)

    def held_by(self, worker: str) -> bool:
        return any(one.entry and one.holder == worker for one in self.by_id.values())

    def take(self, worker: str, expected: list[ModelJob], found: list[Lease]) -> None:
        assert found == [Lease(str(one.entry), one.job.id) for one in expected]
        for one in expected:
            one.holder, one.lapsed = worker, False
        self.leases += [(worker, lease) for lease in found]

    def in_lane(self, version: str) -> list[ModelJob]:
        """In the order of their entries."""
        inside = [one for one in self.by_id.values() if one.entry and one.lane == version]
        return sorted(inside, key=lambda one: _order(str(one.entry)))

    def age(self, worker: str, entry: str) -> None:
        entries: list[Any] = [entry]
        stream = stream_of(MODEL, self.queues[worker].version)
        self.redis.xclaim(stream, "w", worker, 0, entries, idle=2 * LEASE_MS, justid=True)

    def lease(self, ago: int) -> tuple[str, Lease]:
        return self.leases[-1 - ago % len(self.leases)]

    def owns(self, worker: str, lease: Lease) -> bool:
        one = self.by_id[lease.job_id]
        return one.entry == lease.entry and one.holder == worker

    def begin(self, worker: str, lease: Lease) -> int | str:
        """Its attempt, or why it does not run."""
        one = self.by_id[lease.job_id]
        if not self.owns(worker, lease):
            return "lost"
        if one.cancelled:
            self.finish(one, JobStatus.CANCELLED, "cancelled")
            return "cancelled"
        if self.clock.now_ms >= one.job.deadline_ms:
            self.finish(one, JobStatus.FAILED, "deadline")
            return "deadline"
        if one.status is JobStatus.RUNNING and one.worker == worker:
            return one.attempt
        if one.attempt == MAX_ATTEMPTS:
            self.finish(one, JobStatus.FAILED, "poison")
            self.dead.append(one.job.id)
            return "poison"
        one.status, one.worker, one.attempt, one.progress = JobStatus.RUNNING, worker, one.attempt + 1, 0
        return one.attempt

    def run(self, ago: int) -> Run:
        return self.runs[-1 - ago % len(self.runs)]

    def ended_by(self, one: ModelJob, finisher: tuple[str, int]) -> Settled:
        if one.archived:
            return Settled.UNKNOWN
        return Settled.STALE if one.finished and one.finisher != finisher else Settled.OK

    def finish(self, one: ModelJob, status: JobStatus, code: str = "") -> None:
        assert not one.finished
        if status is JobStatus.DONE or code == "deadline":
            self.learn(one)
        if one.status is JobStatus.QUEUED and one.entry is None:
            self.lists[one.job.priority, one.job.tenant].remove(one.job.id)
        one.status, one.code, one.cancelled = status, code, False
        one.entry = one.holder = None
        one.lapsed = False
        self.in_flight[one.job.tenant].discard(one.job.id)

    def learn(self, one: ModelJob) -> None:
        """Of a job that waited for others and came near its deadline, with no worker lost."""
        latest_ms = (self.margin * one.wait_us + one.own_us) / 1000
        if one.wait_us and one.attempt < 2 and 2 * latest_ms >= one.job.deadline_ms - one.job.created_ms:
            was_late = self.clock.now_ms - one.job.created_ms > latest_ms
            self.margin = min(4.0, max(0.5, self.margin * math.exp(0.05 * (was_late - 0.05))))

    def is_archived_well(self, one: ModelJob) -> None:
        """Its answer is in the store as it was in Redis, and nothing else of it is in Redis."""
        answer = self.archive.read(one.job.id)
        assert answer is not None
        fields = dict(answer.fields)
        assert ("deleted_ms" in fields) == one.deleted
        fields.pop("deleted_ms", None)
        assert fields == {name: value for name, value in one.frozen.items() if name not in LEFT_OUT}

    # what must be true after every step

    @invariant()
    def redis_and_model_agree(self) -> None:
        seen = self.look()
        self.lanes_are_kept(seen)  # first: it learns what is in them
        self.records_agree(seen)
        self.counts_agree(seen)
        self.lists_agree(seen)

    def look(self) -> dict[str, Any]:
        """All that Redis holds of the class, in one round trip."""
        asked = self.redis.pipeline(transaction=False)
        names = ["route", "pump", "live", "alive", "workers", "dead"]
        for name in ("route", "pump"):
            asked.hgetall(f"{PREFIX}:{name}")
        asked.zrange(f"{PREFIX}:live", 0, -1, withscores=True)
        asked.zrange(f"{PREFIX}:alive", 0, -1)
        asked.hkeys(f"{PREFIX}:w")
        asked.xrange(f"{PREFIX}:dead")
        for priority in Priority:
            names += [f"n:{priority}", f"turns:{priority}"]
            asked.zrange(f"{PREFIX}:n:{priority}", 0, -1, withscores=True)
            asked.zrange(f"{PREFIX}:turns:{priority}", 0, -1)
        for tenant in self.in_flight:
            names += [f"f:{tenant}", f"l:{tenant}"]
            asked.zrange(f"{PREFIX}:f:{tenant}", 0, -1)
            asked.zrange(f"{PREFIX}:l:{tenant}", 0, -1)
        for priority, tenant in self.lists:
            names.append(f"t:{priority}:{tenant}")
            asked.lrange(f"{PREFIX}:t:{priority}:{tenant}", 0, -1)
        for job_id in self.by_id:
            names += [f"j:{job_id}", f"ttl:{job_id}"]
            asked.hgetall(f"{PREFIX}:j:{job_id}")
            asked.pttl(f"{PREFIX}:j:{job_id}")
        return dict(zip(names, asked.execute(), strict=True))

    def opened(self) -> set[str]:
        """Versions whose lanes take jobs."""
        return {version for version, window in self.windows.items() if window}

    def see_lanes(self, *, before: set[str] | None = None) -> None:
        """Learn what was moved into the lanes. Each tenant's jobs go there in the order they came.

        Args:
            before: `opened` when the verb began, if it may have dealt jobs then as well as in the end.
        """
        moments = [self.opened()] if before is None else [before, self.opened()]
        inside = {
            (version, entry): fields["id"] for version in VERSIONS for entry, fields in self.entries(version)
        }
        moved = {job_id: where for where, job_id in inside.items() if self.by_id[job_id].entry is None}
        for waiting in self.lists.values():
            came: list[int] = []
            while waiting and waiting[0] in moved:
                one = self.by_id[waiting.popleft()]
                version, entry = moved.pop(one.job.id)
                assert any(self.is_dealt_well(one, version, opened) for opened in moments)
                one.entry, one.lane = entry, version
                came.append(int(entry.partition("-")[0]))  # ms: the rest counts in each lane alone
            assert came == sorted(came), "overtaken by a later one of its tenant"
        assert not moved, "not those at the front of their tenant's list"
        assert inside == {(one.lane, one.entry): one.job.id for one in self.by_id.values() if one.entry}

    def entries(self, version: str) -> Any:
        return self.redis.xrange(stream_of(MODEL, version))

    def is_dealt_well(self, one: ModelJob, version: str, opened: set[str]) -> bool:
        """A job goes to the version that was decided on; while there are two, by share, each job once.

        What is tried again does not go to the version that may be to blame.
        """
        if version not in opened:
            return False
        if len(opened) < 2 or self.base is None:
            return True
        if self.next is None or one.attempt:
            return version == self.base
        if one.lane is not None:
            return version == (one.lane if one.lane == self.base or self.share else self.base)
        return bool(self.share) or version == self.base

    def lanes_are_kept(self, seen: dict[str, Any]) -> None:
        self.see_lanes()
        inside = Counter[str | None]()
        for one in self.by_id.values():
            if one.entry and one.status is JobStatus.QUEUED:  # what has started takes no room
                inside[one.lane] += one.cost
        for version in VERSIONS:
            assert int(seen["pump"].get(f"unstarted:{version}", 0)) == inside[version]
        dealt, to_next = (int(seen["route"].get(name, 0)) for name in ("dealt", "to_next"))
        assert to_next * 100 <= dealt * self.share, "more than its share"
        waiting = any(one.status is JobStatus.QUEUED and not one.entry for one in self.by_id.values())
        room = {version: window - inside[version] for version, window in self.windows.items() if window}
        if len(room) > 1 and self.base:  # what the next version has no room for goes to the base
            room = {self.base: room[self.base]}
        assert not (waiting and any(work > 0 for work in room.values())), "jobs wait although there is room"
        for version in VERSIONS:
            leases: Any = ()
            if self.redis.exists(stream_of(MODEL, version)):
                with suppress(ResponseError):  # no group: none of its workers has come yet
                    leases = self.redis.xpending_range(stream_of(MODEL, version), "w", "-", "+", 1000)
            held = {item["message_id"]: item["consumer"] for item in leases}
            assert held == {one.entry: one.holder for one in self.in_lane(version) if one.holder}

    def records_agree(self, seen: dict[str, Any]) -> None:
        for job_id, one in self.by_id.items():
            fields = seen[f"j:{job_id}"]
            if one.archived:
                assert fields == {}
                continue
            assert ("deleted_ms" in fields) == one.deleted
            fields.pop("deleted_ms", None)  # all that may be added to a final answer
            if one.frozen:
                assert fields == one.frozen, "a final answer changed"
                continue
            assert (fields["status"], fields["attempt"]) == (one.status, str(one.attempt))
            assert (fields.get("entry"), fields.get("worker")) == (one.entry, one.worker)
            if one.status is JobStatus.DONE or not one.finished:
                assert fields.get("version") == one.lane
            assert ("cancel" in fields, int(fields.get("progress", 0))) == (one.cancelled, one.progress)
            assert one.attempt <= MAX_ATTEMPTS
            assert (seen[f"ttl:{job_id}"] > 0) == one.finished, "only what has ended may expire"
            if one.finished:
                job = load_job(MODEL, job_id, fields)
                assert (job.outputs, job.error.code if job.error else "") == (one.outputs, one.code)
                one.frozen = fields

    def counts_agree(self, seen: dict[str, Any]) -> None:
        unfinished = [one for one in self.by_id.values() if not one.finished]
        assert dict(seen["live"]) == {one.job.id: one.job.deadline_ms for one in unfinished}
        assert int(seen["pump"].get("work:live", 0)) == self.total_work()
        assert float(seen["pump"].get("margin", 1)) == pytest.approx(self.margin, rel=1e-3)
        waiting = [one for one in unfinished if one.status is JobStatus.QUEUED]
        for priority in Priority:
            queued = {one.job.id: one.job.created_ms for one in waiting if one.job.priority is priority}
            assert dict(seen[f"n:{priority}"]) == queued
            work = sum(one.cost for one in waiting if one.job.priority is priority)
            assert int(seen["pump"].get(f"work:{priority}", 0)) == work
        for tenant, live in self.in_flight.items():
            assert set(seen[f"f:{tenant}"]) == live
            listed = [
                one.job.id
                for one in self.by_id.values()
                if one.job.kind == "video" and one.job.tenant == tenant and not one.deleted
            ]
            assert seen[f"l:{tenant}"] == sorted(listed)
        assert (set(seen["alive"]), set(seen["workers"])) == (set(self.alive), set(self.infos))
        assert [fields["id"] for _, fields in seen["dead"]] == self.dead

    def lists_agree(self, seen: dict[str, Any]) -> None:
        filled = defaultdict(list)
        for (priority, tenant), expected in self.lists.items():
            ids = seen[f"t:{priority}:{tenant}"]
            if ids:
                filled[priority].append(tenant)
            assert ids == list(expected)
        for priority in Priority:
            assert set(filled[priority]) <= set(seen[f"turns:{priority}"]), "a tenant has no turn"


def _order(entry: str) -> tuple[int, ...]:
    return tuple(map(int, entry.split("-")))
