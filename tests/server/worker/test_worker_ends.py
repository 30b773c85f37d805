"""Jobs that are cancelled or late, stores and Redis that go away, workers that stop or die."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engines.bundle.signature import read_key, sign_bundle
from engines.errors import BundleError
from server.job import Job, JobError, JobStatus
from server.metrics import Metrics
from server.queue.clock import system_now_ms
from server.queue.errors import QueueError
from server.queue.job_queue import JobQueue
from server.queue.records import UnreadableJobError
from server.queue.worker_queue import Lease, WorkerQueue
from server.settings import WorkerSettings
from server.store import ResultStore
from server.supervisor.valkey import EmbeddedValkey
from server.tracing import NO_TRACING
from server.worker.batcher import Batcher
from server.worker.heartbeat import Heartbeat
from server.worker.process import EXIT_ENGINE_LOST, EXIT_OK, load_pipeline
from server.worker.spans import Spans
from tests.server.conftest import (
    VERSION,
    poll,
    poll_async,
    worker_info,
)
from tests.server.worker.running import (
    MODEL,
    ROOT,
    ObservedPipeline,
    RunningWorker,
    code_of,
    ended,
    enqueue,
    files_of,
    has_progressed,
    is_running,
    job_of,
)


async def test_running_job_is_cancelled_between_steps_and_its_neighbour_is_not(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.braked = True
    cancelled, neighbour = job_of("cancelled"), job_of("neighbour")
    await enqueue(queue, cancelled, neighbour)
    start_worker()
    poll(lambda: pipeline.batches)
    assert pipeline.batches == [["cancelled", "neighbour"]]
    await queue.cancel(cancelled.id)
    pipeline.allow(2)
    await poll_async(lambda: has_progressed(queue, cancelled, 50))  # the same heartbeat hears of the cancel
    pipeline.release()
    end = await ended(queue, cancelled)
    assert (end.status, code_of(end), end.outputs) == (JobStatus.CANCELLED, "cancelled", ())
    assert (await ended(queue, neighbour)).status is JobStatus.DONE


async def test_job_whose_deadline_passes_while_it_runs_is_stopped(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.braked = True
    late, timely = job_of("late", deadline_s=3), job_of("timely")
    await enqueue(queue, late, timely)
    start_worker()
    poll(lambda: pipeline.batches)
    poll(lambda: system_now_ms() > late.deadline_ms)
    pipeline.release()
    assert code_of(await ended(queue, late)) == "deadline"
    assert (await ended(queue, timely)).status is JobStatus.DONE


async def test_result_that_cannot_be_stored_fails_as_such_and_leaves_nothing(
    queue: JobQueue, pipeline: ObservedPipeline, settings: WorkerSettings, tmp_path: Path
) -> None:
    (tmp_path / "results").write_text("a file where the directory should be")
    job = job_of("a", n=2)
    await enqueue(queue, job)
    worker = RunningWorker(replace(settings, lease_s=1.0), pipeline)
    end = await ended(queue, job)
    worker.stop()
    assert (code_of(end), end.outputs) == ("storage", ())


async def test_result_that_came_second_is_deleted(
    queue: JobQueue,
    start_worker: Callable[[], RunningWorker],
    pipeline: ObservedPipeline,
    settings: WorkerSettings,
    url: str,
) -> None:
    pipeline.braked = True
    job = job_of("a")
    await enqueue(queue, job)
    worker = start_worker()
    poll(lambda: pipeline.batches)
    faster = WorkerQueue(url, model=MODEL, version=VERSION, consumer="faster")
    running = await queue.get(job.id)
    assert running is not None
    assert faster.complete(running, (), {"denoise": 1.0}) == "ok"
    faster.close()
    worker.stop()
    done = await queue.get(job.id)
    assert done is not None
    assert (done.status, dict(done.timing)) == (JobStatus.DONE, {"denoise": 1.0})
    assert files_of(settings) == []


async def test_worker_outlasts_a_restart_of_redis_and_loses_nothing(
    settings: WorkerSettings, pipeline: ObservedPipeline, tmp_path: Path
) -> None:
    valkey = EmbeddedValkey(tmp_path)
    worker = RunningWorker(replace(settings, redis_url=valkey.start()), pipeline)
    queue = JobQueue(valkey.url)
    pipeline.braked = True
    jobs = [job_of(str(i)) for i in range(6)]
    await enqueue(queue, *jobs)
    poll(lambda: pipeline.batches)
    assert valkey.pid is not None
    os.kill(valkey.pid, signal.SIGKILL)
    poll(lambda: not valkey.alive())
    pipeline.release()  # the batch is finished while Redis is away
    valkey.start()
    ends = [await ended(queue, job) for job in jobs]
    assert [end.status for end in ends] == [JobStatus.DONE] * 6
    assert sorted(prompt for batch in pipeline.batches for prompt in batch) == [str(i) for i in range(6)]
    await queue.close()
    worker.stop()
    valkey.stop()


class ForgetfulQueue(WorkerQueue):
    """Loses the reply to the first look at leased jobs."""

    lost = 0

    def look(self, leases: Sequence[Lease]) -> tuple[list[Job | UnreadableJobError | None], int]:
        if not self.lost:
            self.lost += 1
            raise QueueError("connection reset")
        return super().look(leases)


async def test_jobs_whose_lease_was_taken_just_before_redis_failed_are_drawn(
    queue: JobQueue, url: str
) -> None:
    jobs = [job_of(str(i)) for i in range(3)]
    await enqueue(queue, *jobs)
    worker_queue = ForgetfulQueue(url, model=MODEL, version=VERSION, consumer="forgetful")
    heartbeat = Heartbeat(worker_queue, worker_info("forgetful"), "{}", Metrics(), lease_s=60, stall_s=600)
    worker_queue.beat(worker_info("forgetful"), "{}")
    batcher = Batcher(
        worker_queue,
        heartbeat,
        Metrics(),
        Spans(NO_TRACING, worker_info("forgetful"), (4,)),
        max_batch=4,
        cost_ms=lambda *_: 10.0,
        lease_s=60,
        stopping=threading.Event(),
        settle=lambda: None,
        clock=system_now_ms,
    )
    batch = batcher.next_batch()
    assert batch is not None
    assert [row.leased_job.job.id for row in batch] == [job.id for job in jobs]
    assert worker_queue.lost == 1
    batcher.close()
    worker_queue.close()


async def test_job_that_the_bundle_does_not_draw_ends_as_such_and_its_neighbour_is_drawn(
    queue: JobQueue, url: str
) -> None:
    left, fine = job_of("left over"), job_of("fine")
    await enqueue(queue, left, fine)
    worker_queue = WorkerQueue(url, model=MODEL, version=VERSION, consumer="w")
    worker_queue.beat(worker_info("w"), "{}")
    batcher = Batcher(
        worker_queue,
        Heartbeat(worker_queue, worker_info("w"), "{}", Metrics(), lease_s=60, stall_s=600),
        Metrics(),
        Spans(NO_TRACING, worker_info("w"), (4,)),
        max_batch=4,
        cost_ms=lambda *_: 10.0,
        lease_s=60,
        stopping=threading.Event(),
        settle=lambda: None,
        unserved=lambda request: "no longer drawn" if request.prompt == "left over" else None,
        clock=system_now_ms,
    )
    batch = batcher.next_batch()
    assert batch is not None
    assert [row.leased_job.job.id for row in batch] == [fine.id]
    ended = await queue.get(left.id)
    assert ended is not None
    assert ended.error == JobError(code="not_served", message="no longer drawn")
    batcher.close()
    worker_queue.close()


# what it takes


def test_only_signed_bundles_are_taken_where_a_key_is_set(settings: WorkerSettings, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_bytes(b"k" * 32)
    bundle = shutil.copytree(settings.bundle, tmp_path / "signed")
    settings = replace(settings, bundle=bundle, bundle_key_file=key_file)
    with pytest.raises(BundleError, match=r"^manifest\.sig: is missing"):
        load_pipeline(settings)
    sign_bundle(bundle, read_key(key_file))
    assert load_pipeline(settings).manifest.name == MODEL


# how it ends


async def test_stopping_worker_finishes_its_batch_and_leaves_the_rest_queued(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.braked = True
    jobs = [job_of(str(i)) for i in range(10)]
    await enqueue(queue, *jobs)
    worker = start_worker()
    poll(lambda: pipeline.batches)
    pipeline.allow(3)
    worker.stopping.set()
    pipeline.release()
    assert worker.join() == EXIT_OK
    statuses = {job.request.prompt: job.status for job in [await queue.get(job.id) for job in jobs] if job}
    assert len(pipeline.batches) == 1
    drawn = set(pipeline.batches[0])
    assert {prompt for prompt, status in statuses.items() if status is JobStatus.DONE} == drawn
    assert {status for prompt, status in statuses.items() if prompt not in drawn} == {JobStatus.QUEUED}
    stats = await queue.stats(MODEL)
    assert (stats.workers, stats.running, stats.total_waiting) == ((), 0, 10 - len(drawn))


async def test_stopping_worker_finishes_a_job_that_is_half_drawn(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.braked = True
    job = job_of("a", n=6)
    await enqueue(queue, job)
    worker = start_worker()
    poll(lambda: pipeline.batches)
    worker.stopping.set()
    pipeline.release()
    assert worker.join() == EXIT_OK
    assert len((await ended(queue, job)).outputs) == 6


async def test_lost_device_ends_the_process_and_leaves_its_jobs_to_others(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    job = job_of("boom")
    await enqueue(queue, job)
    worker = start_worker()
    assert worker.join() == EXIT_ENGINE_LOST
    left = await queue.get(job.id)
    assert left is not None
    assert left.status is JobStatus.RUNNING
    assert (await queue.stats(MODEL)).workers == ()


def test_engine_that_hangs_loses_its_leases(url: str, pipeline: ObservedPipeline) -> None:
    queue = WorkerQueue(url, model=MODEL, version=VERSION, consumer="hung")
    stalled = threading.Event()
    heartbeat = Heartbeat(
        queue, worker_info("hung"), "{}", Metrics(), lease_s=0.4, stall_s=0.5, on_stall=stalled.set
    )
    heartbeat.start()
    assert stalled.wait(60)
    heartbeat.close()
    queue.close()


# real processes


@contextmanager
def worker_process(
    settings: WorkerSettings, tmp_path: Path, name: str
) -> Iterator["subprocess.Popen[bytes]"]:
    environment = {
        **os.environ,
        "TDM_REDIS_URL": settings.redis_url,
        "TDM_BUNDLES": str(settings.bundle),
        "TDM_DATA_DIR": str(tmp_path),
        "TDM_STORE_URL": settings.store_url,
        "TDM_METRICS_PORT": "0",
        "TDM_LEASE_S": "4",
        "OMP_NUM_THREADS": "1",
    }
    with (tmp_path / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "worker"], cwd=ROOT, env=environment, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
async def test_killed_worker_loses_nothing_and_terminated_one_leaves_in_order(
    queue: JobQueue, settings: WorkerSettings, store: ResultStore, tmp_path: Path
) -> None:
    with worker_process(settings, tmp_path, "a") as first, worker_process(settings, tmp_path, "b") as second:
        for process in (first, second):
            await live_worker(queue, process)
        jobs = [job_of(str(i), n=2) for i in range(40)]
        await enqueue(queue, *jobs)
        await kill_mid_batch(queue, first, jobs)
        ends = [await ended(queue, job) for job in jobs]
        assert [end.status for end in ends] == [JobStatus.DONE] * 40
        assert max(end.attempt for end in ends) == 2
        assert all(store.exists(ref.key) for end in ends for ref in end.outputs)

        more = [job_of(str(i), n=4) for i in range(40)]
        await enqueue(queue, *more)
        await poll_async(lambda: is_running(queue))
        second.send_signal(signal.SIGTERM)
        assert second.wait(120) == EXIT_OK
    left = [job for job in [await queue.get(job.id) for job in more] if job]
    assert {job.status for job in left} == {JobStatus.DONE, JobStatus.QUEUED}
    assert all(len(job.outputs) == 4 for job in left if job.status is JobStatus.DONE)
    assert (await queue.stats(MODEL)).running == 0


async def live_worker(queue: JobQueue, process: "subprocess.Popen[bytes]") -> None:
    """Return when the process has announced itself."""

    async def announced() -> bool:
        assert process.poll() is None, f"the worker ended with {process.returncode}"
        return process.pid in [worker.pid for worker in (await queue.stats(MODEL)).workers]

    await poll_async(announced, timeout_s=300)


async def kill_mid_batch(queue: JobQueue, process: "subprocess.Popen[bytes]", jobs: Sequence[Job]) -> None:
    """SIGKILL a worker that is running jobs; stopped before we look, so that the moment cannot pass."""
    workers = {worker.pid: worker.id for worker in (await queue.stats(MODEL)).workers}
    while True:
        process.send_signal(signal.SIGSTOP)
        now = [job for job in [await queue.get(job.id) for job in jobs] if job]
        if any(job.status is JobStatus.RUNNING and job.worker == workers[process.pid] for job in now):
            process.kill()
            return
        assert not all(job.finished for job in now), "the jobs were too few"
        process.send_signal(signal.SIGCONT)
