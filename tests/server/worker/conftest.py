"""Workers over one tiny bundle, which is built once."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from server.queue.connection import connect
from server.queue.job_queue import JobQueue
from server.settings import WorkerSettings
from server.store import ResultStore
from tests.server.worker.running import MAX_BATCH, ObservedPipeline, RunningWorker, build, load
from tests.shared import make_tiny_checkpoint, make_tiny_cogvideox


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eager bundle of the tiny student."""
    folder = tmp_path_factory.mktemp("bundle")
    return build(make_tiny_checkpoint(folder / "student"), folder / "bundle", batch_sizes=(1, 2, MAX_BATCH))


@pytest.fixture(scope="session")
def video_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a student that draws clips of 9 frames, 32x32, 8 a second."""
    folder = tmp_path_factory.mktemp("video-bundle")
    return build(make_tiny_cogvideox(folder / "student"), folder / "bundle", batch_sizes=(1, 2))


@pytest.fixture(scope="session")
def loaded_pipeline(bundle: Path) -> ObservedPipeline:
    return load(bundle)


@pytest.fixture(scope="session")
def loaded_video_pipeline(video_bundle: Path) -> ObservedPipeline:
    return load(video_bundle)


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
        redis_url=url,
        bundle=bundle,
        backend="eager",
        num_threads=1,
        store_url=(tmp_path / "results").as_uri(),
        lease_s=60.0,
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
