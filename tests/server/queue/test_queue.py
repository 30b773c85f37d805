"""The queue's verbs against real servers: what a job may do, whoever asks and however often."""

import asyncio
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import redis

from server.job import Job, JobError, JobStatus, Priority
from server.queue.job_queue import JobQueue
from server.queue.records import EnqueueStatus, Outlook
from server.queue.scripts import VERBS, script
from server.queue.worker_queue import Settled, Verdict, WorkerQueue
from tests.server.conftest import MODEL, STREAM, Clock
from tests.server.queue.verbs import (
    ERROR,
    OUTPUT,
    TIMING,
    all_keys,
    dropped,
    lease_one,
    start_one,
)

NewJob = Callable[..., Job]
MakeWorker = Callable[..., WorkerQueue]


# enqueue


async def test_accepted_job_reads_back_as_it_was(queue: JobQueue, new: NewJob) -> None:
    job = new("ein roter Würfel", tenant="t1", priority=Priority.HIGH)
    result = await queue.enqueue(job)
    assert (result.status, result.job_id, result.position) == (EnqueueStatus.OK, job.id, 0)
    assert await queue.get(job.id) == job


async def test_enqueue_repeated_after_a_lost_reply_adds_nothing(queue: JobQueue, new: NewJob) -> None:
    job = new()
    for _ in range(2):
        assert (await queue.enqueue(job)).status is EnqueueStatus.OK
    assert (await queue.stats(MODEL)).total_waiting == 1


async def test_same_key_and_body_is_the_same_job(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    first, second = new(), new()
    await queue.enqueue(first, idempotency_key="k")
    while_queued = await queue.enqueue(second, idempotency_key="k")
    worker = make_worker()
    job = start_one(worker, lease_one(worker))
    worker.complete(job, [OUTPUT], TIMING)
    when_done = await queue.enqueue(new(), idempotency_key="k")
    assert (while_queued.status, while_queued.job_id) == (EnqueueStatus.DUP, first.id)
    assert (when_done.status, when_done.job_id) == (EnqueueStatus.DUP, first.id)
    assert await queue.get(second.id) is None


async def test_same_key_with_another_body_is_a_mismatch(queue: JobQueue, new: NewJob) -> None:
    await queue.enqueue(new("a cube"), idempotency_key="k")
    result = await queue.enqueue(new("a ball"), idempotency_key="k")
    assert result.status is EnqueueStatus.MISMATCH
    assert (await queue.stats(MODEL)).total_waiting == 1


async def test_keys_of_two_tenants_do_not_meet(queue: JobQueue, new: NewJob) -> None:
    await queue.enqueue(new("a cube", tenant="a"), idempotency_key="k")
    result = await queue.enqueue(new("a ball", tenant="b"), idempotency_key="k")
    assert result.status is EnqueueStatus.OK


async def test_refused_job_leaves_its_key_free(redis_url: str, new: NewJob) -> None:
    queue = JobQueue(redis_url, max_waiting=1)
    await queue.enqueue(new())
    assert (await queue.enqueue(new(), idempotency_key="k")).status is EnqueueStatus.QUEUE_FULL
    await queue.close()
    roomier = JobQueue(redis_url, max_waiting=2)
    assert (await roomier.enqueue(new("another"), idempotency_key="k")).status is EnqueueStatus.OK
    await roomier.close()


async def test_full_class_refuses_until_a_job_starts(
    redis_url: str, new: NewJob, make_worker: MakeWorker
) -> None:
    queue = JobQueue(redis_url, max_waiting=2)
    statuses = [(await queue.enqueue(new())).status for _ in range(3)]
    assert statuses == [EnqueueStatus.OK, EnqueueStatus.OK, EnqueueStatus.QUEUE_FULL]
    worker = make_worker()
    start_one(worker, lease_one(worker))
    assert (await queue.enqueue(new())).status is EnqueueStatus.OK
    await queue.close()


async def test_tenant_cap_counts_running_jobs_and_no_other_tenant(
    redis_url: str, new: NewJob, make_worker: MakeWorker
) -> None:
    queue = JobQueue(redis_url, max_live_per_tenant=1)
    await queue.enqueue(new(tenant="a"))
    worker = make_worker()
    job = start_one(worker, lease_one(worker))
    assert (await queue.enqueue(new(tenant="a"))).status is EnqueueStatus.TENANT_FULL
    assert (await queue.enqueue(new(tenant="b"))).status is EnqueueStatus.OK
    worker.complete(job, [], {})
    assert (await queue.enqueue(new(tenant="a"))).status is EnqueueStatus.OK
    await queue.close()


async def test_tenant_cap_does_not_count_jobs_whose_deadline_has_passed(
    redis_url: str, new: NewJob, clock: Clock
) -> None:
    queue = JobQueue(redis_url, max_live_per_tenant=1, clock=clock)
    await queue.enqueue(new(deadline_s=1))
    assert (await queue.enqueue(new())).status is EnqueueStatus.TENANT_FULL
    clock.now_ms += 1000  # no sweep has ended it yet
    assert (await queue.enqueue(new())).status is EnqueueStatus.OK
    await queue.close()


@pytest.mark.parametrize("maxmemory", ["nearly", "over"])
async def test_full_redis_refuses_new_jobs_and_finishes_the_old(
    queue: JobQueue,
    redis_url: str,
    new: NewJob,
    make_worker: MakeWorker,
    client: redis.Redis,
    maxmemory: str,
) -> None:
    for _ in range(3):
        await queue.enqueue(new())
    worker = make_worker()
    running, cancelled, waiting = worker.read(3)
    job = start_one(worker, running)
    newcomer = JobQueue(redis_url)  # an api process that has not met this class yet
    used = int(client.info("memory")["used_memory"])
    client.config_set("maxmemory", used + used // 10 if maxmemory == "nearly" else used // 2)

    assert (await queue.enqueue(new())).status is EnqueueStatus.MEMORY
    assert (await newcomer.enqueue(new())).status is EnqueueStatus.MEMORY
    await newcomer.close()
    assert worker.extend({running: 50}) == {running: Verdict.OK}
    assert worker.complete(job, [OUTPUT], TIMING) is Settled.OK
    await queue.cancel(cancelled.job_id)
    assert dropped(worker, cancelled) == "lost"
    failing = start_one(worker, waiting)
    assert worker.fail(failing, ERROR, {}) is Settled.OK
    done = await queue.wait(job.id, 5)
    assert done is not None
    assert done.status is JobStatus.DONE


async def test_finished_jobs_are_forgotten_oldest_first_before_a_new_one_is_refused(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis, clock: Clock
) -> None:
    worker = make_worker(max_batch=100)
    finished = []
    for _ in range(150):
        await queue.enqueue(new("x" * 2000))
        clock.now_ms += 1
        job = start_one(worker, lease_one(worker))
        worker.complete(job, [OUTPUT], TIMING)
        finished.append(job.id)
    unfinished = new()
    await queue.enqueue(unfinished)
    used = int(client.info("memory")["used_memory"])
    client.config_set("maxmemory", int(used / 0.8) - 50_000)

    late = new()
    assert (await queue.enqueue(late)).status is EnqueueStatus.OK

    known = [await queue.get(job_id) is not None for job_id in finished]
    assert known == sorted(known)  # the unknown ones are the oldest
    assert 0 < known.count(False) < 150
    stats = await queue.stats(MODEL)
    assert (stats.forgotten, stats.kept) == (known.count(False), known.count(True))
    assert 0 < await queue.memory_use() < 1
    assert {(await queue.get(job.id)).status for job in (unfinished, late)} == {JobStatus.QUEUED}  # type: ignore[union-attr]
    client.config_set("maxmemory", 0)
    assert await queue.memory_use() == 0


async def test_records_that_have_expired_are_not_counted_as_kept(
    redis_url: str, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    queue = JobQueue(redis_url, result_ttl_s=1, clock=clock)
    worker = make_worker()
    for _ in range(3):
        await queue.enqueue(new())
        worker.complete(start_one(worker, lease_one(worker)), [], {})
        assert (await queue.stats(MODEL)).kept == 1
        clock.now_ms += 2000
    await queue.close()


async def test_oversized_request_and_key_are_refused(queue: JobQueue, new: NewJob) -> None:
    with pytest.raises(ValueError, match="at most 65536"):
        await queue.enqueue(new("x" * 70_000))
    with pytest.raises(ValueError, match="1 to 255"):
        await queue.enqueue(new(), idempotency_key="k" * 256)


async def test_unknown_ids_are_none(queue: JobQueue, new: NewJob) -> None:
    await queue.enqueue(new())
    for job_id in (new().id, "img_", "", "no/such:id"):
        assert await queue.get(job_id) is None
        assert await queue.wait(job_id, 5) is None
        assert await queue.cancel(job_id) is None


async def test_another_api_process_finds_a_job_by_its_id_alone(
    queue: JobQueue, redis_url: str, new: NewJob
) -> None:
    job = new()
    await queue.enqueue(job)
    other = JobQueue(redis_url)
    assert await other.get(job.id) == job
    await other.close()


# order


async def test_window_holds_one_batch_of_every_live_worker_beside_what_has_started(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    for _ in range(60):
        await queue.enqueue(new())
    worker, other = make_worker("w1", max_batch=4), make_worker("w2", max_batch=8)
    assert client.xlen(STREAM) == 12
    leases = worker.read(6)
    running = [start_one(worker, lease) for lease in leases]
    assert client.xlen(STREAM) == 6 + 12
    other.leave()
    for job in running:
        worker.complete(job, [], {})
    for lease in worker.read(20):
        worker.complete(start_one(worker, lease), [], {})
    assert client.xlen(STREAM) == 4


async def test_window_is_as_long_as_a_batch_takes_however_few_jobs_that_are(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    make_worker(max_batch=8)
    for _ in range(5):
        await queue.enqueue(new(num_samples=5))
    assert client.xlen(STREAM) == 2


# work


async def test_work_of_waiting_and_of_running_jobs_is_added_up(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    worker = make_worker()
    ahead = [(await queue.enqueue(new(num_samples=n, cost_ms=n * 2.5))).ahead_ms for n in (1, 4, 10)]
    assert ahead == [0.0, 2.5, 12.5]
    stats = await queue.stats(MODEL)
    assert (stats.waiting_ms, stats.running_ms) == (37.5, 0.0)
    running = start_one(worker, lease_one(worker))
    stats = await queue.stats(MODEL)
    assert (stats.waiting_ms, stats.running_ms) == (35.0, 2.5)
    worker.complete(running, [], {})
    stats = await queue.stats(MODEL)
    assert (stats.waiting_ms, stats.running_ms) == (35.0, 0.0)


async def test_job_that_would_be_late_behind_those_accepted_a_moment_ago_is_refused(
    queue: JobQueue, new: NewJob
) -> None:
    def outlook(max_ahead_ms: float) -> Outlook:
        return Outlook(max_ahead_ms=max_ahead_ms, own_ms=1.0, per_work=1.0)

    statuses = [
        (await queue.enqueue(new(cost_ms=100.0), outlook=outlook(250.0), idempotency_key=f"k{i}")).status
        for i in range(5)
    ]
    assert statuses == [*[EnqueueStatus.OK] * 3, *[EnqueueStatus.LATE] * 2]
    late = await queue.enqueue(new(cost_ms=1.0), outlook=outlook(299.0))
    assert (late.status, late.ahead_ms, late.job_id) == (EnqueueStatus.LATE, 300.0, None)
    assert (
        await queue.enqueue(new(), idempotency_key="k4")
    ).status is EnqueueStatus.OK  # its key stayed free


async def waited(queue: JobQueue, worker: WorkerQueue, clock: Clock, job: Job, took_ms: int) -> float:
    """The margin once a job behind others is done, or too late; it was to wait for 6 of its 10 s."""
    before = await queue.stats(MODEL)
    ahead_ms = before.waiting_ms + before.running_ms
    await queue.enqueue(job, outlook=Outlook(max_ahead_ms=1e9, own_ms=100.0, per_work=6000.0 / ahead_ms))
    lease = lease_one(worker)
    running = start_one(worker, lease)
    clock.now_ms = job.created_ms + took_ms
    if took_ms < 10_000:
        worker.complete(running, [OUTPUT], TIMING)
    else:
        late = JobError(code="deadline", message="too late")
        worker.fail(running, late, TIMING)
    return (await queue.stats(MODEL)).margin


async def test_margin_follows_how_long_jobs_wait(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    worker, blocker = make_worker(), new(deadline_s=1000)
    await queue.enqueue(blocker)
    start_one(worker, lease_one(worker))
    assert (await queue.stats(MODEL)).margin == 1.0
    margins = [1.0]
    for took_ms in (6200, 6050, 10_000, 6300):  # late, in time, given up, and in time by the margin there is
        margins += [await waited(queue, worker, clock, new(deadline_s=10), took_ms)]
    rises = [after / before for before, after in itertools.pairwise(margins)]
    up, down = math.exp(0.05 * 0.95), math.exp(-0.05 * 0.05)
    assert rises == pytest.approx([up, down, up, down], rel=1e-3)


async def test_nineteen_of_twenty_in_time_leave_the_margin_as_it_is(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    worker = make_worker()
    await queue.enqueue(new(deadline_s=1000))
    start_one(worker, lease_one(worker))
    for took_ms in [9000, *[6000] * 19]:
        await waited(queue, worker, clock, new(deadline_s=10), took_ms)
    assert (await queue.stats(MODEL)).margin == pytest.approx(1.0, abs=2e-3)


async def test_what_says_nothing_about_waiting_leaves_the_margin_alone(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    outlook = Outlook(max_ahead_ms=1e9, own_ms=100.0, per_work=60.0)  # of the 100 ms that are ahead
    worker, first = make_worker(), new(deadline_s=10)
    await queue.enqueue(first, outlook=outlook)  # it need not wait
    slow = start_one(worker, lease_one(worker))
    await queue.enqueue(new(deadline_s=1000), outlook=outlook)  # has all the time in the world
    patient = start_one(worker, lease_one(worker))
    await queue.enqueue(new(deadline_s=10))  # nothing was predicted
    unforeseen = start_one(worker, lease_one(worker))
    clock.now_ms += 9000
    for job in (slow, patient, unforeseen):
        worker.complete(job, [OUTPUT], TIMING)
    await queue.enqueue(new(deadline_s=10))
    await queue.enqueue(cancelled := new(deadline_s=10), outlook=outlook)
    await queue.cancel(cancelled.id)
    assert (await queue.stats(MODEL)).margin == 1.0


# finishing


async def test_job_runs_and_its_waiter_gets_the_result(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    job = new()
    await queue.enqueue(job)
    waiter = asyncio.create_task(queue.wait(job.id, 30))
    worker = make_worker()
    clock.now_ms += 5
    lease = lease_one(worker)
    running = start_one(worker, lease)
    assert (running.status, running.attempt, running.worker) == (JobStatus.RUNNING, 1, "w1")
    assert worker.extend({lease: 50}) == {lease: Verdict.OK}
    seen = await queue.get(job.id)
    assert seen is not None
    assert (seen.progress, seen.started_ms) == (50, clock.now_ms)
    clock.now_ms += 20
    assert worker.complete(running, [OUTPUT, OUTPUT], TIMING) is Settled.OK
    done = await waiter
    assert done is not None
    assert (done.status, done.progress, done.finished_ms) == (JobStatus.DONE, 100, clock.now_ms)
    assert (done.outputs, dict(done.timing)) == ((OUTPUT, OUTPUT), TIMING)
    stats = await queue.stats(MODEL)
    assert (stats.total_waiting, stats.running) == (0, 0)


async def test_idempotency_key_of_one_class_is_taken_in_all_until_its_job_is_gone(
    queue: JobQueue, new: NewJob, client: redis.Redis
) -> None:
    first = new()
    elsewhere = replace(new(), model="other", fingerprint=first.fingerprint)
    await queue.enqueue(first, idempotency_key="k")

    taken = await queue.enqueue(elsewhere, idempotency_key="k")
    assert (taken.status, taken.job_id) == (EnqueueStatus.MISMATCH, first.id)

    client.delete(f"q:2:{{{MODEL}}}:j:{first.id}")
    moved = await queue.enqueue(elsewhere, idempotency_key="k")
    assert (moved.status, moved.job_id) == (EnqueueStatus.OK, elsewhere.id)
    assert (await queue.enqueue(new(), idempotency_key="k")).status is EnqueueStatus.MISMATCH


async def test_key_that_is_only_looked_for_makes_no_job(queue: JobQueue, new: NewJob) -> None:
    assert (await queue.enqueue(new(), idempotency_key="k", admit=False)).status is EnqueueStatus.QUEUE_FULL
    first = await queue.enqueue(new(), idempotency_key="k")
    again = await queue.enqueue(new(), idempotency_key="k", admit=False)
    assert (again.status, again.job_id) == (EnqueueStatus.DUP, first.job_id)


async def test_nothing_but_the_record_and_the_replies_outlive_a_job(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    worker = make_worker()
    before = all_keys(client)
    job = new()
    await queue.enqueue(job, idempotency_key="k")
    worker.complete(start_one(worker, lease_one(worker)), [], {})
    left = all_keys(client) - before - {"q:2:models"}
    claims = {key for key in left if key.startswith("q:2:i:")}  # of a tenant, not of a class
    assert len(claims) == 1
    assert all(key.startswith(f"q:2:{{{MODEL}}}:") for key in left - claims)
    assert {key.removeprefix(f"q:2:{{{MODEL}}}:").partition(":")[0] for key in left - claims} == {
        "j",
        "i",
        "r",
        "ended",
    }
    assert all(0 < client.pttl(key) <= 86_400_000 for key in left)
    assert client.xlen(STREAM) == 0
    assert client.xpending(STREAM, "w")["pending"] == 0


async def test_failure_is_final_and_says_why(queue: JobQueue, new: NewJob, make_worker: MakeWorker) -> None:
    job = new()
    await queue.enqueue(job)
    worker = make_worker()
    running = start_one(worker, lease_one(worker))
    assert worker.fail(running, ERROR, TIMING) is Settled.OK
    failed = await queue.get(job.id)
    assert failed is not None
    assert (failed.status, failed.error, dict(failed.timing)) == (JobStatus.FAILED, ERROR, TIMING)
    assert worker.complete(running, [OUTPUT], {}) is Settled.OK  # this attempt has ended; it is told so again
    assert await queue.get(job.id) == failed


async def test_repeated_verbs_of_one_attempt_change_nothing(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    job = new()
    await queue.enqueue(job)
    worker = make_worker()
    lease = lease_one(worker)
    assert start_one(worker, lease) == start_one(worker, lease)
    running = start_one(worker, lease)
    assert running.attempt == 1
    assert worker.complete(running, [OUTPUT], {}) is Settled.OK
    assert worker.complete(running, [], {}) is Settled.OK
    done = await queue.get(job.id)
    assert done is not None
    assert done.outputs == (OUTPUT,)


async def test_wait_ends_with_its_timeout(queue: JobQueue, new: NewJob) -> None:
    job = new()
    await queue.enqueue(job)
    assert await queue.wait(job.id, 0.05) == job


async def test_every_waiter_of_every_api_process_is_told(
    queue: JobQueue, redis_url: str, new: NewJob, make_worker: MakeWorker
) -> None:
    job = new()
    await queue.enqueue(job)
    other = JobQueue(redis_url)
    waiters = [asyncio.create_task(q.wait(job.id, 30)) for q in (queue, queue, other)]
    await asyncio.gather(queue.wait(job.id, 0.05), other.wait(job.id, 0.05))  # by now all of them watch
    worker = make_worker()
    worker.complete(start_one(worker, lease_one(worker)), [OUTPUT], {})
    ends = await asyncio.wait_for(asyncio.gather(*waiters), 4)
    assert [end.status for end in ends if end] == [JobStatus.DONE] * 3
    await other.close()


async def test_lost_reply_is_found_by_the_sweep(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    waiter = asyncio.create_task(queue.wait(job.id, 60))
    await queue.wait(job.id, 0.05)
    client.hset(f"q:2:{{{MODEL}}}:j:{job.id}", "reply_to", "")  # nobody will be told
    worker = make_worker()
    worker.complete(start_one(worker, lease_one(worker)), [OUTPUT], {})
    await queue.sweep()
    done = await asyncio.wait_for(waiter, 5)
    assert done is not None
    assert done.status is JobStatus.DONE


async def test_reply_that_came_while_the_connection_was_cut_is_read_afterwards(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    waiter = asyncio.create_task(queue.wait(job.id, 60))
    await queue.wait(job.id, 0.05)
    worker = make_worker()
    running = start_one(worker, lease_one(worker))
    client.client_kill_filter(_type="normal", skipme=True)
    worker.complete(running, [OUTPUT], {})
    done = await asyncio.wait_for(waiter, 4)
    assert done is not None
    assert done.status is JobStatus.DONE


# scripts


@pytest.mark.parametrize("verb", VERBS)
def test_only_enqueue_is_refused_by_a_full_redis(verb: str) -> None:
    header = script(verb).split("\n", 1)[0]
    assert ("allow-oom" in header) == (verb != "enqueue")
