"""The queue's scripts against a plain Python model of them: any verbs in any order, on real servers.

Hypothesis plays api processes and workers that act in turn, freeze, die, repeat a verb whose reply got lost,
and wake up long after their leases went to somebody else. After each step all that Redis holds is compared
with what the model says. Only whose turn it is the model leaves open; test_fairness.py does not.

QUEUE_MODEL_EXAMPLES=2000 in the environment makes a soak of it.
"""

import functools
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.job import TERMINAL, UNMEASURED_MS, JobError, JobKind, JobStatus, OutputRef, Priority, new_job
from server.queue.census import Census
from server.queue.job_queue import DEADLINE_GRACE_MS
from server.queue.keys import stream_of
from server.queue.records import EnqueueStatus, Outlook
from server.queue.scripts import script
from server.queue.worker_queue import (
    WORKER_TTL_MS,
    Settled,
    Verdict,
)
from server.store import ResultStore
from server.supervisor.audit import Code, audit
from tests.server.conftest import MODEL, request_of, worker_info
from tests.server.queue.model import (
    AGO,
    COSTS,
    EXAMPLES,
    LEASE_MS,
    PREFIX,
    PRIORITIES,
    STEPS,
    TENANTS,
    TIMES,
    VERSIONS,
    WHICH,
    WHO,
    QueueModel,
    Run,
)


class QueueMachine(QueueModel):
    """Everything that api processes and workers do, in any order."""

    # api processes

    @initialize(asked=st.lists(st.tuples(TENANTS, PRIORITIES), min_size=2, max_size=5))
    def first_jobs(self, asked: list[tuple[str, Priority]]) -> None:
        for tenant, priority in asked:
            self.enqueue(0, JobKind.IMAGE, tenant, priority, "x", None, 1000, None, 1e9, None, 1)
        self.redis_and_model_agree()

    @rule(
        api=st.integers(0, 1),
        kind=st.sampled_from(JobKind),
        tenant=TENANTS,
        priority=PRIORITIES,
        body=st.sampled_from(["x", "y"]),
        key=st.sampled_from([None, None, "k1", "k2"]),
        deadline_s=st.sampled_from([15, 1000]),
        cost_ms=COSTS,
        max_ahead_ms=st.sampled_from([1e9, 1e9, 4 * UNMEASURED_MS]),
        per_work=st.sampled_from([None, 5.0, 50.0]),
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
        cost_ms: float | None,
        max_ahead_ms: float,
        per_work: float | None,
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
            cost_ms=cost_ms,
        )
        job = self.told_apart(job)
        outlook = None
        if per_work is not None:
            outlook = Outlook(max_ahead_ms=max_ahead_ms, own_ms=UNMEASURED_MS, per_work=per_work)
        for _ in range(times):
            expected = self.accept(job, key, outlook)
            enqueue = self.apis[api].enqueue(job, idempotency_key=key, outlook=outlook)
            result = self.runner.run(enqueue)
            assert (result.status, result.job_id) == expected

    @rule(ago=AGO)
    def enqueue_the_same_job_again(self, ago: int) -> None:
        job = self.job(ago).job
        if self.job(ago).archived:
            return  # its reply was lost long ago: nobody asks for it any more
        result = self.runner.run(self.apis[0].enqueue(job))
        assert (result.status, result.job_id) == (EnqueueStatus.OK, job.id)

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

    @precondition(lambda self: any(one.finished and not one.archived for one in self.by_id.values()))
    @rule(api=st.integers(0, 1), limit=st.integers(1, 3), late=st.sampled_from([None, None, 0, 1]))
    def archive_some(self, api: int, limit: int, late: int | None) -> None:
        """Of those that were read, one may be deleted before they are forgotten: it stays."""
        horizon_ms = self.clock.now_ms + 1
        reading = self.apis[api].answers(MODEL, ended_before_ms=horizon_ms, limit=limit)
        answers = self.runner.run(reading)
        known = [one for one in self.by_id.values() if one.finished and not one.archived]
        assert len(answers) == min(limit, len(known))
        assert {answer.id for answer in answers} <= {one.job.id for one in known}
        self.archive.write(answers)
        kept = None
        if late is not None and late < len(answers) and not self.by_id[answers[late].id].deleted:
            kept = self.by_id[answers[late].id]
            kept.deleted = True
            self.runner.run(self.apis[api].delete(kept.job.id))
        moved = self.runner.run(self.apis[api].forget(answers, kept_ms=86_400_000))
        gone = [self.by_id[answer.id] for answer in answers if self.by_id[answer.id] is not kept]
        assert moved == len(gone)
        for one in gone:
            one.archived = True
            self.is_archived_well(one)

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

    @rule(who=WHO)
    def beat(self, who: int) -> None:
        self.announce(self.worker(who))

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
        before = self.opened()  # what lapsed is dealt anew before the worker finds that its lane is closed
        self.model_rejoin(worker)
        version = self.queues[worker].version
        expected = [one for one in self.in_lane(version) if one.holder and one.lapsed][:count]
        found = self.queues[worker].reclaim(count, LEASE_MS)
        self.see_lanes(before=before)
        self.take(worker, expected, found)

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
        code=st.sampled_from(["generation_failed", "storage", "deadline"]),
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
        here = {job_id: one for job_id, one in self.by_id.items() if not one.archived}
        for job_id, one in here.items():
            status: Any = self.redis.hget(f"{PREFIX}:j:{job_id}", "status")
            assert status in TERMINAL, f"{job_id} is never given to a worker"
            assert not one.frozen or status == one.frozen["status"]
        self.clock.now_ms += WORKER_TTL_MS
        about = worker_info(worker, max_batch=3, version=queue.version)
        queue.beat(about, "{}")  # forgets the dead
        queue.reclaim(1, LEASE_MS)  # and the lanes that they have left
        queue.leave()
        names: Any = self.redis.keys()
        lasting = tuple(f"{PREFIX}:{kind}" for kind in ("j:", "i:", "l:", "r:", "dead", "ended", "turns:"))
        kept = {name for name in names if name.startswith((*lasting, "q:2:i:"))}
        stream = stream_of(MODEL, queue.version)
        bundle = {f"{PREFIX}:{kind}" for kind in ("pump", "lanes", "route", "m")}
        assert set(names) - kept <= {"q:2:models", stream, *bundle}, "something leaks"
        assert len(self.redis.keys(f"{PREFIX}:j:*")) == len(here)
        assert self.redis.xlen(stream) == 0
        assert self.redis.xpending(stream, "w")["pending"] == 0
        consumers: Any = self.redis.xinfo_consumers(stream, "w")
        assert consumers == []


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
