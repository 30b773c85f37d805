"""Whose turn it is, on real servers: tenants alternate, priorities share by weight, nobody starves."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest

from server.job import Job, Priority
from server.queue.job_queue import JobQueue
from server.queue.records import EnqueueStatus
from server.queue.worker_queue import WorkerQueue
from tests.server.conftest import Clock

NewJob = Callable[..., Job]
MakeWorker = Callable[..., WorkerQueue]

WEIGHTS = {Priority.HIGH: 8, Priority.NORMAL: 3, Priority.LOW: 1}


@pytest.fixture
async def roomy(redis_url: str, clock: Clock):
    """A queue that takes whatever the test brings."""
    queue = JobQueue(redis_url, max_waiting=10_000, clock=clock)
    yield queue
    await queue.close()


async def enqueue(queue: JobQueue, jobs: Iterable[Job]) -> None:
    for job in jobs:
        assert (await queue.enqueue(job)).status is EnqueueStatus.OK


def serve(*workers: WorkerQueue, batch: int = 1, limit: int | None = None) -> list[Job]:
    """Jobs in the order in which they start, while the workers take turns with batches of them."""
    order: list[Job] = []
    idle = 0
    while idle < len(workers) and (limit is None or len(order) < limit):
        for worker in workers:
            leases = worker.read(batch)
            idle = 0 if leases else idle + 1
            for started in worker.start(leases):
                assert started.job is not None, started.dropped
                order.append(started.job)
                worker.complete(started.job, [], {})
    return order


def longest_wait(order: list[Job], wanted: Callable[[Job], bool]) -> int:
    """Most starts from one wanted job to the next, or to the first."""
    places = [-1, *(place for place, job in enumerate(order) if wanted(job))]
    return max(later - earlier for earlier, later in pairwise(places))


@pytest.mark.parametrize(("num_workers", "batch"), [(1, 1), (2, 4), (2, 8), (2, 16)])
async def test_ten_jobs_behind_a_thousand_start_within_the_first_fifty(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker, num_workers: int, batch: int
) -> None:
    await enqueue(roomy, (new(tenant="a") for _ in range(1000)))
    await enqueue(roomy, (new(tenant="b") for _ in range(10)))
    workers = [make_worker(f"w{i}", max_batch=batch) for i in range(num_workers)]
    order = serve(*workers, batch=batch, limit=100)
    places = [place for place, job in enumerate(order) if job.tenant == "b"]
    assert len(places) == 10
    assert max(places) <= 50


async def test_ten_jobs_of_one_sample_are_not_held_up_by_a_thousand_of_ten(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    await enqueue(roomy, (new(tenant="a", num_samples=10) for _ in range(1000)))
    await enqueue(roomy, (new(tenant="b") for _ in range(10)))
    workers = [make_worker(f"w{i}", max_batch=16) for i in range(2)]
    order = serve(*workers, batch=16, limit=40)
    places = [place for place, job in enumerate(order) if job.tenant == "b"]
    # Four of ten samples fill the window of two batches of 16; one more of them is as much work as all of b.
    assert len(places) == 10
    assert max(places) <= 4 + 10


async def test_tenants_share_the_work_not_the_jobs(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    await enqueue(roomy, (new(tenant="few", num_samples=5) for _ in range(40)))
    await enqueue(roomy, (new(tenant="many") for _ in range(200)))
    order = serve(make_worker(max_batch=1))
    samples = Counter[str]()
    for job in order:
        samples[job.tenant] += job.request.num_samples
        if samples.total() < 400:
            assert abs(samples["few"] - samples["many"]) <= 10
    assert samples == {"few": 200, "many": 200}


async def test_tenants_of_one_priority_take_turns_and_each_is_served_in_order(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    counts = {"a": 120, "b": 40, "c": 40, "d": 7}
    jobs = [new(tenant=tenant) for tenant, count in counts.items() for _ in range(count)]
    await enqueue(roomy, jobs)
    order = serve(make_worker("w1", max_batch=2), make_worker("w2", max_batch=2), batch=2)
    assert Counter(job.tenant for job in order) == counts
    for tenant in counts:
        assert [job.id for job in order if job.tenant == tenant] == [
            job.id for job in jobs if job.tenant == tenant
        ]
    assert Counter(job.tenant for job in order[:28]) == {"a": 7, "b": 7, "c": 7, "d": 7}
    assert Counter(job.tenant for job in order[28:58]) == {"a": 10, "b": 10, "c": 10}


async def test_tenant_that_comes_back_again_and_again_does_not_hold_up_the_others(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    await enqueue(roomy, (new(tenant=f"t{i % 5}") for i in range(100)))
    worker = make_worker(max_batch=2)
    order: list[Job] = []
    for _ in range(30):  # one that keeps its list almost empty joins the ring anew each time
        await enqueue(roomy, [new(tenant="quick"), new(tenant="quick")])
        order += serve(worker, limit=4)
    for i in range(5):
        assert longest_wait(order[16:], lambda job, i=i: job.tenant == f"t{i}") <= 8  # type: ignore[misc]


@pytest.mark.parametrize("num_workers", [1, 3])
async def test_priorities_share_by_weight_and_none_starves(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker, num_workers: int
) -> None:
    workers = [make_worker(f"w{i}", max_batch=1) for i in range(num_workers)]
    window = num_workers
    jobs = [new(priority=priority, tenant=f"t{i % 3}") for priority in Priority for i in range(90)]
    await enqueue(roomy, jobs)
    order = serve(*workers)
    assert len(order) == 270
    shared = order[window : window + 96]  # what was in the window before the others came aside
    assert Counter(job.priority for job in shared) == {
        priority: 96 * weight // 12 for priority, weight in WEIGHTS.items()
    }
    for priority, weight in WEIGHTS.items():
        waited = longest_wait(shared, lambda job, priority=priority: job.priority is priority)  # type: ignore[misc]
        assert waited <= 12 / weight + 2


@pytest.mark.parametrize("missing", list(Priority))
async def test_share_of_a_priority_without_jobs_goes_to_the_others_by_weight(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker, missing: Priority
) -> None:
    present = [priority for priority in Priority if priority is not missing]
    worker = make_worker(max_batch=1)
    await enqueue(roomy, (new(priority=priority) for priority in present for _ in range(60)))
    total = sum(WEIGHTS[priority] for priority in present)
    order = serve(worker)[1 : 1 + 4 * total]
    assert Counter(job.priority for job in order) == {priority: 4 * WEIGHTS[priority] for priority in present}


async def test_low_priority_is_served_under_a_stream_of_high_ones(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    await enqueue(roomy, (new(priority=Priority.HIGH) for _ in range(40)))
    await enqueue(roomy, (new(priority=Priority.LOW) for _ in range(5)))
    worker = make_worker(max_batch=2)
    order: list[Job] = []
    for _ in range(40):  # there are always more urgent ones
        await enqueue(roomy, (new(priority=Priority.HIGH) for _ in range(2)))
        order += serve(worker, limit=2)
    assert sum(job.priority is Priority.LOW for job in order) == 5


async def test_every_job_of_a_random_mix_starts_exactly_once(
    roomy: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    draw = random.Random(3)
    jobs = [new(tenant=f"t{draw.randrange(8)}", priority=draw.choice(list(Priority))) for _ in range(400)]
    workers = [make_worker(f"w{i}", max_batch=draw.randint(1, 8)) for i in range(4)]
    order: list[Job] = []
    for start in range(0, 400, 50):
        await enqueue(roomy, jobs[start : start + 50])
        order += serve(*workers, batch=draw.randint(1, 8), limit=20)
    order += serve(*workers, batch=4)
    assert sorted(job.id for job in order) == sorted(job.id for job in jobs)
