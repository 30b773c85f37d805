"""The worker over a real engine: what it draws, what it survives, and what it leaves when it ends.

The engine is the real pipeline over a tiny random student; `ObservedPipeline` adds a log, a brake and faults.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from engines.bucket import Bucket
from engines.compile.build import BuildSettings, build_bundle, num_pieces
from engines.compile.progress import BuildProgress
from engines.errors import BundleError
from engines.runtime.pipeline import BatchRun, Pipeline, Sample
from engines.signature import read_key, sign_bundle
from server.job import Job, JobKind, JobStatus, new_job
from server.metrics import Metrics
from server.queue.connection import connect, system_now_ms
from server.queue.errors import QueueError
from server.queue.job_queue import JobQueue
from server.queue.keys import stream_of
from server.queue.records import UnreadableJobError
from server.queue.worker_queue import Lease, WorkerQueue
from server.settings import WorkerSettings
from server.store import ResultStore
from server.supervisor.valkey import EmbeddedValkey
from server.worker.batcher import Batcher
from server.worker.heartbeat import Heartbeat
from server.worker.packing import Provenance, prompt_hash, read_provenance
from server.worker.process import EXIT_ENGINE_LOST, EXIT_OK, load_pipeline, serve
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox
from tests.server.conftest import (
    VERSION,
    let_leases_lapse,
    poll,
    poll_async,
    request_of,
    worker_info,
)

MODEL = "tiny"
MAX_BATCH = 4
ROOT = Path(__file__).resolve().parents[3]


class ObservedPipeline(Pipeline):
    """The real pipeline; notes each batch, waits before each step while braked, and fails where told."""

    def reset(self) -> None:
        self.batches: list[list[str]] = []
        self.braked = False
        self.permits = threading.Semaphore(0)
        self.fits = MAX_BATCH
        self.error: Exception | None = None

    def allow(self, num_steps: int) -> None:
        """Let a braked engine make this many steps."""
        self.permits.release(num_steps)

    def release(self) -> None:
        self.braked = False
        self.permits.release(1000)

    def prepare(self, samples: Sequence[Sample]) -> BatchRun:
        prompts = [sample.prompt for sample in samples]
        self.batches.append(prompts)
        if len(samples) > self.fits:
            raise MemoryError(f"{len(samples)} samples")
        if "boom" in prompts:
            raise self.error or RuntimeError("kaboom")
        return super().prepare(samples)

    def step(self, run: BatchRun) -> None:
        if self.braked:
            self.permits.acquire()
        super().step(run)


class RunningWorker:
    """A worker's `serve` on a thread of the test."""

    def __init__(self, settings: WorkerSettings, pipeline: ObservedPipeline) -> None:
        self.metrics = Metrics()
        self.pipeline = pipeline
        self.stopping = threading.Event()
        self.exit_status: int | None = None
        self._settings = settings
        self._thread = threading.Thread(target=self._serve, name="worker under test")
        self._thread.start()

    def _serve(self) -> None:
        self.exit_status = serve(self._settings, self.pipeline, self.metrics, self.stopping)

    def join(self) -> int | None:
        """Its exit status, once it has ended."""
        self._thread.join(120)
        assert not self._thread.is_alive(), "the worker does not end"
        return self.exit_status

    def stop(self) -> None:
        self.stopping.set()
        self.pipeline.release()
        self.join()

    def metric(self, name: str, **labels: str) -> float:
        """Value of one sample of a metric."""
        labels = {"class": self.pipeline.manifest.name, **labels}
        return self.metrics.registry.get_sample_value(f"tdm_{name}", labels) or 0.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eager bundle of the tiny student."""
    folder = tmp_path_factory.mktemp("bundle")
    return build(make_tiny_checkpoint(folder / "student"), folder / "bundle", batch_sizes=(1, 2, MAX_BATCH))


@pytest.fixture(scope="module")
def video_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a student that draws clips of 9 frames, 32x32, 8 a second."""
    folder = tmp_path_factory.mktemp("video-bundle")
    return build(make_tiny_cogvideox(folder / "student"), folder / "bundle", batch_sizes=(1, 2))


def build(student: Path, out: Path, *, batch_sizes: tuple[int, ...]) -> Path:
    settings = BuildSettings(
        student=student,
        out=out,
        batch_sizes=batch_sizes,
        backends=("eager",),
        num_threads=1,
        num_jobs=1,
        decode_dtype="float32",
        force=False,
        allow_eager=False,
    )
    with BuildProgress(Console(quiet=True), num_pieces(settings)) as progress:
        build_bundle(settings, progress)
    return settings.out


@pytest.fixture(scope="module")
def loaded_pipeline(bundle: Path) -> ObservedPipeline:
    return load(bundle)


@pytest.fixture(scope="module")
def loaded_video_pipeline(video_bundle: Path) -> ObservedPipeline:
    return load(video_bundle)


def load(bundle: Path) -> ObservedPipeline:
    pipeline = ObservedPipeline.load(bundle, backend="eager", num_threads=1)
    assert isinstance(pipeline, ObservedPipeline)
    # The tests want batches; whether these pay was measured, and differs from machine to machine.
    flat = [row.model_copy(update={"ms": 10.0}) for row in pipeline.manifest.latency]
    pipeline.manifest = pipeline.manifest.model_copy(update={"latency": flat})
    return pipeline


@pytest.fixture
def pipeline(loaded_pipeline: ObservedPipeline) -> ObservedPipeline:
    loaded_pipeline.reset()
    return loaded_pipeline


@pytest.fixture
def video_worker(
    settings: WorkerSettings, video_bundle: Path, loaded_video_pipeline: ObservedPipeline
) -> Iterator[RunningWorker]:
    """A worker that serves the model for clips."""
    loaded_video_pipeline.reset()
    worker = RunningWorker(replace(settings, bundle=video_bundle), loaded_video_pipeline)
    yield worker
    worker.stop()


@pytest.fixture
def url(valkey_url: str) -> str:
    client = connect(valkey_url)
    client.flushall()
    client.close()
    return valkey_url


@pytest.fixture
async def queue(url: str) -> AsyncIterator[JobQueue]:
    queue = JobQueue(url)
    yield queue
    await queue.close()


@pytest.fixture
def settings(url: str, bundle: Path, tmp_path: Path) -> WorkerSettings:
    return WorkerSettings(
        expires=True,
        redis_url=url,
        bundle=bundle,
        backend="eager",
        num_threads=1,
        store_url=(tmp_path / "results").as_uri(),
        lease_s=60.0,
        result_ttl_s=3600,
        host="127.0.0.1",
        metrics_port=0,
        log_level="info",
    )


@pytest.fixture
def store(settings: WorkerSettings) -> ResultStore:
    return ResultStore(settings.store_url)


@pytest.fixture
def start_worker(
    settings: WorkerSettings, pipeline: ObservedPipeline
) -> Iterator[Callable[[], RunningWorker]]:
    workers: list[RunningWorker] = []

    def start() -> RunningWorker:
        workers.append(RunningWorker(settings, pipeline))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


def job_of(prompt: str, *, seed: int = 7, n: int = 1, deadline_s: float = 600, **request: Any) -> Job:
    now_ms = system_now_ms()
    full = request_of(prompt, num_samples=n, seed=seed, **request)
    deadline_ms = now_ms + int(deadline_s * 1000)
    return new_job(kind=JobKind.IMAGE, model=MODEL, request=full, now_ms=now_ms, deadline_ms=deadline_ms)


def clip_of(prompt: str, *, seed: int = 7, num_steps: int = 4) -> Job:
    clip = Bucket(32, 32, 9)
    request = request_of(prompt, bucket=clip, seed=seed, num_steps=num_steps, output_format="mp4", fps=8)
    now_ms = system_now_ms()
    return new_job(
        kind=JobKind.VIDEO,
        model="tiny-cogvideox",
        request=request,
        now_ms=now_ms,
        deadline_ms=now_ms + 600_000,
    )


async def enqueue(queue: JobQueue, *jobs: Job) -> None:
    for job in jobs:
        assert (await queue.enqueue(job)).job_id == job.id


async def ended(queue: JobQueue, job: Job) -> Job:
    end = await queue.wait(job.id, 120)
    assert end is not None
    assert end.finished, f"still {end.status}"
    return end


async def is_running(queue: JobQueue) -> bool:
    return (await queue.stats(MODEL)).running > 0


async def has_progressed(queue: JobQueue, job: Job, percent: int) -> bool:
    seen = await queue.get(job.id)
    return seen is not None and seen.progress >= percent


def code_of(job: Job) -> str:
    assert job.error is not None
    return job.error.code


def pixels_of(store: ResultStore, job: Job, index: int = 0) -> NDArray[np.int16]:
    assert job.outputs, f"{job.status} {job.error}"
    with Image.open(io.BytesIO(store.get(job.outputs[index].key))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def frames_of(data: bytes) -> NDArray[np.uint8]:
    """(F, H, W, 3) of an MP4 file."""
    with av.open(io.BytesIO(data), "r") as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def distance(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Mean difference of luma (BT.709), of 255."""
    difference = (one.astype(int) - other) @ np.array([0.2126, 0.7152, 0.0722])
    return float(np.abs(difference).mean())


def files_of(settings: WorkerSettings) -> list[str]:
    root = Path(settings.store_url.removeprefix("file://"))
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


# what it draws


async def test_finished_job_has_its_pictures_and_says_how_long_each_stage_took(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], store: ResultStore, pipeline: ObservedPipeline
) -> None:
    job = job_of("a red cube", seed=2**63 - 1, n=2, num_steps=2)
    await enqueue(queue, job)
    worker = start_worker()
    done = await ended(queue, job)
    assert (done.status, done.progress, done.attempt) == (JobStatus.DONE, 100, 1)
    assert set(done.timing) == {"queue", "batch_wait", "encode", "denoise", "decode", "pack", "store"}
    assert [(ref.key, ref.seed) for ref in done.outputs] == [
        (f"{job.id}/1-0.png", 2**63 - 1),
        (f"{job.id}/1-1.png", 0),
    ]
    for ref in done.outputs:
        data = store.get(ref.key)
        assert (ref.size_bytes, ref.content_type, ref.frames) == (len(data), "image/png", 1)
        assert read_provenance(data) == Provenance(
            model=MODEL,
            version=pipeline.manifest.version,
            seed=ref.seed,
            num_steps=2,
            prompt_sha256=prompt_hash("a red cube"),
        )
    assert pixels_of(store, done).shape == (64, 64, 3)
    worker.stop()
    assert worker.metric("jobs_total", kind="image", outcome="done") == 1
    assert worker.metric("images_total") == 2
    assert worker.metric("job_stage_seconds_count", kind="image", stage="denoise") == 1


async def test_clips_are_drawn_as_mp4_files_of_their_frames(
    queue: JobQueue, video_worker: RunningWorker, store: ResultStore
) -> None:
    jobs = [clip_of("a red cube"), clip_of("a blue cone", seed=8, num_steps=2), clip_of("a red cube")]
    await enqueue(queue, *jobs)
    first, other, again = [await ended(queue, job) for job in jobs]

    assert {end.status for end in (first, other, again)} == {JobStatus.DONE}
    assert set(first.timing) == {"queue", "batch_wait", "encode", "denoise", "decode", "pack", "store"}
    (ref,) = first.outputs
    data = store.get(ref.key)
    assert (ref.key, ref.content_type, ref.size_bytes) == (f"{first.id}/1-0.mp4", "video/mp4", len(data))
    assert (ref.width, ref.height, ref.frames, ref.seed) == (32, 32, 9, 7)
    pipeline = video_worker.pipeline
    assert read_provenance(data) == Provenance(
        model="tiny-cogvideox",
        version=pipeline.manifest.version,
        seed=7,
        num_steps=4,
        prompt_sha256=prompt_hash("a red cube"),
    )
    sample = Sample(prompt="a red cube", seed=7, num_steps=4, bucket=Bucket(32, 32, 9))
    (drawn,) = pipeline.run([sample])
    clip = frames_of(data)
    assert clip.shape == (9, 32, 32, 3)
    # A random student's clip is noise, which H.264 keeps least of all, and its chroma hardly.
    assert distance(clip, drawn) < 6
    assert distance(clip, frames_of(store.get(again.outputs[0].key))) < 1
    assert distance(clip, frames_of(store.get(other.outputs[0].key))) > 12
    video_worker.stop()
    assert video_worker.metric("jobs_total", kind="video", outcome="done") == 3
    assert video_worker.metric("video_frames_total") == 27


async def test_running_clip_tells_its_progress_and_stops_when_it_is_deleted(
    queue: JobQueue, video_worker: RunningWorker, settings: WorkerSettings
) -> None:
    pipeline = video_worker.pipeline
    pipeline.braked = True
    deleted, neighbour = clip_of("deleted"), clip_of("neighbour")
    await enqueue(queue, deleted, neighbour)
    poll(lambda: pipeline.batches)
    pipeline.allow(1)
    await poll_async(lambda: has_progressed(queue, deleted, 25))
    await queue.delete(deleted.id)
    pipeline.allow(1)
    await poll_async(lambda: has_progressed(queue, deleted, 50))  # the same heartbeat hears of it
    pipeline.release()

    end = await ended(queue, deleted)
    assert (end.status, code_of(end), end.outputs) == (JobStatus.CANCELLED, "cancelled", ())
    assert (await ended(queue, neighbour)).status is JobStatus.DONE
    assert [name.partition("/")[0] for name in files_of(settings)] == [neighbour.id]


async def test_job_of_more_samples_than_a_batch_holds_is_drawn_in_several(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline, store: ResultStore
) -> None:
    job = job_of("a red cube", n=10, num_steps=1)
    await enqueue(queue, job)
    start_worker()
    done = await ended(queue, job)
    assert [ref.seed for ref in done.outputs] == list(range(7, 17))
    assert sum(len(batch) for batch in pipeline.batches) == 10
    assert len(pipeline.batches) >= 3
    first, second = pixels_of(store, done, 0), pixels_of(store, done, 9)
    assert np.abs(first - second).max() > 0


async def test_same_seed_gives_the_same_picture_whatever_the_batch(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline, store: ResultStore
) -> None:
    pipeline.braked = True
    alone = job_of("a blue cone", seed=11)
    await enqueue(queue, alone)
    start_worker()
    poll(lambda: pipeline.batches)
    company = [
        job_of("a green sphere", seed=5, num_steps=2),
        job_of("a blue cone", seed=11),
        job_of("a cube", n=2),
    ]
    await enqueue(queue, *company)
    pipeline.release()
    first = await ended(queue, alone)
    others = [await ended(queue, job) for job in company]
    assert pipeline.batches[0] == ["a blue cone"]
    assert max(len(batch) for batch in pipeline.batches) > 1
    assert np.abs(pixels_of(store, first) - pixels_of(store, others[1])).max() <= 1
    assert np.abs(pixels_of(store, first) - pixels_of(store, others[0])).max() > 1


# what it survives


async def test_request_that_breaks_the_engine_fails_alone(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    jobs = [job_of(prompt) for prompt in ("a", "boom", "b", "c")]
    await enqueue(queue, *jobs)
    start_worker()
    ends = [await ended(queue, job) for job in jobs]
    assert [end.status for end in ends] == [JobStatus.DONE, JobStatus.FAILED, JobStatus.DONE, JobStatus.DONE]
    assert code_of(ends[1]) == "generation_failed"
    assert ["boom"] in pipeline.batches


async def test_batch_that_does_not_fit_is_split_and_the_next_ones_are_smaller(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.fits = 2
    jobs = [job_of(str(i), num_steps=1, n=MAX_BATCH) for i in range(3)]
    await enqueue(queue, *jobs)
    worker = start_worker()
    ends = [await ended(queue, job) for job in jobs]
    assert [end.status for end in ends] == [JobStatus.DONE] * 3
    sizes = [len(batch) for batch in pipeline.batches]
    assert max(sizes) > 2
    assert max(sizes[sizes.index(max(sizes)) + 1 :]) == 2
    assert worker.metrics.registry.get_sample_value("tdm_gpu_oom_total", {"gpu": "cpu"}) == 1


async def test_sample_that_does_not_fit_by_itself_fails_with_that_reason(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.fits = 0
    job = job_of("a", n=2)
    await enqueue(queue, job)
    start_worker()
    assert code_of(await ended(queue, job)) == "out_of_memory"


async def test_request_that_cannot_be_read_fails_and_the_next_is_served(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], settings: WorkerSettings
) -> None:
    broken, fine = job_of("a"), job_of("b")
    await enqueue(queue, broken, fine)
    client = connect(settings.redis_url)
    key = f"q:{{{broken.model}}}:j:{broken.id}"
    client.hset(key, "req", str(client.hget(key, "req")).replace('"height":64', '"height":"tall"'))
    start_worker()
    assert (await ended(queue, fine)).status is JobStatus.DONE
    poll(lambda: client.hget(key, "st") == "failed")
    error = json.loads(str(client.hget(key, "err")))
    assert error["code"] == "invalid_request"
    assert "tall" in error["message"]
    client.close()


async def test_record_of_another_version_fails_that_job_and_the_next_is_served(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], settings: WorkerSettings
) -> None:
    strange, fine = job_of("a"), job_of("b")
    await enqueue(queue, strange, fine)
    client = connect(settings.redis_url)
    key = f"q:{{{strange.model}}}:j:{strange.id}"
    client.hset(key, "pr", "urgent")  # a priority that some newer api knows
    start_worker()
    assert (await ended(queue, fine)).status is JobStatus.DONE
    poll(lambda: client.hget(key, "st") == "failed")
    assert "urgent" in str(client.hget(key, "err"))
    client.close()


async def test_size_that_the_bundle_does_not_have_fails_alone(
    queue: JobQueue, start_worker: Callable[[], RunningWorker]
) -> None:
    wide, fine = job_of("a", bucket=Bucket(64, 512)), job_of("b")
    await enqueue(queue, wide, fine)
    start_worker()
    assert code_of(await ended(queue, wide)) == "generation_failed"
    assert (await ended(queue, fine)).status is JobStatus.DONE


async def die_over(queue: JobQueue, url: str, version: str, *jobs: Job) -> None:
    """Enqueue jobs and start them as a worker that then dies; their leases have lapsed."""
    await enqueue(queue, *jobs)
    dead = WorkerQueue(url, model=MODEL, version=version, consumer="dead")
    dead.beat(worker_info("dead", version=version), "{}")
    assert all(started.job is not None for started in dead.start(dead.read(len(jobs))))
    dead.close()
    client = connect(url)
    let_leases_lapse(client, stream=stream_of(MODEL, version), idle_ms=120_000)
    client.close()


async def test_retried_job_runs_alone(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline, url: str
) -> None:
    suspect = job_of("suspect")
    await die_over(queue, url, pipeline.manifest.version, suspect)
    innocent = [job_of(str(i)) for i in range(3)]
    await enqueue(queue, *innocent)
    worker = start_worker()
    ends = [await ended(queue, job) for job in (suspect, *innocent)]
    assert [end.attempt for end in ends] == [2, 1, 1, 1]
    assert all(len(batch) == 1 for batch in pipeline.batches if "suspect" in batch)
    worker.stop()
    assert worker.metric("job_redeliveries_total", cause="lease_lapsed") == 1


async def test_retried_job_is_not_started_while_another_is_being_stored(
    queue: JobQueue,
    start_worker: Callable[[], RunningWorker],
    pipeline: ObservedPipeline,
    url: str,
    tmp_path: Path,
) -> None:
    suspects = [job_of("one"), job_of("two")]
    await die_over(queue, url, pipeline.manifest.version, *suspects)
    obstacle = tmp_path / "results"
    obstacle.write_text("a file where the directory should be")
    worker = start_worker()
    tries = ("tdm_storage_op_seconds_count", {"op": "put"})
    poll(lambda: (worker.metrics.registry.get_sample_value(*tries) or 0) >= 3)
    assert len(pipeline.batches) == 1
    assert sorted([job.attempt for job in [await queue.get(job.id) for job in suspects] if job]) == [1, 2]

    obstacle.unlink()
    ends = [await ended(queue, job) for job in suspects]
    assert [(end.status, end.attempt) for end in ends] == [(JobStatus.DONE, 2)] * 2


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
