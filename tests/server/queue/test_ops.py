"""Whoever wants to know is told how long Redis took for each operation, by a name that is known before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from redis.exceptions import ConnectionError as NoConnectionError

from server.job import Job
from server.queue.job_queue import JobQueue
from server.queue.ops import API_OPS, WORKER_OPS
from server.queue.scripts import VERBS
from server.queue.worker_queue import WorkerQueue
from tests.server.conftest import MODEL, VERSION, Clock, worker_info
from tests.server.queue.verbs import OUTPUT


class Seen(Counter[str]):
    """Operations, counted as they come."""

    def observe(self, op: str, took_s: float) -> None:
        assert took_s >= 0
        self[op] += 1


def test_every_script_is_an_operation_of_one_side_and_every_name_is_there_once() -> None:
    assert set(VERBS) <= {*API_OPS, *WORKER_OPS}
    assert len(set(API_OPS)) == len(API_OPS)
    assert len(set(WORKER_OPS)) == len(WORKER_OPS)


async def test_life_of_a_job_is_observed_on_both_sides(
    redis_url: str, clock: Clock, new: Callable[..., Job]
) -> None:
    api, worker = Seen(), Seen()
    queue = JobQueue(redis_url, clock=clock, observe=api.observe)
    worker_queue = WorkerQueue(
        redis_url, model=MODEL, version=VERSION, consumer="w1", clock=clock, observe=worker.observe
    )
    worker_queue.beat(worker_info("w1"), "{}")
    job = new()
    await queue.enqueue(job)
    leases = worker_queue.read(1)
    (begun,) = worker_queue.start(leases)
    assert begun.job is not None
    worker_queue.complete(begun.job, [OUTPUT], {})
    await queue.get(job.id)
    await queue.stats(MODEL)
    await queue.close()
    worker_queue.close()

    assert api == {"hsetnx": 1, "enqueue": 1, "hgetall": 1, "stats": 1}
    assert worker == {"beat": 1, "announce": 1, "xreadgroup": 1, "start": 1, "look": 1, "complete": 1}
    assert api.keys() <= set(API_OPS)
    assert worker.keys() <= set(WORKER_OPS)


def test_time_that_a_worker_waits_for_a_job_is_not_redis_time(redis_url: str, clock: Clock) -> None:
    seen = Seen()
    queue = WorkerQueue(
        redis_url, model=MODEL, version=VERSION, consumer="w1", clock=clock, observe=seen.observe
    )
    queue.beat(worker_info("w1"), "{}")

    assert queue.read(1, block_ms=1) == []
    assert seen["xreadgroup"] == 0
    assert queue.read(1) == []
    assert seen["xreadgroup"] == 1
    queue.close()


async def test_operation_that_fails_is_observed_as_well() -> None:
    seen = Seen()
    queue = JobQueue("unix:///nowhere/redis.sock", observe=seen.observe)
    worker_queue = WorkerQueue(
        "unix:///nowhere/redis.sock", model=MODEL, version=VERSION, consumer="w1", observe=seen.observe
    )

    with pytest.raises(NoConnectionError):
        await queue.ping()
    with pytest.raises(NoConnectionError):
        worker_queue.leave()
    await queue.close()

    assert seen == {"ping": 1, "leave": 1}
