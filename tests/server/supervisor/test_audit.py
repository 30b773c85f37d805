"""The audit against real servers: it names each mismatch, and nothing on a healthy or a moving system."""

import asyncio
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from server.__main__ import main
from server.job import Job, JobError, JobStatus, OutputRef, new_job_id, result_folders
from server.queue.archive import Archive, archive_key
from server.queue.census import Census
from server.queue.job_queue import JobQueue
from server.queue.worker_queue import WorkerQueue
from server.store import ResultStore
from server.supervisor.audit import OVERDUE_MS, Code, Report, audit
from tests.server.conftest import MODEL, STREAM, Clock

NewJob = Callable[..., Job]
MakeWorker = Callable[..., WorkerQueue]
Look = Callable[..., Report]

PREFIX = f"q:2:{{{MODEL}}}"
DATA = b"pixels"
TTL_S = 86_400


@pytest.fixture
def clock() -> Clock:
    """Starts at the present: objects carry the time of the file system."""
    clock = Clock()
    clock.now_ms = int(time.time() * 1000)
    return clock


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore((tmp_path / "results").as_uri())


@pytest.fixture
def look(redis_url: str, store: ResultStore, clock: Clock) -> Look:
    def run(**options) -> Report:
        census = Census(redis_url)
        try:
            wait = options.pop("wait", lambda: None)
            return audit(census, store, result_ttl_s=TTL_S, clock=clock, wait=wait, **options)
        finally:
            census.close()

    return run


@pytest.fixture
async def finish(queue: JobQueue, new: NewJob, make_worker: MakeWorker, store: ResultStore):
    """Make a job and take it all the way."""

    async def run(**options) -> Job:
        job = new(**options)
        await queue.enqueue(job, idempotency_key=job.id)
        worker = make_worker()
        started = start_one(worker)
        assert worker.complete(started, [put(store, started)], {}) is not None
        found = await queue.get(job.id)
        assert found is not None
        return found

    return run


def start_one(worker: WorkerQueue) -> Job:
    (started,) = worker.start(worker.read(1))
    assert started.job is not None, started.dropped
    return started.job


def put(store: ResultStore, job: Job, data: bytes = DATA) -> OutputRef:
    key = f"{result_folders(job.id)[0]}/{job.attempt}-0.png"
    store.put(key, data, "image/png")
    return OutputRef(
        key=key, content_type="image/png", size_bytes=len(DATA), width=8, height=8, frames=1, seed=7
    )


def codes(report: Report) -> list[tuple[Code, str]]:
    return [(finding.code, finding.id) for finding in report.mismatches]


def leftovers(report: Report) -> list[tuple[Code, str]]:
    return [(finding.code, finding.object) for finding in report.leftovers]


# nothing wrong


def test_empty_redis_is_clean(look: Look) -> None:
    report = look()
    assert (report.mismatches, report.leftovers, report.counts["accepted"]) == ((), (), 0)


async def test_jobs_in_every_state_are_clean(
    look: Look, queue: JobQueue, new: NewJob, make_worker: MakeWorker, store: ResultStore
) -> None:
    jobs = [new(str(i), tenant=f"t{i % 3}") for i in range(30)]  # more than the window holds
    for job in jobs:
        await queue.enqueue(job, idempotency_key=job.id)
    worker = make_worker(max_batch=4)
    done, failed, running, leased = worker.read(4)
    for lease in (done, failed, running):
        (started,) = worker.start([lease])
        assert started.job is not None
        if lease is done:
            worker.complete(started.job, [put(store, started.job)], {})
        elif lease is failed:
            worker.fail(started.job, JobError(code="generation_failed", message="no"), {})
        else:
            put(store, started.job)  # stored, not yet completed
    await queue.cancel(jobs[20].id)
    await queue.cancel(leased.job_id)
    worker.hand_back(worker.read(2))
    report = look(accepted=[job.id for job in jobs])
    assert (report.mismatches, report.leftovers) == ((), ())
    assert report.counts["accepted"] == report.counts["records"] == 30
    counted = {status: report.counts[status] for status in JobStatus}
    assert counted == {"queued": 25, "running": 1, "done": 1, "failed": 1, "cancelled": 2}


async def test_job_that_moves_while_it_is_read_is_no_mismatch(
    look: Look, queue: JobQueue, new: NewJob, make_worker: MakeWorker, store: ResultStore
) -> None:
    job = new()
    await queue.enqueue(job)
    worker = make_worker()
    started = start_one(worker)
    output = put(store, started)
    report = look(settled=True, wait=lambda: worker.complete(started, [output], {}))
    assert report.mismatches == ()


async def archive(queue: JobQueue, store: ResultStore, clock: Clock) -> None:
    answers = await queue.answers(MODEL, ended_before_ms=clock.now_ms + 1, limit=100)
    Archive(store).write(answers)
    assert await queue.forget(answers, kept_ms=TTL_S * 1000) == len(answers)


async def test_jobs_whose_answers_are_in_the_store_are_clean(
    look: Look,
    finish: Callable,
    queue: JobQueue,
    new: NewJob,
    store: ResultStore,
    clock: Clock,
) -> None:
    done, cancelled = await finish(), new()
    await queue.enqueue(cancelled, idempotency_key="k")
    await queue.cancel(cancelled.id)
    await archive(queue, store, clock)
    stays = await finish()

    for accepted in (None, [done.id, cancelled.id, stays.id]):
        report = look(accepted=accepted, settled=True)
        assert (report.mismatches, report.leftovers) == ((), ())
        assert (report.counts["done"], report.counts["lost"]) == (2, 0)
        assert (report.counts["records"], report.counts["cancelled"]) == (3, 1)


async def test_result_of_an_archived_job_is_missed(
    look: Look, finish: Callable, queue: JobQueue, store: ResultStore, clock: Clock
) -> None:
    done, other = await finish(), await finish()
    await archive(queue, store, clock)
    store.delete(done.outputs[0].key)
    store.delete(archive_key(other.id))

    assert codes(look(accepted=[done.id, other.id])) == [
        (Code.DANGLING_KEY, look().mismatches[0].id),
        (Code.LOST, other.id),
        (Code.MISSING, done.id),
        (Code.ORPHAN, other.id),
    ]


async def test_loser_that_is_about_to_delete_its_result_leaves_nothing(
    look: Look, finish: Callable, store: ResultStore
) -> None:
    job = await finish()
    store.put(f"{job.id}/2-0.png", DATA, "image/png")
    assert look(wait=lambda: store.delete(f"{job.id}/2-0.png")).leftovers == ()


async def test_expired_records_and_their_objects_are_no_mismatch(
    look: Look, finish: Callable, client: redis.Redis, clock: Clock
) -> None:
    job = await finish()
    client.delete(f"{PREFIX}:j:{job.id}")
    (key,) = client.keys(f"{PREFIX}:i:*")
    too_early = [(Code.DANGLING_KEY, key), (Code.LOST, job.id), (Code.ORPHAN, job.id)]
    assert codes(look(accepted=[job.id])) == too_early
    clock.now_ms += TTL_S * 1000 + 60_000
    report = look(accepted=[job.id])
    assert report.mismatches == ()
    assert report.counts["expired"] == 1


# each mismatch


async def test_accepted_job_without_a_record_is_lost(look: Look, clock: Clock) -> None:
    job_id = new_job_id("image", MODEL, clock.now_ms)
    assert codes(look(accepted=[job_id, "nonsense"])) == [
        (Code.LOST, job_id),
        (Code.MALFORMED, "nonsense"),
    ]


async def test_flushed_redis_lost_every_job(look: Look, finish: Callable, client: redis.Redis) -> None:
    job = await finish()
    client.flushall()
    assert codes(look(accepted=[job.id])) == [(Code.LOST, job.id), (Code.ORPHAN, job.id)]


async def test_unfinished_jobs_count_once_they_should_be_settled_or_are_overdue(
    look: Look, queue: JobQueue, new: NewJob, clock: Clock
) -> None:
    job = new(deadline_s=10)
    await queue.enqueue(job)
    assert codes(look()) == []
    assert codes(look(settled=True)) == [(Code.UNFINISHED, job.id)]
    clock.now_ms = job.deadline_ms + OVERDUE_MS
    assert codes(look()) == [(Code.OVERDUE, job.id)]


async def test_results_that_are_missing_or_changed_are_named(
    look: Look, finish: Callable, store: ResultStore, queue: JobQueue, new: NewJob, make_worker: MakeWorker
) -> None:
    missing, changed, empty = [await finish() for _ in range(2)] + [new()]
    store.delete(missing.outputs[0].key)
    store.put(changed.outputs[0].key, DATA + b"!", "image/png")
    await queue.enqueue(empty)
    worker = make_worker()
    worker.complete(start_one(worker), [], {})
    found = {(finding.code, finding.id, finding.object) for finding in look().mismatches}
    assert found == {
        (Code.MISSING, missing.id, missing.outputs[0].key),
        (Code.SIZE, changed.id, changed.outputs[0].key),
        (Code.NO_OBJECTS, empty.id, ""),
    }


async def test_leftovers_of_killed_workers_are_named_apart(
    look: Look, finish: Callable, store: ResultStore, queue: JobQueue, new: NewJob
) -> None:
    done, cancelled = await finish(), new()
    await queue.enqueue(cancelled)
    await queue.cancel(cancelled.id)
    for key in (f"{done.id}/2-0.png", f"{cancelled.id}/1-0.png", f"{done.id}/.2-0.png.abcd"):
        store.put(key, DATA, "image/png")
    report = look()
    assert report.mismatches == ()
    assert leftovers(report) == [
        (Code.PARTIAL, f"{done.id}/.2-0.png.abcd"),
        (Code.TWICE, f"{done.id}/2-0.png"),
        (Code.UNEARNED, f"{cancelled.id}/1-0.png"),
    ]


@pytest.mark.parametrize("place", [0, 1])
async def test_objects_nobody_knows_are_orphans(
    place: int, look: Look, store: ResultStore, clock: Clock
) -> None:
    job_id = new_job_id("image", MODEL, clock.now_ms)
    folder = result_folders(job_id)[place]
    store.put(f"{folder}/1-0.png", DATA, "image/png")
    assert [(one.code, one.id, one.object) for one in look().mismatches] == [
        (Code.ORPHAN, job_id, f"{folder}/1-0.png")
    ]
    store.put("notes/mine.txt", DATA, "text/plain")
    assert codes(look()) == [(Code.ORPHAN, job_id), (Code.ORPHAN, "notes")]


async def test_empty_folders_are_leftovers(look: Look, finish: Callable, tmp_path: Path) -> None:
    job, results = await finish(), tmp_path / "results"
    other_hour = f"2026-01-01T00/{job.id}"
    for name in (other_hour, job.id, "nothing"):
        (results / name).mkdir(parents=True)
    report = look(wait=(results / "nothing").rmdir)  # it was only about to be filled
    assert report.mismatches == ()
    assert leftovers(report) == [(Code.EMPTY_FOLDER, other_hour), (Code.EMPTY_FOLDER, job.id)]


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("unfinished jobs", lambda client, job: client.zadd(f"{PREFIX}:live", {job.id: 1})),
        ("waiting jobs", lambda client, job: client.zadd(f"{PREFIX}:n:low", {job.id: 1})),
        ("tenant's count", lambda client, job: client.zadd(f"{PREFIX}:f:{job.tenant}", {job.id: 1})),
        ("dispatch window", lambda client, job: client.xadd(STREAM, {"id": job.id})),
    ],
)
@pytest.mark.parametrize("known", [True, False])
async def test_finished_and_unknown_jobs_that_linger_are_named(
    look: Look, finish: Callable, new: NewJob, client: redis.Redis, place: str, command: Callable, known: bool
) -> None:
    job = await finish() if known else new()
    command(client, job)
    report = look()
    assert codes(report) == [(Code.LINGERS, job.id)]
    assert place in report.mismatches[0].text


async def test_lease_on_an_entry_that_was_deleted_is_named(
    look: Look, queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    await queue.enqueue(new())
    lease = make_worker().read(1)[0]
    client.xdel(STREAM, lease.entry)
    assert codes(look()) == [(Code.LINGERS, ""), (Code.STUCK, lease.job_id)]


@pytest.mark.parametrize("how", ["list", "ring", "entry", "lease"])
async def test_job_that_no_worker_will_be_given_is_stuck(
    look: Look, queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis, how: str
) -> None:
    worker = make_worker("w1", max_batch=2)  # two are dealt, one waits
    jobs = [new(tenant="t1") for _ in range(3)]
    for job in jobs:
        await queue.enqueue(job)
    if how == "list":
        client.lpop(f"{PREFIX}:t:normal:t1")
        client.delete(f"{PREFIX}:turns:normal")
    elif how == "ring":
        client.delete(f"{PREFIX}:turns:normal")
    else:
        lease = worker.read(2)[1]
        if how == "entry":
            client.xack(STREAM, "w", lease.entry)
            client.xdel(STREAM, lease.entry)
        else:
            client.xack(STREAM, "w", lease.entry)
    stuck = jobs[1] if how in ("entry", "lease") else jobs[2]
    assert codes(look()) == [(Code.STUCK, stuck.id)]


async def test_running_job_whose_lease_is_gone_is_stuck(
    look: Look, queue: JobQueue, new: NewJob, make_worker: MakeWorker, client: redis.Redis
) -> None:
    job = new()
    await queue.enqueue(job)
    start_one(make_worker("w1"))
    client.xgroup_delconsumer(STREAM, "w", "w1")
    assert codes(look()) == [(Code.STUCK, job.id)]


@pytest.mark.parametrize("key", ["live", "n:normal", "f:public"])
async def test_unfinished_job_that_is_not_counted_is_named(
    look: Look, queue: JobQueue, new: NewJob, client: redis.Redis, key: str
) -> None:
    job = new()
    await queue.enqueue(job)
    client.zrem(f"{PREFIX}:{key}", job.id)
    assert codes(look()) == [(Code.UNCOUNTED, job.id)]


async def test_job_started_too_often_is_named(look: Look, finish: Callable, client: redis.Redis) -> None:
    job = await finish()
    client.hset(f"{PREFIX}:j:{job.id}", "attempt", 4)
    assert codes(look()) == [(Code.ATTEMPTS, job.id)]


async def test_idempotency_key_that_points_nowhere_is_named(
    look: Look, queue: JobQueue, new: NewJob, client: redis.Redis, clock: Clock
) -> None:
    await queue.enqueue(new(), idempotency_key="k")
    (key,) = client.keys(f"{PREFIX}:i:*")
    client.set(key, f"{new_job_id('image', MODEL, clock.now_ms)}|0")
    assert codes(look()) == [(Code.DANGLING_KEY, key)]


async def test_dead_letter_of_a_job_that_did_not_fail_is_named(
    look: Look, finish: Callable, new: NewJob, client: redis.Redis
) -> None:
    done, unknown = await finish(), new()
    for job in (done, unknown):
        client.xadd(f"{PREFIX}:dead", {"id": job.id})
    assert codes(look()) == sorted((Code.DEAD_LETTER, job.id) for job in (done, unknown))


# on a live system


async def test_audits_of_a_busy_queue_find_nothing(
    look: Look, redis_url: str, new: NewJob, make_worker: MakeWorker, store: ResultStore
) -> None:
    queue = JobQueue(redis_url, max_waiting=1000)
    workers = [make_worker(f"w{i}", max_batch=4) for i in range(3)]
    stop = asyncio.Event()
    accepted: list[str] = []

    def work(worker: WorkerQueue) -> None:
        for started in worker.start(worker.read(4, block_ms=20)):
            if started.job:
                worker.complete(started.job, [put(store, started.job)], {})

    async def serve(worker: WorkerQueue) -> None:
        while not stop.is_set():
            await asyncio.to_thread(work, worker)

    async def submit() -> None:
        while not stop.is_set():
            job = new(tenant=f"t{len(accepted) % 5}")
            result = await queue.enqueue(job, idempotency_key=job.id)
            accepted.extend([job.id] if result.job_id else [])

    busy = [asyncio.create_task(serve(worker)) for worker in workers] + [asyncio.create_task(submit())]
    reports = []
    for _ in range(5):
        held = list(accepted)
        reports.append(await asyncio.to_thread(look, accepted=held, wait=lambda: time.sleep(0.2)))
    stop.set()
    await asyncio.gather(*busy)
    assert [report.mismatches + report.leftovers for report in reports] == [()] * 5
    assert reports[-1].counts["done"] > 0
    await queue.close()


# the command


@pytest.fixture
def command(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    monkeypatch.setenv("TDM_REDIS_URL", redis_url)
    monkeypatch.setenv("TDM_STORE_URL", (tmp_path / "results").as_uri())

    def run(*args: str) -> tuple[int, str, str]:
        status = main(["audit", *args])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


async def test_command_tells_by_its_exit_status(
    command: Callable, finish: Callable, store: ResultStore, tmp_path: Path
) -> None:
    job = await finish()
    ids = tmp_path / "accepted.txt"
    ids.write_text(f"{job.id}\n\n")
    status, out, err = command("--accepted", str(ids), "--settled")
    assert (status, err) == (0, "")
    assert "no mismatch" in out
    store.delete(job.outputs[0].key)
    status, out, _ = command("--accepted", str(ids))
    assert status == 1
    assert job.id in out
    assert "missing" in out


async def test_command_prints_json(
    command: Callable, finish: Callable, store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await finish()
    store.put(f"{job.id}/2-0.png", DATA, "image/png")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{job.id}\n"))
    status, out, _ = command("--accepted", "-", "--json")
    report = json.loads(out)
    assert (status, report["clean"], report["counts"]["done"]) == (0, True, 1)
    assert [(found["code"], found["object"]) for found in report["leftovers"]] == [
        ("twice", f"{job.id}/2-0.png")
    ]
    assert command("--strict")[0] == 1


def test_command_says_in_one_line_that_it_cannot_look(
    command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, out, err = command("--accepted", str(tmp_path / "nothing"))
    assert (status, out, err.count("\n")) == (2, "", 1)
    monkeypatch.setenv("TDM_REDIS_URL", f"unix://{tmp_path}/no.sock")
    status, out, err = command()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no.sock" in err
    monkeypatch.setenv("TDM_REDIS_URL", "")
    monkeypatch.setenv("TDM_DATA_DIR", str(tmp_path / "data"))
    status, out, err = command()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no Valkey runs in" in err
