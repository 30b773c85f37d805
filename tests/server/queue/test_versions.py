"""Several versions of one bundle on one queue: who gets which job, and what becomes of it when they go."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import redis

from engines.bundle.bucket import Bucket
from server.api.catalog import Catalog
from server.job import Job, JobStatus
from server.queue.job_queue import JobQueue
from server.queue.keys import stream_of
from server.queue.routes import Route, Routes
from server.queue.worker_queue import Lease, Settled, WorkerQueue
from server.supervisor.swap import SwapError, _fields, look, promote, roll_back, share
from tests.server.conftest import MODEL, Clock, let_leases_lapse, worker_info
from tests.server.manifests import make_manifest

OLD, NEW, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"
LANES = f"q:2:{{{MODEL}}}:lanes"

NewJob = Callable[..., Job]
MakeWorker = Callable[..., WorkerQueue]


@pytest.fixture
def routes(redis_url: str, clock: Clock) -> Iterator[Routes]:
    routes = Routes(redis_url, clock=clock)
    yield routes
    routes.close()


@pytest.fixture
async def roomy(redis_url: str, clock: Clock) -> AsyncIterator[JobQueue]:
    queue = JobQueue(redis_url, max_waiting=10_000, clock=clock)
    yield queue
    await queue.close()


def decide(routes: Routes, **fields: Any) -> Route:
    route = replace(routes.get(MODEL), **fields)
    assert routes.put(MODEL, route)
    return routes.get(MODEL)


async def enqueue(queue: JobQueue, jobs: Sequence[Job]) -> list[Job]:
    for job in jobs:
        await queue.enqueue(job)
    return list(jobs)


def draw(worker: WorkerQueue, count: int = 100) -> list[str]:
    """Draw all that the worker is given at once; the jobs' ids."""
    done = []
    for started in worker.start(worker.read(count)):
        assert started.job is not None, started.dropped
        assert started.job.version == worker.version
        assert worker.complete(started.job, [], {}) is Settled.OK
        done.append(started.job.id)
    return done


def serve(*workers: WorkerQueue) -> Counter[str]:
    """Let workers draw in turn until nothing is left; jobs by version."""
    drawn: Counter[str] = Counter()
    while counts := {worker.version: len(draw(worker, 1)) for worker in workers}:
        if not any(counts.values()):
            break
        drawn.update(counts)
    return drawn


@pytest.mark.parametrize("percent", [0, 1, 10, 33, 50, 99, 100])
async def test_share_is_exact_however_many_jobs_come_at_once(
    roomy: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker, percent: int
) -> None:
    old, other = (make_worker(name, version=name, max_batch=128) for name in (OLD, NEW))
    decide(routes, base=OLD, next=NEW, share=percent)
    drawn: Counter[str] = Counter()
    for count in (1, 2, 7, 30, 80):
        await enqueue(roomy, [new(tenant=f"t{i % 3}") for i in range(count)])
        drawn += serve(old, other)
        total = drawn[OLD] + drawn[NEW]
        assert drawn[NEW] == total * percent // 100
    assert drawn.total() == 120
    route = routes.get(MODEL)
    assert (route.dealt, route.to_next) == ((120, drawn[NEW]) if percent else (0, 0))


async def test_version_on_trial_gets_no_more_than_its_share_though_the_base_is_busy(
    roomy: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker
) -> None:
    make_worker("old", version=OLD, max_batch=1)
    trial = make_worker("new", version=NEW, max_batch=8)
    decide(routes, base=OLD, next=NEW, share=50)
    await enqueue(roomy, [new() for _ in range(20)])
    assert len(draw(trial)) == 1  # as many as the window of the base holds, and the base draws none
    assert draw(trial) == []


async def test_version_on_trial_that_was_too_slow_catches_up_and_holds_nobody_up(
    roomy: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker
) -> None:
    old, trial = make_worker("old", version=OLD), make_worker("new", version=NEW, max_batch=1)
    decide(routes, base=OLD, next=NEW, share=50)
    await enqueue(roomy, [new() for _ in range(20)])
    assert sum(len(draw(old)) for _ in range(3)) == 19  # its window of one is full, and the rest goes on
    assert len(draw(trial)) == 1
    for version in [*[NEW] * 18, OLD, NEW, OLD, NEW]:
        await enqueue(roomy, [new()])
        assert serve(trial, old).most_common(1) == [(version, 1)]


@pytest.mark.parametrize("lone", [OLD, NEW, OTHER])
async def test_lone_version_gets_every_job_whatever_was_decided(
    roomy: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker, lone: str
) -> None:
    decide(routes, base=OLD, next=NEW, share=10)
    jobs = await enqueue(roomy, [new() for _ in range(20)])
    assert sorted(draw(make_worker(version=lone, max_batch=20))) == sorted(job.id for job in jobs)
    assert routes.get(MODEL).dealt == 0


async def test_versions_that_nobody_decided_on_all_get_jobs(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    workers = [make_worker(version, version=version, max_batch=3) for version in (OLD, NEW)]
    await enqueue(roomy, [new() for _ in range(12)])
    assert [len(draw(worker)) for worker in [*workers, *workers]] == [3, 3, 3, 3]


async def test_job_whose_worker_died_on_trial_is_tried_again_by_the_base(
    queue: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker, client: redis.Redis, clock: Clock
) -> None:
    old, trial, other = (
        make_worker("old", version=OLD),
        make_worker("new", version=NEW),
        make_worker("newer", version=NEW),
    )
    decide(routes, base=OLD, next=NEW, share=100)
    job = new()
    await queue.enqueue(job)
    (started,) = trial.start(trial.read(1))
    assert started.job is not None
    let_leases_lapse(client, stream=stream_of(MODEL, NEW))
    # One of its own version may take it over: it was begun by that version, whose lane it lies in.
    (lease,) = other.reclaim(1, 20_000)
    assert other.hand_back([lease]) == 1  # and when that one ends, it goes to the base

    assert draw(old) == [job.id]
    seen = await queue.get(job.id)
    assert seen is not None
    assert (seen.version, seen.attempt) == (OLD, 2)
    assert trial.complete(started.job, [], {}) is Settled.STALE


async def test_version_whose_workers_are_gone_leaves_its_jobs_to_the_other(
    queue: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker, client: redis.Redis, clock: Clock
) -> None:
    old, trial = make_worker("old", version=OLD), make_worker("new", version=NEW)
    decide(routes, base=OLD, next=NEW, share=100)
    begun, leased, waiting = await enqueue(queue, [new(deadline_s=600) for _ in range(3)])
    leases = trial.read(2)
    assert [lease.job_id for lease in leases] == [begun.id, leased.id]
    trial.start(leases[:1])

    clock.now_ms += 16_000
    old.beat(worker_info("old", version=OLD), "{}")
    assert draw(old) == [waiting.id]  # at once
    old.reclaim(1, 20_000)
    assert draw(old) == []
    let_leases_lapse(client, stream=stream_of(MODEL, NEW))
    old.reclaim(1, 20_000)
    assert draw(old) == [begun.id, leased.id]
    old.reclaim(1, 20_000)
    assert client.hgetall(LANES) == {OLD: "800000"}
    assert client.exists(stream_of(MODEL, NEW)) == 0


async def test_worker_that_wakes_up_after_its_lane_went_away_gets_jobs_again(
    queue: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    old, trial = make_worker("old", version=OLD), make_worker("new", version=NEW)
    decide(routes, base=OLD, next=NEW, share=100)
    clock.now_ms += 16_000
    old.beat(worker_info("old", version=OLD), "{}")
    old.reclaim(1, 20_000)
    assert trial.read(1) == []  # and it says that it is there
    job = new()
    await queue.enqueue(job)
    assert draw(trial) == [job.id]


@pytest.mark.parametrize("version", [OLD, NEW])
async def test_handed_back_job_keeps_its_version_and_counts_once(
    version: str, queue: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker
) -> None:
    other = make_worker("other", version=NEW if version == OLD else OLD)
    leaving, staying = make_worker("leaving", version=version), make_worker("staying", version=version)
    decide(routes, base=OLD, next=NEW, share=50)
    jobs = await enqueue(queue, [new() for _ in range(4)])
    leases = leaving.read(4)
    assert leaving.hand_back(leases) == 2
    leaving.leave()
    assert draw(staying) == [lease.job_id for lease in leases]
    assert sorted([*draw(other), *(lease.job_id for lease in leases)]) == sorted(job.id for job in jobs)
    assert (routes.get(MODEL).dealt, routes.get(MODEL).to_next) == (4, 2)


async def test_what_waits_is_dealt_anew_when_a_version_takes_over_or_is_taken_back(
    queue: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker
) -> None:
    old, trial = make_worker("old", version=OLD), make_worker("new", version=NEW)
    route = decide(routes, base=OLD, next=NEW, share=50, ready=True)
    jobs = await enqueue(queue, [new(str(i)) for i in range(6)])
    (held,) = trial.read(1)
    decide(routes, **_changes(route, route.abandoned("no good")))
    assert sorted(draw(old)) == sorted(job.id for job in jobs if job.id != held.job_id)
    trial.hand_back([held])
    assert draw(old) == [held.job_id]

    route = decide(routes, next=NEW, share=50, ready=True)
    jobs = await enqueue(queue, [new(str(i)) for i in range(6)])
    decide(routes, **_changes(route, route.promoted()))
    assert sorted(draw(trial)) == sorted(job.id for job in jobs)


def _changes(before: Route, after: Route) -> dict[str, Any]:
    names = Route.__dataclass_fields__
    return {name: getattr(after, name) for name in names if getattr(after, name) != getattr(before, name)}


def test_decision_on_what_no_longer_stands_is_refused(routes: Routes) -> None:
    mine = routes.get(MODEL)
    assert routes.put(MODEL, replace(mine, base=OLD))
    assert not routes.put(MODEL, replace(mine, base=NEW))
    assert not routes.drop(MODEL, mine)
    assert routes.get(MODEL) == Route(rev=1, base=OLD)
    assert routes.drop(MODEL, routes.get(MODEL))
    assert routes.get(MODEL) == Route()


def test_route_reads_back_as_it_was(routes: Routes) -> None:
    route = Route(base=OLD, next=NEW, share=7, dealt=3, to_next=1, ready=True, goal=7, result="an old one")
    assert routes.put(MODEL, route)
    assert routes.get(MODEL) == replace(route, rev=1)


async def test_jobs_go_to_the_version_that_draws_them(
    queue: JobQueue, routes: Routes, new: NewJob, redis_url: str, clock: Clock
) -> None:
    offers: dict[str, dict[str, Any]] = {
        OLD: {"buckets": ("64x64", "96x64"), "num_steps": (1, 4)},
        NEW: {"buckets": ("64x64", "32x32x9"), "num_steps": (4,)},
    }
    workers = {}
    for version, offer in offers.items():
        worker = WorkerQueue(redis_url, model=MODEL, version=version, consumer=version, clock=clock)
        worker.beat(worker_info(version, version=version, **offer), "{}")
        workers[version] = worker
    route = decide(routes, base=OLD, next=NEW, share=100)
    tall, quick = new(bucket=Bucket(96, 64)), new(num_steps=1)
    clip, common = new(bucket=Bucket(32, 32, 9)), new()
    await enqueue(queue, [tall, quick, clip, common])
    assert draw(workers[OLD]) == [tall.id, quick.id]
    assert draw(workers[NEW]) == [clip.id, common.id]

    left = await enqueue(queue, [new(bucket=Bucket(96, 64)), new()])
    new_only = make_manifest(MODEL, buckets=["64x64"], num_steps=[4])
    assert routes.stranded(MODEL, new_only) == 1
    decide(routes, base=NEW, next="", share=0, rev=route.rev)
    assert draw(workers[OLD]) == [left[0].id]
    assert routes.stranded(MODEL, new_only) == 0
    for worker in workers.values():
        worker.close()


async def test_answer_names_the_version_that_drew_it_whoever_has_the_lease(
    queue: JobQueue, routes: Routes, new: NewJob, make_worker: MakeWorker, client: redis.Redis, clock: Clock
) -> None:
    old, trial = make_worker("old", version=OLD), make_worker("new", version=NEW)
    decide(routes, base=OLD, next=NEW, share=100)
    job = new(deadline_s=600)
    await queue.enqueue(job)
    (first,) = trial.start(trial.read(1))
    clock.now_ms += 16_000
    old.beat(worker_info("old", version=OLD), "{}")
    let_leases_lapse(client, stream=stream_of(MODEL, NEW))
    old.reclaim(1, 20_000)
    (second,) = old.start(old.read(1))
    assert first.job is not None
    assert second.job is not None
    assert trial.complete(first.job, [], {}) is Settled.OK  # the sleeper was first
    assert old.complete(second.job, [], {}) is Settled.STALE
    seen = await queue.get(job.id)
    assert seen is not None
    assert (seen.status, seen.version, seen.attempt) == (JobStatus.DONE, NEW, 2)


async def test_lease_of_another_lane_is_worth_nothing(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    worker = make_worker("w", version=OLD)
    await queue.enqueue(new())
    (lease,) = worker.read(1)
    stranger = make_worker("w", version=NEW)
    assert [one.dropped for one in stranger.start([lease])] == ["lost"]
    assert stranger.hand_back([lease, Lease("1-1", "img_unknown")]) == 0
    assert client.xlen(stream_of(MODEL, OLD)) == 1


async def test_what_can_be_asked_for_is_what_all_live_versions_draw(
    queue: JobQueue, routes: Routes, redis_url: str, clock: Clock
) -> None:
    narrow = make_manifest(MODEL, version=NEW, buckets=["96x64"], num_steps=[1, 2], default_num_steps=2)
    manifests = {OLD: make_manifest(MODEL, version=OLD), NEW: narrow}
    workers = {
        version: WorkerQueue(redis_url, model=MODEL, version=version, consumer=version, clock=clock)
        for version in manifests
    }
    for version, worker in workers.items():
        worker.beat(worker_info(version, version=version), manifests[version].model_dump_json())
    decide(routes, base=OLD, next=NEW, share=1)
    catalog = Catalog(queue, clock=lambda: 0.0)

    async def offer() -> tuple[str, list[str], list[int], int]:
        manifest = (await catalog.models(max_age_s=-1.0))[MODEL].manifest
        sizes = [bucket.label for bucket in manifest.buckets]
        return manifest.version, sizes, manifest.num_steps, manifest.default_num_steps

    assert await offer() == (OLD, ["96x64"], [1, 2], 2)
    workers[NEW].leave()
    assert await offer() == (OLD, ["64x64", "96x64"], [1, 2, 4], 4)
    decide(routes, next="", share=0)
    workers[OLD].leave()
    assert (await offer())[0] == OLD  # also without a worker, though the other one was announced later
    for worker in workers.values():
        worker.close()


def test_without_an_up_the_commands_deal_jobs_out_to_the_versions_that_live(
    routes: Routes, make_worker: MakeWorker
) -> None:
    def put(route: Route) -> Route:
        assert routes.put(MODEL, route)
        return routes.get(MODEL)

    make_worker("old", version=OLD)
    with pytest.raises(SwapError, match="not 1: aaaaaaaaaaaa"):
        share(look(routes, MODEL), 10)
    assert put(share(look(routes, MODEL), 0)).versions == (OLD,)
    trial = make_worker("new", version=NEW)
    route = put(share(look(routes, MODEL), 10))
    assert (route.base, route.next, route.share) == (OLD, NEW, 10)
    assert put(share(look(routes, MODEL), 20)).share == 20
    rows = _fields(look(routes, MODEL))["versions"]
    assert [(row["version"], row["share"], row["workers"]) for row in rows] == [(OLD, 80, 1), (NEW, 20, 1)]

    assert put(promote(look(routes, MODEL))).versions == (NEW,)
    assert put(roll_back(look(routes, MODEL))).versions == (OLD,)
    trial.leave()
    with pytest.raises(SwapError, match="deploy it first"):
        roll_back(look(routes, MODEL))
