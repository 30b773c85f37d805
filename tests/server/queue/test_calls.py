"""Calls that travel together: one round trip, and nothing that happens to one of them reaches the others."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import redis
from redis.exceptions import ResponseError

from server.job import Job, JobStatus
from server.queue.calls import MAX_PIPELINE, Calls
from server.queue.connection import connect_async
from server.queue.job_queue import JobQueue
from server.queue.records import EnqueueStatus
from server.queue.worker_queue import Settled, WorkerQueue
from tests.server.conftest import Clock, poll_async

NewJob = Callable[..., Job]
MakeWorker = Callable[..., WorkerQueue]


def reads(client: redis.Redis) -> int:
    """How often the server has read from any connection, this call's own read included."""
    stats: Any = client.info("stats")
    return int(stats["total_reads_processed"])


async def test_calls_made_at_once_share_a_round_trip(redis_url: str, client: redis.Redis) -> None:
    connection = connect_async(redis_url)
    calls = Calls(connection)
    await calls.command("PING")  # connects
    before = reads(client)
    await asyncio.gather(*(calls.command("SET", f"k{i}", i) for i in range(50)))
    assert reads(client) - before <= 3
    assert await asyncio.gather(*(calls.command("GET", f"k{i}") for i in range(50))) == [
        str(i) for i in range(50)
    ]
    await connection.aclose()


async def test_more_calls_than_a_pipeline_holds_are_all_answered(redis_url: str) -> None:
    connection = connect_async(redis_url)
    calls = Calls(connection)
    numbers = [str(i) for i in range(5 * MAX_PIPELINE + 1)]
    assert await asyncio.gather(*(calls.command("ECHO", number) for number in numbers)) == numbers
    await connection.aclose()


async def test_failed_call_leaves_its_neighbours_alone(redis_url: str) -> None:
    connection = connect_async(redis_url)
    calls = Calls(connection)
    good, bad, other = await asyncio.gather(
        *(calls.command(*command) for command in (("SET", "k", 1), ("LPUSH", "k", 1), ("GET", "k"))),
        return_exceptions=True,
    )
    assert (good, other) == (True, "1")
    assert isinstance(bad, ResponseError)
    await connection.aclose()


async def test_cancelled_caller_leaves_its_neighbours_alone(redis_url: str) -> None:
    connection = connect_async(redis_url)
    calls = Calls(connection)
    leaving = asyncio.create_task(calls.command("ECHO", "a"))
    staying = asyncio.create_task(calls.command("ECHO", "b"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await staying == "b"
    with pytest.raises(asyncio.CancelledError):
        await leaving
    await connection.aclose()


async def test_unreachable_server_fails_every_call() -> None:
    connection = connect_async("unix:///nowhere/redis.sock")
    calls = Calls(connection)
    errors = await asyncio.gather(*(calls.command("PING") for _ in range(3)), return_exceptions=True)
    assert all(isinstance(error, redis.ConnectionError) for error in errors)
    await connection.aclose()


async def test_close_cancels_who_waits(redis_url: str) -> None:
    connection = connect_async(redis_url)
    calls = Calls(connection)
    blocked = asyncio.create_task(calls.command("BLPOP", "nothing", 0))
    late = asyncio.create_task(calls.command("PING"))
    await asyncio.sleep(0)
    await calls.close()
    for task in (blocked, late):
        with pytest.raises(asyncio.CancelledError):
            await task
    await connection.aclose()


async def test_server_that_forgot_the_scripts_gets_them_again(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    worker = make_worker()
    for _ in range(2):
        client.script_flush()
        results = await asyncio.gather(*(queue.enqueue(new()) for _ in range(4)))
        assert {result.status for result in results} == {EnqueueStatus.OK}
        client.script_flush()
        jobs = [started.job for started in worker.start(worker.read(4))]
        client.script_flush()
        assert worker.complete_all([(job, [], {}, ()) for job in jobs if job]) == [Settled.OK] * 4


async def test_calls_that_miss_a_script_together_load_it_once(redis_url: str, client: redis.Redis) -> None:
    connection = connect_async(redis_url)
    calls = Calls(connection)
    client.script_flush()
    client.config_resetstat()
    assert set(await asyncio.gather(*(calls.verb("watch", "q:2:{x}", f"j{i}", "b") for i in range(200)))) == {
        None
    }
    stats: Any = client.info("commandstats")
    assert stats["cmdstat_script|load"]["calls"] == 1
    await connection.aclose()


async def test_jobs_started_together_are_begun_or_dropped_one_by_one(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, clock: Clock
) -> None:
    jobs = [new(deadline_s=1 if index == 1 else 60) for index in range(4)]
    for job in jobs:
        await queue.enqueue(job)
    worker, other = make_worker("w1", max_batch=4), make_worker("w2")
    leases = worker.read(4)
    assert await queue.cancel(jobs[2].id) is not None
    clock.now_ms += 1000
    stolen = other.reclaim(1, 0)
    assert stolen == leases[:1]

    seen = {job.id: job for job in worker.look(leases)[0] if isinstance(job, Job)}
    started = worker.start(leases, seen)

    assert [one.dropped for one in started] == [
        "lost",
        "deadline",
        "lost",
        None,
    ]  # a cancelled one has left its lane
    (job,) = [one.job for one in started if one.job]
    stored = await queue.get(job.id)
    assert job == stored
    assert (job.attempt, job.started_ms, job.worker, job.version) == (1, clock.now_ms, "w1", worker.version)


async def test_start_asks_for_no_record_that_was_looked_at(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        await queue.enqueue(new())
    worker = make_worker()
    leases = worker.read(3)
    jobs, _ = worker.look(leases)
    monkeypatch.setattr(worker, "look", lambda _: pytest.fail("looks again"))
    started = worker.start(leases, {job.id: job for job in jobs if isinstance(job, Job)})
    assert [one.job and one.job.status for one in started] == ["running"] * 3


async def test_jobs_completed_together_are_settled_one_by_one(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    for _ in range(3):
        await queue.enqueue(new())
    worker = make_worker()
    first, second, third = [started.job for started in worker.start(worker.read(3)) if started.job]
    assert worker.complete(second, [], {}) is Settled.OK
    other = make_worker("w2")
    assert other.complete_all([(first, [], {}, ()), (second, [], {}, ())]) == [Settled.OK, Settled.STALE]
    assert worker.complete_all([(second, [], {}, ()), (third, [], {}, ())]) == [Settled.OK, Settled.OK]
    assert worker.complete_all([]) == []


# waiting for a job that this process enqueued itself


async def test_reply_that_came_before_the_wait_is_not_waited_for(
    queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    early, late = new(), new()
    for job in (early, late):
        await queue.enqueue(job)
    waiter = asyncio.create_task(queue.wait(late.id, 30))
    worker = make_worker()
    for started in worker.start(worker.read(2)):  # in order, so the reader has seen both once `late` wakes
        assert started.job is not None
        worker.complete(started.job, [], {})
    assert await waiter is not None
    done = await queue.wait(early.id, 30)
    assert done is not None
    assert done.status is JobStatus.DONE


async def test_job_that_vanished_after_it_was_enqueued_is_noticed_by_the_sweep(
    queue: JobQueue, new: NewJob, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    waiter = asyncio.create_task(queue.wait(job.id, 30))

    async def listens() -> bool:
        found: Any = client.client_list()
        return any(connection["cmd"] == "xread" for connection in found)

    await poll_async(listens)
    client.flushall()
    await queue.sweep()
    assert await waiter is None


async def test_refused_job_is_not_expected(redis_url: str, new: NewJob) -> None:
    queue = JobQueue(redis_url, max_waiting=1)
    await queue.enqueue(new())
    refused = new()
    assert (await queue.enqueue(refused)).status is EnqueueStatus.QUEUE_FULL
    assert await queue.wait(refused.id, 30) is None
    await queue.close()
