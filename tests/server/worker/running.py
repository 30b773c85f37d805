"""A worker on a thread, over the real engine of a tiny random student: with a log, a brake and faults."""

import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from engines.bundle.bucket import Bucket
from engines.bundle.stages import Backend
from engines.compile.build import build_bundle, num_pieces
from engines.compile.progress import BuildProgress
from engines.compile.settings import BuildSettings
from engines.runtime.pipeline import BatchRun, Pipeline, Sample
from server.job import Job, JobKind, new_job
from server.metrics import Metrics
from server.queue.clock import system_now_ms
from server.queue.job_queue import JobQueue
from server.settings import WorkerSettings
from server.store import ResultStore
from server.worker.process import serve
from tests.server.conftest import (
    request_of,
)

MODEL = "tiny"
MAX_BATCH = 4
ROW_MS = 10.0
"""What each stage takes, whatever the batch: text, four steps and decode are six of them."""
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


def build(student: Path, out: Path, *, batch_sizes: tuple[int, ...]) -> Path:
    settings = BuildSettings(
        student=student,
        out=out,
        batch_sizes=batch_sizes,
        backends=(Backend.EAGER,),
        num_threads=1,
        num_jobs=1,
        decode_dtype="float32",
        force=False,
        allow_eager=False,
    )
    with BuildProgress(Console(quiet=True), num_pieces(settings)) as progress:
        build_bundle(settings, progress)
    return settings.out


def load(bundle: Path) -> ObservedPipeline:
    pipeline = ObservedPipeline.load(bundle, backend=Backend.EAGER, num_threads=1)
    assert isinstance(pipeline, ObservedPipeline)
    # The tests want batches; whether these pay was measured, and differs from machine to machine.
    flat = [row.model_copy(update={"ms": ROW_MS}) for row in pipeline.manifest.latency]
    pipeline.manifest = pipeline.manifest.model_copy(update={"latency": flat})
    return pipeline


def job_of(prompt: str, *, seed: int = 7, n: int = 1, deadline_s: float = 600, **request: Any) -> Job:
    now_ms = system_now_ms()
    full = request_of(prompt, num_samples=n, seed=seed, **request)
    deadline_ms = now_ms + int(deadline_s * 1000)
    return new_job(
        kind=JobKind.IMAGE,
        model=MODEL,
        request=full,
        now_ms=now_ms,
        deadline_ms=deadline_ms,
        cost_ms=n * 6 * ROW_MS / MAX_BATCH,
    )


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
    """Or has ended: on a slow machine a cancel may be heard a step early, and then it gets no further."""
    seen = await queue.get(job.id)
    return seen is not None and (seen.progress >= percent or seen.finished)


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
