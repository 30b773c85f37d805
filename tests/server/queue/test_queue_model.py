"""The queue's scripts against a plain Python model of them: any verbs in any order, on real servers.

Hypothesis plays api processes and workers that act in turn, freeze, die, repeat a verb whose reply got lost,
and wake up long after their leases went to somebody else. After each step all that Redis holds is compared
with what the model says. Only whose turn it is the model leaves open; test_fairness.py does not.

QUEUE_MODEL_EXAMPLES=2000 in the environment makes a soak of it.
"""

import asyncio
import functools
import os
from collections import Counter, defaultdict, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.exceptions import ResponseError

from server.job import TERMINAL, Job, JobError, JobKind, JobStatus, OutputRef, Priority, new_job
from server.queue.census import Census
from server.queue.connection import connect
from server.queue.job_queue import DEADLINE_GRACE_MS, JobQueue
from server.queue.keys import stream_of
from server.queue.records import EnqueueStatus, load_job
from server.queue.scripts import script
from server.queue.worker_queue import (
    MAX_ATTEMPTS,
    WORKER_TTL_MS,
    Lease,
    Settled,
    Verdict,
    WorkerQueue,
)
from server.store import ResultStore
from server.supervisor.audit import Code, audit
from tests.server.conftest import MODEL, Clock, request_of, worker_info

EXAMPLES = int(os.environ.get("QUEUE_MODEL_EXAMPLES", "100"))
STEPS = 50

PREFIX = f"q:{{{MODEL}}}"
MAX_WAITING = 12
MAX_LIVE_PER_TENANT = 4
VERSIONS = ("aaaaaaaaaaaa", "bbbbbbbbbbbb")
# Leases lapse when the test says so, however long a step takes.
LEASE_MS = 3_600_000

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
    finisher: tuple[str, int] | None = None
    outputs: tuple[OutputRef, ...] = ()
    code: str = ""
    progress: int = 0
    frozen: dict[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.status in TERMINAL


@dataclass(frozen=True)
class Run:
    """An attempt as its worker knows it."""

    worker: str
    job: Job


class QueueMachine(RuleBasedStateMachine):
    """One queue class with two api processes and as many workers as come."""

    def __init__(self, url: str, store: ResultStore) -> None:
        super().__init__()
        self.url = url
        self.store = store
        self.clock = Clock()
        self.redis = connect(url)
        self.redis.flushall()
        self.runner = asyncio.Runner()
        self.swept: list[str] = []
        self.apis = [
            JobQueue(
                url,
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
        self.by_id: dict[str, ModelJob] = {}
        self.lists: dict[tuple[Priority, str], deque[str]] = defaultdict(deque)
        self.in_flight: dict[str, set[str]] = defaultdict(set)
        self.keys: dict[tuple[str, str], str] = {}
        self.alive: dict[str, int] = {}
        self.infos: dict[str, int] = {}
        self.windows: dict[str, int] = {}
        self.living = -1
        self.streams: set[str] = set()
        self.announced: set[str] = set()
        self.base: str | None = None
        self.next: str | None = None
        self.share = 0
        self.dead: list[str] = []

    # api processes

    @initialize(asked=st.lists(st.tuples(TENANTS, PRIORITIES), min_size=2, max_size=5))
    def first_jobs(self, asked: list[tuple[str, Priority]]) -> None:
        for tenant, priority in asked:
            self.enqueue(0, "image", tenant, priority, "x", None, 1000, 1)
        self.redis_and_model_agree()

    @rule(
        api=st.integers(0, 1),
        kind=st.sampled_from(JobKind),
        tenant=TENANTS,
        priority=PRIORITIES,
        body=st.sampled_from(["x", "y"]),
        key=st.sampled_from([None, None, "k1", "k2"]),
        deadline_s=st.sampled_from([15, 1000]),
        times=TIMES,
    )
    def enqueue(
        self,
        api: int,
        kind: JobKind,
        tenant: str,
        priority: Priority,
        body: str,
        key: str | None,
        deadline_s: int,
        times: int,
    ) -> None:
        job = new_job(
            kind=kind,
            model=MODEL,
            request=request_of(body, fps=8 if kind is JobKind.VIDEO else None),
            now_ms=self.clock.now_ms,
            deadline_ms=self.clock.now_ms + deadline_s * 1000,
            priority=priority,
            tenant=tenant,
        )
        for _ in range(times):
            expected = self.accept(job, key)
            result = self.runner.run(self.apis[api].enqueue(job, idempotency_key=key))
            assert (result.status, result.job_id) == expected

    def accept(self, job: Job, key: str | None) -> tuple[EnqueueStatus, str | None]:
        if job.id in self.by_id:
            return EnqueueStatus.OK, job.id
        holder = self.keys.get((job.tenant, key or ""))
        if holder:
            same = self.by_id[holder].job.fingerprint == job.fingerprint
            return (EnqueueStatus.DUP if same else EnqueueStatus.MISMATCH), holder
        live = self.in_flight[job.tenant]
        live -= {job_id for job_id in live if self.by_id[job_id].job.deadline_ms <= job.created_ms}
        if len(live) >= MAX_LIVE_PER_TENANT:
            return EnqueueStatus.TENANT_FULL, None
        if sum(other.status is JobStatus.QUEUED for other in self.by_id.values()) >= MAX_WAITING:
            return EnqueueStatus.QUEUE_FULL, None
        self.by_id[job.id] = ModelJob(job)
        self.lists[job.priority, job.tenant].append(job.id)
        live.add(job.id)
        if key:
            self.keys[job.tenant, key] = job.id
        return EnqueueStatus.OK, job.id

    @rule(ago=AGO)
    def enqueue_the_same_job_again(self, ago: int) -> None:
        job = self.job(ago).job
        result = self.runner.run(self.apis[0].enqueue(job))
        assert (result.status, result.job_id) == (EnqueueStatus.OK, job.id)

    def job(self, ago: int) -> ModelJob:
        return list(self.by_id.values())[-1 - ago % len(self.by_id)]

    @rule(api=st.integers(0, 1), ago=AGO, times=TIMES)
    def cancel(self, api: int, ago: int, times: int) -> None:
        one = self.job(ago)
        for _ in range(times):
            if one.status is JobStatus.QUEUED:
                self.finish(one, JobStatus.CANCELLED, "cancelled")
            elif not one.finished:
                one.cancelled = True
            seen = self.runner.run(self.apis[api].cancel(one.job.id))
            assert seen is not None
            assert seen.status is one.status

    @rule(api=st.integers(0, 1), ago=AGO, times=TIMES)
    def delete(self, api: int, ago: int, times: int) -> None:
        one = self.job(ago)
        for _ in range(times):
            one.deleted = True
            if one.status is JobStatus.QUEUED:
                self.finish(one, JobStatus.CANCELLED, "cancelled")
            elif not one.finished:
                one.cancelled = True
            seen = self.runner.run(self.apis[api].delete(one.job.id))
            assert seen is not None
            assert (seen.status, seen.deleted_ms is None) == (one.status, False)

    @rule(api=st.integers(0, 1))
    def sweep(self, api: int) -> None:
        now_ms, late = self.clock.now_ms, []
        for one in self.by_id.values():
            over_ms = now_ms - one.job.deadline_ms
            grace_ms = DEADLINE_GRACE_MS if one.status is JobStatus.RUNNING else 0
            if not one.finished and over_ms >= grace_ms:
                self.finish(one, JobStatus.FAILED, "deadline")
                late.append(one.job.id)
        self.swept.clear()
        self.runner.run(self.apis[api].sweep())
        assert sorted(self.swept) == sorted(late)

    @rule(seconds=st.sampled_from([1, 6, 20, 40]))
    def time_passes(self, seconds: int) -> None:
        self.clock.now_ms += seconds * 1000

    @rule(
        api=st.integers(0, 1),
        ago=AGO,
        late_ms=st.sampled_from([-1, 0, DEADLINE_GRACE_MS - 1, DEADLINE_GRACE_MS]),
    )
    def falls_due(self, api: int, ago: int, late_ms: int) -> None:
        self.clock.now_ms = max(self.clock.now_ms, self.job(ago).job.deadline_ms + late_ms)
        self.sweep(api)

    # workers

    @initialize(max_batch=st.integers(1, 3), announced=st.booleans(), which=WHICH)
    def first_workers(self, max_batch: int, announced: bool, which: int) -> None:
        self.worker_comes(max_batch, which, announced=announced)
        self.worker_comes(1, 0, announced=True)

    @precondition(lambda self: len(self.workers) < 4)
    @rule(max_batch=st.integers(1, 3), which=WHICH)
    def another_worker(self, max_batch: int, which: int) -> None:
        self.worker_comes(max_batch, which, announced=True)

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

    @rule(who=WHO)
    def beat(self, who: int) -> None:
        self.announce(self.worker(who))

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

    @precondition(lambda self: len(self.workers) > 1)
    @rule(who=WHO)
    def leave(self, who: int) -> None:
        worker = self.worker(who)
        self.workers.remove(worker)
        self.infos.pop(worker, None)
        if self.held_by(worker):
            self.alive[worker] = 0
        else:
            self.alive.pop(worker, None)
        self.fit_lanes()
        self.queues[worker].leave()
        self.see_lanes()

    @precondition(lambda self: len(self.workers) > 1)
    @rule(who=WHO)
    def die(self, who: int) -> None:
        """Without a word; its leases and what it announced stay."""
        self.workers.remove(self.worker(who))

    def count_living(self) -> int:
        return sum(until > self.clock.now_ms for until in self.alive.values())

    def fit_lanes(self) -> None:
        """What waits in a lane that closes goes back to the front."""
        self.living = self.count_living()
        windows = dict.fromkeys(self.windows, 0)
        for worker, max_batch in self.infos.items():
            if self.alive[worker] > self.clock.now_ms:
                version = self.queues[worker].version
                windows[version] = windows.get(version, 0) + 2 * max_batch
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

    @rule(choice=st.integers(0, 6), share=st.sampled_from([0, 25, 50, 100]))
    def decide_about_versions(self, choice: int, share: int) -> None:
        """A swap begins, goes on, or ends; or somebody decides on what no longer stands."""
        plans = [(None, None), *((one, None) for one in VERSIONS), VERSIONS, VERSIONS[::-1]]
        rev: Any = self.redis.hget(f"{PREFIX}:route", "rev") or 0
        base, following = plans[choice % len(plans)]
        fields = {"base": base, "next": following, "share": share, "dealt": 0, "to_next": 0}
        args = [x for name, value in fields.items() if value is not None for x in (name, value)]
        set_route = self.redis.register_script(script("set_route"))
        assert set_route(keys=[PREFIX], args=[int(rev) + 1, *args]) == 0
        self.base, self.next, self.share = base, following, share
        for version in self.windows:
            if base and version != base and not (version == following and share):
                self.empty_lane(version)
        assert set_route(keys=[PREFIX], args=[rev, *args]) == 1
        self.see_lanes()

    def held_by(self, worker: str) -> bool:
        return any(one.entry and one.holder == worker for one in self.by_id.values())

    @rule(who=WHO, count=st.integers(1, 4))
    def read(self, who: int, count: int) -> None:
        worker = self.worker(who)
        ready = [one for one in self.in_lane(self.queues[worker].version) if one.holder is None]
        self.model_rejoin(worker)
        self.take(worker, ready[:count], self.queues[worker].read(count))
        self.see_lanes()

    @rule(who=WHO, count=st.integers(1, 4))
    def reclaim(self, who: int, count: int) -> None:
        worker = self.worker(who)
        for version in [version for version, window in self.windows.items() if not window]:
            self.put_back([one for one in self.in_lane(version) if one.holder and one.lapsed])
            if not self.in_lane(version):
                del self.windows[version]
                self.streams.remove(version)
        self.model_rejoin(worker)
        version = self.queues[worker].version
        expected = [one for one in self.in_lane(version) if one.holder and one.lapsed][:count]
        found = self.queues[worker].reclaim(count, LEASE_MS)
        self.see_lanes()
        self.take(worker, expected, found)

    def take(self, worker: str, expected: list[ModelJob], found: list[Lease]) -> None:
        assert found == [Lease(str(one.entry), one.job.id) for one in expected]
        for one in expected:
            one.holder, one.lapsed = worker, False
        self.leases += [(worker, lease) for lease in found]

    def in_lane(self, version: str) -> list[ModelJob]:
        """In the order of their entries."""
        inside = [one for one in self.by_id.values() if one.entry and one.lane == version]
        return sorted(inside, key=lambda one: _order(str(one.entry)))

    @precondition(lambda self: self.leases)
    @rule(ago=AGO)
    def lease_lapses(self, ago: int) -> None:
        worker, lease = self.lease(ago)
        if self.owns(worker, lease):
            self.by_id[lease.job_id].lapsed = True
            self.age(worker, lease.entry)

    @rule()
    def all_leases_lapse(self) -> None:
        for one in self.by_id.values():
            if one.entry and one.holder:
                one.lapsed = True
                self.age(one.holder, str(one.entry))

    def age(self, worker: str, entry: str) -> None:
        entries: list[Any] = [entry]
        stream = stream_of(MODEL, self.queues[worker].version)
        self.redis.xclaim(stream, "w", worker, 0, entries, idle=2 * LEASE_MS, justid=True)

    def lease(self, ago: int) -> tuple[str, Lease]:
        return self.leases[-1 - ago % len(self.leases)]

    def owns(self, worker: str, lease: Lease) -> bool:
        one = self.by_id[lease.job_id]
        return one.entry == lease.entry and one.holder == worker

    @precondition(lambda self: self.leases)
    @rule(ago=AGO, times=TIMES)
    def start(self, ago: int, times: int) -> None:
        worker, lease = self.lease(ago)
        for _ in range(times):
            expected = self.begin(worker, lease)
            (started,) = self.queues[worker].start([lease])
            assert (started.job.attempt if started.job else started.dropped) == expected
            run = Run(worker, started.job) if started.job else None
            if run and run not in self.runs:
                self.runs.append(run)

    # Rules are drawn with equal chances. These go straight to where most of the life of a job happens.

    @rule(who=WHO, count=st.integers(1, 3))
    def start_next(self, who: int, count: int) -> None:
        for _ in range(count):
            known = len(self.leases)
            self.read(who, 1)
            if len(self.leases) > known:
                self.start(0, 1)
                self.redis_and_model_agree()

    @rule(who=WHO, count=st.integers(1, 4))
    def take_over(self, who: int, count: int) -> None:
        """Whoever had the oldest jobs is dead; so are some that took them over."""
        for other in range(count):
            known = len(self.leases)
            self.all_leases_lapse()
            self.reclaim(who + other, 1)
            if len(self.leases) > known:
                self.start(0, 1)
                self.redis_and_model_agree()

    @precondition(lambda self: self.leases)
    @rule(ago=AGO, late_ms=st.sampled_from([-1, 0]))
    def start_at_the_deadline(self, ago: int, late_ms: int) -> None:
        _, lease = self.lease(ago)
        self.clock.now_ms = max(self.clock.now_ms, self.by_id[lease.job_id].job.deadline_ms + late_ms)
        self.start(ago, 1)

    @precondition(lambda self: self.runs)
    @rule(ago=AGO, other=AGO)
    def complete_two(self, ago: int, other: int) -> None:
        self.complete(ago, 1)
        self.redis_and_model_agree()
        self.complete(other, 1)

    @precondition(lambda self: self.runs)
    @rule(ago=AGO, other=AGO)
    def fail_and_complete(self, ago: int, other: int) -> None:
        self.fail(ago, JobStatus.FAILED, "storage", 1)
        self.redis_and_model_agree()
        self.complete(other, 1)

    @precondition(lambda self: self.leases)
    @rule(ago=AGO)
    def cancel_what_is_leased(self, ago: int) -> None:
        _, lease = self.lease(ago)
        self.cancel(0, list(reversed(self.by_id)).index(lease.job_id), 1)

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

    @precondition(lambda self: self.leases)
    @rule(ago=AGO, progress=st.sampled_from([0, 25, 50]))
    def extend(self, ago: int, progress: int) -> None:
        worker, held = self.lease(ago)
        one = self.by_id[held.job_id]
        if one.finished:
            expected = Verdict.GONE
        elif not self.owns(worker, held):
            expected = Verdict.LOST
        else:
            expected = Verdict.CANCEL if one.cancelled else Verdict.OK
            one.lapsed = False
            one.progress = progress if one.status is JobStatus.RUNNING else one.progress
        assert self.queues[worker].extend({held: progress}) == {held: expected}

    def run(self, ago: int) -> Run:
        return self.runs[-1 - ago % len(self.runs)]

    @precondition(lambda self: self.runs)
    @rule(ago=AGO, times=TIMES)
    def complete(self, ago: int, times: int) -> None:
        run = self.run(ago)
        one = self.by_id[run.job.id]
        finisher = (run.worker, run.job.attempt)
        key = f"{run.job.id}/{run.job.attempt}-0.png"
        output = OutputRef(
            key=key, content_type="image/png", size_bytes=3, width=8, height=8, frames=1, seed=7
        )
        for _ in range(times):
            expected = self.ended_by(one, finisher)
            if not one.finished and one.deleted:
                self.finish(one, JobStatus.CANCELLED, "cancelled")
                one.finisher = finisher
            elif not one.finished:
                self.finish(one, JobStatus.DONE)
                one.lane = self.queues[run.worker].version
                one.outputs, one.finisher, one.progress = (output,), finisher, 100
            if expected is Settled.OK and one.deleted and one.status is JobStatus.CANCELLED:
                expected = Settled.CANCELLED
            assert self.queues[run.worker].complete(run.job, [output], {"denoise": 1.0}) is expected

    @precondition(lambda self: self.runs)
    @rule(
        ago=AGO,
        status=st.sampled_from([JobStatus.FAILED, JobStatus.CANCELLED]),
        code=st.sampled_from(["generation_failed", "storage"]),
        times=TIMES,
    )
    def fail(self, ago: int, status: JobStatus, code: str, times: int) -> None:
        run = self.run(ago)
        one = self.by_id[run.job.id]
        finisher = (run.worker, run.job.attempt)
        for _ in range(times):
            expected = self.ended_by(one, finisher)
            if not one.finished:
                holds = one.entry is not None and one.holder == run.worker
                if holds and (one.worker, one.attempt) == finisher:
                    self.finish(one, status, code)
                    one.finisher = finisher
                else:
                    expected = Settled.STALE
            error = JobError(code=code, message="no")
            assert self.queues[run.worker].fail(run.job, error, {}, status=status) is expected

    def ended_by(self, one: ModelJob, finisher: tuple[str, int]) -> Settled:
        return Settled.STALE if one.finished and one.finisher != finisher else Settled.OK

    @precondition(lambda self: self.leases)
    @rule(ago=AGO, count=st.integers(1, 3), times=TIMES)
    def hand_back(self, ago: int, count: int, times: int) -> None:
        worker, _ = self.lease(ago)
        given = list(dict.fromkeys(lease for holder, lease in self.leases if holder == worker))[-count:]
        for _ in range(times):
            back = [one for one in given if self.owns(worker, one)]
            self.put_back([self.by_id[going.job_id] for going in back])
            assert self.queues[worker].hand_back(given) == len(back)
            self.see_lanes()

    def finish(self, one: ModelJob, status: JobStatus, code: str = "") -> None:
        assert not one.finished
        one.status, one.code, one.cancelled = status, code, False
        one.entry = one.holder = None
        one.lapsed = False
        self.in_flight[one.job.tenant].discard(one.job.id)

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
        names = ["route", "live", "alive", "workers", "dead"]
        asked.hgetall(f"{PREFIX}:route")
        asked.zrange(f"{PREFIX}:live", 0, -1, withscores=True)
        asked.zrange(f"{PREFIX}:alive", 0, -1)
        asked.hkeys(f"{PREFIX}:w")
        asked.xrange(f"{PREFIX}:dead")
        for priority in Priority:
            names += [f"n:{priority}", f"ring:{priority}"]
            asked.zrange(f"{PREFIX}:n:{priority}", 0, -1, withscores=True)
            asked.lrange(f"{PREFIX}:ring:{priority}", 0, -1)
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

    def see_lanes(self) -> None:
        """Learn what was moved into the lanes. Each tenant's jobs go there in the order they came."""
        inside = {
            (version, entry): fields["id"] for version in VERSIONS for entry, fields in self.entries(version)
        }
        moved = {job_id: where for where, job_id in inside.items() if self.by_id[job_id].entry is None}
        for waiting in self.lists.values():
            came: list[int] = []
            while waiting and (waiting[0] in moved or self.by_id[waiting[0]].finished):
                one = self.by_id[waiting.popleft()]
                if one.finished:
                    continue
                version, entry = moved.pop(one.job.id)
                self.is_dealt_well(one, version)
                one.entry, one.lane = entry, version
                came.append(int(entry.partition("-")[0]))  # ms: the rest counts in each lane alone
            assert came == sorted(came), "overtaken by a later one of its tenant"
        assert not moved, "not those at the front of their tenant's list"
        assert inside == {(one.lane, one.entry): one.job.id for one in self.by_id.values() if one.entry}

    def entries(self, version: str) -> Any:
        return self.redis.xrange(stream_of(MODEL, version))

    def is_dealt_well(self, one: ModelJob, version: str) -> None:
        """A job goes to the version that was decided on; while there are two, by share, each job once."""
        opened = {version for version, window in self.windows.items() if window}
        assert version in opened, "nobody serves that version"
        if len(opened) < 2 or self.base is None:
            return
        if self.next is None:
            assert version == self.base
        elif one.attempt:
            assert version == self.base, "tried again by the version that may be to blame"
        elif one.lane is not None:
            assert version == (one.lane if one.lane == self.base or self.share else self.base)
        elif not self.share:
            assert version == self.base

    def lanes_are_kept(self, seen: dict[str, Any]) -> None:
        self.see_lanes()
        inside = Counter(one.lane for one in self.by_id.values() if one.entry)
        dealt, to_next = (int(seen["route"].get(name, 0)) for name in ("dealt", "to_next"))
        assert to_next * 100 <= dealt * self.share, "more than its share"
        waiting = any(one.status is JobStatus.QUEUED and not one.entry for one in self.by_id.values())
        room = {version: window - inside[version] for version, window in self.windows.items() if window}
        if len(room) > 1 and self.base:  # what the next version has no room for goes to the base
            room = {self.base: room[self.base]}
        assert not (waiting and any(jobs > 0 for jobs in room.values())), "jobs wait although there is room"
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
            assert ("del" in fields) == one.deleted
            fields.pop("del", None)  # all that may be added to a final answer
            if one.frozen:
                assert fields == one.frozen, "a final answer changed"
                continue
            assert (fields["st"], fields["at"]) == (one.status, str(one.attempt))
            assert (fields.get("ent"), fields.get("own")) == (one.entry, one.worker)
            if one.status is JobStatus.DONE or not one.finished:
                assert fields.get("vs") == one.lane
            assert ("cx" in fields, int(fields.get("pg", 0))) == (one.cancelled, one.progress)
            assert one.attempt <= MAX_ATTEMPTS
            assert (seen[f"ttl:{job_id}"] > 0) == one.finished, "only what has ended may expire"
            if one.finished:
                job = load_job(MODEL, job_id, fields)
                assert (job.outputs, job.error.code if job.error else "") == (one.outputs, one.code)
                one.frozen = fields

    def counts_agree(self, seen: dict[str, Any]) -> None:
        unfinished = [one for one in self.by_id.values() if not one.finished]
        assert dict(seen["live"]) == {one.job.id: one.job.deadline_ms for one in unfinished}
        waiting = [one for one in unfinished if one.status is JobStatus.QUEUED]
        for priority in Priority:
            queued = {one.job.id: one.job.created_ms for one in waiting if one.job.priority is priority}
            assert dict(seen[f"n:{priority}"]) == queued
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
            # A job that ended while it waited stays in its list until its turn.
            assert [x for x in ids if not self.by_id[x].finished] == [
                x for x in expected if not self.by_id[x].finished
            ]
        for priority in Priority:
            ring = seen[f"ring:{priority}"]
            assert sorted(ring) == sorted(filled[priority]), "a tenant has no turn, or more than one"

    # the end

    def teardown(self) -> None:
        try:
            self.audit_agrees()
            self.drain()
        finally:
            for queue in self.apis:
                self.runner.run(queue.close())
            for worker in self.queues.values():
                worker.close()
            self.runner.close()
            self.redis.close()

    def audit_agrees(self) -> None:
        """Of the results, which no worker of ours stores, it may say what it likes."""
        census = Census(self.url)
        try:
            report = audit(
                census,
                self.store,
                result_ttl_s=86_400,
                clock=self.clock,
                accepted=list(self.by_id),
                wait=lambda: None,
            )
        finally:
            census.close()
        assert {finding.code for finding in report.mismatches} <= {Code.MISSING, Code.OVERDUE}
        assert report.counts["accepted"] == report.counts["records"] == len(self.by_id)

    def drain(self) -> None:
        """Whatever state it is in, one healthy worker ends it all, and nothing stays behind."""
        self.clock.now_ms += WORKER_TTL_MS
        worker = self.worker_comes(3, 0, announced=True)
        self.all_leases_lapse()
        queue = self.queues[worker]
        while leases := queue.reclaim(3, LEASE_MS) or queue.read(3):
            for started in queue.start(leases):
                if started.job:
                    assert queue.complete(started.job, [], {}) is Settled.OK
        for job_id, one in self.by_id.items():
            status: Any = self.redis.hget(f"{PREFIX}:j:{job_id}", "st")
            assert status in TERMINAL, f"{job_id} is never given to a worker"
            assert not one.frozen or status == one.frozen["st"]
        self.clock.now_ms += WORKER_TTL_MS
        about = worker_info(worker, max_batch=3, version=queue.version)
        queue.beat(about, "{}")  # forgets the dead
        queue.reclaim(1, LEASE_MS)  # and the lanes that they have left
        queue.leave()
        names: Any = self.redis.keys()
        lasting = tuple(f"{PREFIX}:{kind}" for kind in ("j:", "i:", "l:", "r:", "dead", "ended"))
        kept = {name for name in names if name.startswith((*lasting, "q:i:"))}
        stream = stream_of(MODEL, queue.version)
        bundle = {f"{PREFIX}:{kind}" for kind in ("pump", "lanes", "route", "m")}
        assert set(names) - kept <= {"q:models", stream, *bundle}, "something leaks"
        assert len(self.redis.keys(f"{PREFIX}:j:*")) == len(self.by_id)
        assert self.redis.xlen(stream) == 0
        assert self.redis.xpending(stream, "w")["pending"] == 0
        consumers: Any = self.redis.xinfo_consumers(stream, "w")
        assert consumers == []


def _order(entry: str) -> tuple[int, ...]:
    return tuple(map(int, entry.split("-")))


def test_queue_agrees_with_its_model(redis_url: str, tmp_path: Any) -> None:
    store = ResultStore(tmp_path.as_uri())
    machine: Any = functools.partial(QueueMachine, redis_url, store)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
