"""Leases, deadlines, cancelling, and the workers that come and go; on both servers."""

from collections.abc import Callable

import pytest
import redis

from server.job import Job, JobError, JobStatus, Priority
from server.queue.job_queue import DEADLINE_GRACE_MS, JobQueue
from server.queue.keys import class_prefix
from server.queue.records import Pace
from server.queue.worker_queue import MAX_ATTEMPTS, Settled, Verdict, WorkerQueue
from tests.server.conftest import MODEL, STREAM, Clock, let_leases_lapse, worker_info
from tests.server.queue.verbs import ERROR, OUTPUT, TIMING, dead_letters, dropped, lease_one, start_one

NewJob = Callable[..., Job]
MakeWorker = Callable[..., WorkerQueue]


# leases


async def test_expired_lease_is_reclaimed_once(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    dead, second, third = (make_worker(name) for name in ("w1", "w2", "w3"))
    start_one(dead, lease_one(dead))
    assert second.reclaim(8, lease_ms=20_000) == []
    let_leases_lapse(client)
    (lease,) = second.reclaim(8, lease_ms=20_000)
    assert third.reclaim(8, lease_ms=20_000) == []
    again = start_one(second, lease)
    assert (again.id, again.attempt, again.worker) == (job.id, 2, "w2")


async def test_extended_lease_is_not_reclaimed(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    await queue.enqueue(new())
    worker, other = make_worker("w1"), make_worker("w2")
    lease = lease_one(worker)
    let_leases_lapse(client)
    assert worker.extend({lease: 0}) == {lease: Verdict.OK}
    assert other.reclaim(8, lease_ms=20_000) == []


async def test_reclaim_takes_no_more_than_asked(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    for _ in range(6):
        await queue.enqueue(new())
    dead, worker = make_worker("w1"), make_worker("w2")
    assert len(dead.read(6)) == 6
    let_leases_lapse(client)
    assert [len(worker.reclaim(4, lease_ms=20_000)) for _ in range(3)] == [4, 2, 0]


async def test_frozen_worker_cannot_take_its_job_back(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    await queue.enqueue(new())
    frozen, worker = make_worker("w1"), make_worker("w2")
    lease = lease_one(frozen)
    old = start_one(frozen, lease)
    let_leases_lapse(client)
    (taken,) = worker.reclaim(8, lease_ms=20_000)
    start_one(worker, taken)
    assert frozen.extend({lease: 75}) == {lease: Verdict.LOST}
    assert dropped(frozen, lease) == "lost"
    assert frozen.fail(old, ERROR, {}) is Settled.STALE
    assert frozen.hand_back([lease]) == 0
    assert worker.extend({taken: 25}) == {taken: Verdict.OK}


async def test_worker_whose_job_was_taken_over_may_not_fail_it_before_it_starts_again(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    frozen, worker = make_worker("w1"), make_worker("w2")
    old = start_one(frozen, lease_one(frozen))
    let_leases_lapse(client)
    (taken,) = worker.reclaim(8, lease_ms=20_000)
    assert frozen.fail(old, ERROR, {}) is Settled.STALE  # the record still names it, the lease does not
    assert start_one(worker, taken).attempt == 2


async def test_attempt_that_was_handed_back_may_not_fail_the_next_one(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    await queue.enqueue(new())
    worker = make_worker()
    lease = lease_one(worker)
    first = start_one(worker, lease)
    assert worker.hand_back([lease]) == 1
    second = start_one(worker, lease_one(worker))
    assert (first.attempt, second.attempt) == (1, 2)
    assert worker.fail(first, ERROR, {}) is Settled.STALE
    assert worker.fail(second, ERROR, {}) is Settled.OK


@pytest.mark.parametrize("first", ["frozen", "second"])
async def test_first_finisher_wins_and_the_result_never_changes(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis, first: str
) -> None:
    job = new()
    await queue.enqueue(job)
    frozen, second = make_worker("w1"), make_worker("w2")
    runs = {"frozen": (frozen, start_one(frozen, lease_one(frozen)))}
    let_leases_lapse(client)
    (lease,) = second.reclaim(8, lease_ms=20_000)
    runs["second"] = (second, start_one(second, lease))
    other = "second" if first == "frozen" else "frozen"

    winner, attempt = runs[first]
    assert winner.complete(attempt, [OUTPUT], TIMING) is Settled.OK
    done = await queue.get(job.id)
    loser, attempt = runs[other]
    assert loser.complete(attempt, [], {}) is Settled.STALE
    assert loser.fail(attempt, ERROR, {}) is Settled.STALE
    assert await queue.get(job.id) == done
    assert second.extend({lease: 50}) == {lease: Verdict.GONE}


async def test_job_that_kills_three_workers_fails_with_a_dead_letter(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    victim = make_worker("w0")
    start_one(victim, lease_one(victim))
    for attempt in range(2, MAX_ATTEMPTS + 1):
        let_leases_lapse(client)
        victim = make_worker(f"w{attempt}")
        (lease,) = victim.reclaim(8, lease_ms=20_000)
        assert start_one(victim, lease).attempt == attempt
    let_leases_lapse(client)
    survivor = make_worker("w9")
    (lease,) = survivor.reclaim(8, lease_ms=20_000)
    assert dropped(survivor, lease) == "poison"
    failed = await queue.get(job.id)
    assert failed is not None
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.attempt) == (JobStatus.FAILED, "poison", MAX_ATTEMPTS)
    assert [letter["id"] for letter in dead_letters(client)] == [job.id]
    assert (await queue.stats(MODEL)).dead == 1


async def test_lease_that_was_never_started_costs_no_attempt(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    await queue.enqueue(new())
    worker = make_worker("w0")
    lease = lease_one(worker)
    for i in range(1, MAX_ATTEMPTS + 2):
        let_leases_lapse(client)
        worker = make_worker(f"w{i}")
        (lease,) = worker.reclaim(1, lease_ms=20_000)
    assert start_one(worker, lease).attempt == 1


async def test_handed_back_jobs_come_first_and_in_order(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    jobs = [new(str(i), tenant="ab"[i % 2]) for i in range(30)]
    for job in jobs:
        await queue.enqueue(job)
    draining, worker = make_worker("w1", max_batch=4), make_worker("w2", max_batch=4)
    leases = draining.read(6)
    expected = [lease.job_id for lease in leases]
    assert draining.hand_back(leases) == 6
    draining.leave()
    waiting = (await queue.stats(MODEL)).total_waiting
    order = []
    while more := worker.read(1):
        order.append(more[0].job_id)
        worker.complete(start_one(worker, more[0]), [], {})
    assert waiting == 30
    assert sorted(order) == sorted(job.id for job in jobs)
    back = [job_id for job_id in order if job_id in expected]
    assert back == expected


# deadlines


async def test_job_past_its_deadline_never_starts(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    job = new(deadline_s=1)
    await queue.enqueue(job)
    worker = make_worker()
    lease = lease_one(worker)
    clock.now_ms = job.deadline_ms
    assert dropped(worker, lease) == "deadline"
    failed = await queue.get(job.id)
    assert failed is not None
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.attempt) == (JobStatus.FAILED, "deadline", 0)


async def test_sweep_ends_late_jobs_that_no_worker_is_left_to_end(
    redis_url: str, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    told: list[str] = []
    queue = JobQueue(redis_url, on_deadline=lambda job: told.append(job.id), clock=clock)
    queued, running, timely = new("a", deadline_s=1), new("b", deadline_s=1), new("c", deadline_s=1000)
    await queue.enqueue(running)
    worker = make_worker()
    start_one(worker, lease_one(worker))
    for job in (queued, timely):
        await queue.enqueue(job)

    async def statuses() -> list[JobStatus]:
        await queue.sweep()
        return [job.status for job in [await queue.get(x.id) for x in (queued, running, timely)] if job]

    assert await statuses() == [JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.QUEUED]
    clock.now_ms = running.deadline_ms
    assert await statuses() == [JobStatus.FAILED, JobStatus.RUNNING, JobStatus.QUEUED]
    clock.now_ms += DEADLINE_GRACE_MS
    assert await statuses() == [JobStatus.FAILED, JobStatus.FAILED, JobStatus.QUEUED]
    assert told == [queued.id, running.id]
    await queue.close()


# cancel


async def test_queued_job_is_cancelled_at_once_and_never_starts(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    in_window, in_list = new(), new()
    await queue.enqueue(in_window)
    for _ in range(20):
        await queue.enqueue(new())
    await queue.enqueue(in_list)
    worker = make_worker()
    lease = lease_one(worker)
    for job in (in_window, in_list):
        cancelled = await queue.cancel(job.id)
        assert cancelled is not None
        assert cancelled.error is not None
        assert (cancelled.status, cancelled.error.code) == (JobStatus.CANCELLED, "cancelled")
    assert (await queue.stats(MODEL)).total_waiting == 20
    assert dropped(worker, lease) == "lost"
    started = []
    while leases := worker.read(1):
        started.append(leases[0].job_id)
        worker.complete(start_one(worker, leases[0]), [], {})
    assert len(started) == 20
    assert in_list.id not in started


async def test_running_job_is_cancelled_by_its_worker(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    job = new()
    await queue.enqueue(job)
    worker = make_worker()
    lease = lease_one(worker)
    running = start_one(worker, lease)
    seen = await queue.cancel(job.id)
    assert seen is not None
    assert seen.status is JobStatus.RUNNING
    assert worker.extend({lease: 25}) == {lease: Verdict.CANCEL}
    error = JobError(code="cancelled", message="cancelled on request")
    assert worker.fail(running, error, {}, status=JobStatus.CANCELLED) is Settled.OK
    cancelled = await queue.get(job.id)
    assert cancelled is not None
    assert cancelled.status is JobStatus.CANCELLED


async def test_cancel_survives_the_death_of_the_worker(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    dead, worker = make_worker("w1"), make_worker("w2")
    start_one(dead, lease_one(dead))
    await queue.cancel(job.id)
    let_leases_lapse(client)
    (lease,) = worker.reclaim(8, lease_ms=20_000)
    assert dropped(worker, lease) == "cancelled"
    cancelled = await queue.get(job.id)
    assert cancelled is not None
    assert cancelled.status is JobStatus.CANCELLED


async def test_finished_job_cannot_be_cancelled(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    job = new()
    await queue.enqueue(job)
    worker = make_worker()
    worker.complete(start_one(worker, lease_one(worker)), [OUTPUT], {})
    kept = await queue.cancel(job.id)
    assert kept is not None
    assert kept.status is JobStatus.DONE


# workers


async def test_stats_tell_who_lives_and_what_waits(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    worker = make_worker("w1")
    await queue.enqueue(new(priority=Priority.HIGH))
    clock.now_ms += 250
    await queue.enqueue(new(priority=Priority.LOW))
    stats = await queue.stats(MODEL)
    assert stats.waiting == {Priority.HIGH: 1, Priority.NORMAL: 0, Priority.LOW: 1}
    assert (stats.running, stats.oldest_age_ms, stats.dead) == (0, 250, 0)
    assert stats.workers == (worker_info("w1"),)
    start_one(worker, lease_one(worker))
    stats = await queue.stats(MODEL)
    assert (stats.total_waiting, stats.running, stats.oldest_age_ms) == (1, 1, 0)


async def test_stats_tell_the_pace_of_those_who_live(
    queue: JobQueue, make_worker: MakeWorker, client: redis.Redis, clock: Clock
) -> None:
    slow, fast = make_worker("w1"), make_worker("w2")
    assert (await queue.stats(MODEL)).pace == Pace()
    slow.beat(worker_info("w1"), "{}", Pace(2.0, 30.0))
    # Side by side they do what one and a half at the pace of the table do.
    both = (await queue.stats(MODEL)).pace
    assert both.ratio == pytest.approx(2 / (1 / 2.0 + 1))
    assert both.beside_ms == 15.0
    fast.leave()
    assert (await queue.stats(MODEL)).pace == Pace(2.0, 30.0)
    clock.now_ms += 16_000
    make_worker("w3")
    assert (await queue.stats(MODEL)).pace == Pace()
    assert client.hkeys(f"{class_prefix(MODEL)}:pace") == ["w3"]


async def test_silent_worker_is_forgotten_but_its_leases_are_not(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis, clock: Clock
) -> None:
    await queue.enqueue(new())
    silent = make_worker("w1")
    lease_one(silent)
    clock.now_ms += 16_000
    worker = make_worker("w2")
    assert [info.id for info in (await queue.stats(MODEL)).workers] == ["w2"]
    let_leases_lapse(client)
    assert len(worker.reclaim(8, lease_ms=20_000)) == 1
    worker.beat(worker_info("w2"), "{}")
    assert [consumer["name"] for consumer in client.xinfo_consumers(STREAM, "w")] == ["w2"]


async def test_consumer_that_read_after_it_was_forgotten_and_died_is_forgotten_again(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis, clock: Clock
) -> None:
    frozen, other = make_worker("w1"), make_worker("w2")
    clock.now_ms += 16_000
    other.beat(worker_info("w2"), "{}")
    await queue.enqueue(new())
    lease_one(frozen)  # its last act
    let_leases_lapse(client)
    assert len(other.reclaim(1, lease_ms=20_000)) == 1
    other.beat(worker_info("w2"), "{}")
    assert [consumer["name"] for consumer in client.xinfo_consumers(STREAM, "w")] == ["w2"]


async def test_worker_that_left_in_order_is_gone_at_once(
    queue: JobQueue, make_worker: MakeWorker, client: redis.Redis
) -> None:
    make_worker("w1").leave()
    assert (await queue.stats(MODEL)).workers == ()


async def test_worker_that_leaves_a_lease_behind_does_not_take_the_job_along(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    leaving, worker = make_worker("w1"), make_worker("w2")
    start_one(leaving, lease_one(leaving))
    leaving.leave()
    assert [info.id for info in (await queue.stats(MODEL)).workers] == ["w2"]
    let_leases_lapse(client)
    (lease,) = worker.reclaim(8, lease_ms=20_000)
    assert (start_one(worker, lease).id, lease.job_id) == (job.id, job.id)


async def test_models_stay_known_without_their_workers(
    queue: JobQueue, make_worker: MakeWorker, new: NewJob
) -> None:
    assert await queue.models() == {}
    await queue.enqueue(new())
    assert await queue.models() == {}  # known as a class, but nobody has described it
    make_worker().leave()
    assert await queue.models() == {MODEL: {}}


async def test_jobs_enqueued_before_the_first_worker_are_served(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    job = new()
    await queue.enqueue(job)
    worker = make_worker(announce=False)
    assert worker.read(1) == []  # nobody has said yet that this version is served
    worker.beat(worker_info("w1"), "{}")
    assert lease_one(worker).job_id == job.id


async def test_flushed_redis_is_served_on(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    lost = new("lost")
    await queue.enqueue(lost)
    worker = make_worker()
    worker.beat(worker_info("w1"), '{"name": "scenes"}')
    lease = lease_one(worker)
    running = start_one(worker, lease)
    client.flushall()
    assert worker.extend({lease: 50}) == {lease: Verdict.GONE}
    assert worker.complete(running, [OUTPUT], {}) is Settled.UNKNOWN
    assert await queue.wait(lost.id, 5) is None
    assert worker.reclaim(1, lease_ms=1) == []
    assert worker.read(1) == []  # by now it has announced itself again
    await queue.enqueue(new("kept"))
    start_one(worker, lease_one(worker))
    assert await queue.models() == {MODEL: {"name": "scenes"}}
    assert len((await queue.stats(MODEL)).workers) == 1
