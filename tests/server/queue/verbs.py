"""What tests of the queue have in common: a result, and verbs on one job."""

from typing import Any

import redis

from server.job import Job, JobError, OutputRef
from server.queue.worker_queue import Lease, WorkerQueue
from tests.server.conftest import MODEL

OUTPUT = OutputRef(
    key="img_1/1-0.png", content_type="image/png", size_bytes=9, width=64, height=64, frames=1, seed=7
)
TIMING = {"queue": 1.5, "denoise": 20.0}
ERROR = JobError(code="generation_failed", message="no")


def lease_one(worker: WorkerQueue) -> Lease:
    (lease,) = worker.read(1)
    return lease


def start_one(worker: WorkerQueue, lease: Lease) -> Job:
    (started,) = worker.start([lease])
    assert started.job is not None, started.dropped
    return started.job


def dropped(worker: WorkerQueue, lease: Lease) -> str:
    (started,) = worker.start([lease])
    assert started.job is None
    return str(started.dropped)


def all_keys(client: redis.Redis) -> set[str]:
    keys: Any = client.keys()
    return set(keys)


def dead_letters(client: redis.Redis) -> list[dict[str, str]]:
    entries: Any = client.xrange(f"q:2:{{{MODEL}}}:dead")
    return [letter for _, letter in entries]
