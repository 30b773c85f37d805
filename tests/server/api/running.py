"""An api process without its process, and a worker that the test plays by hand."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image

from engines.bundle.manifest import Manifest
from server.api.app import create_app
from server.api.dependencies import Services
from server.job import UNMEASURED_MS, Job, JobError, OutputRef, Variant, sample_seed
from server.queue.connection import connect
from server.queue.records import WorkerInfo
from server.queue.worker_queue import Lease, Settled, WorkerQueue
from server.settings import Settings
from server.store import ResultStore
from server.worker.packing import Provenance, pack, prompt_hash
from tests.server.conftest import poll
from tests.server.manifests import make_manifest

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
TIMING = {
    "queue": 5.0,
    "batch_wait": 1.0,
    "encode": 2.0,
    "denoise": 30.0,
    "decode": 8.0,
    "pack": 3.0,
    "store": 1.0,
}

PATIENCE_S = 120.0


class Worker:
    """A worker that the test plays by hand."""

    def __init__(
        self, url: str, store: ResultStore, *, model: str = "scenes", manifest: Manifest | None = None
    ) -> None:
        self.manifest = manifest or make_manifest(model)
        model = self.manifest.name
        self.queue = WorkerQueue(url, model=model, version="0123456789ab", consumer="by-hand")
        self.redis = connect(url)
        self.store = store
        self.info = WorkerInfo(
            id="by-hand",
            model=model,
            kind=self.manifest.kind,
            version="0123456789ab",
            backend="eager",
            max_batch=8,
            batch_ms=8 * UNMEASURED_MS,
            pid=1,
            host="here",
            started_ms=1_700_000_000_000,
            warnings=("runs eager",),
        )
        self.settled: Settled | None = None  # what became of the last result
        self.makes_previews = True

    def announce(self) -> None:
        self.queue.beat(self.info, self.manifest.model_dump_json())

    def jobs(self) -> list[Job]:
        """Every job that Redis knows."""
        keys: Any = self.redis.keys(f"q:2:{{{self.queue.model}}}:j:*")
        ids = [key.rpartition(":")[2] for key in keys]
        found, _ = self.queue.look([Lease("", job_id) for job_id in ids])
        return [job for job in found if isinstance(job, Job)]

    def wait_for_jobs(self) -> None:
        """Return once there is one."""
        poll(self.jobs)

    def start(self) -> tuple[Lease, Job]:
        """Lease the next job, waiting for it, and start it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (leases := self.queue.read(1, block_ms=1000)):
            assert time.monotonic() < deadline, "no job comes"
        started = self.queue.start(leases)[0]
        assert started.job is not None, started.dropped
        return leases[0], started.job

    def finish(self, job: Job) -> Job:
        """Store a plain picture for each sample, or a plain video, and complete the job."""
        request, bucket = job.request, job.request.bucket
        if job.kind == "video":
            return self._finish_video(job)
        outputs = []
        for index in range(request.num_samples):
            packed = io.BytesIO()
            image = Image.new("RGB", (bucket.width, bucket.height), (255, 40 * index, 0))
            image.save(packed, request.output_format)
            key = f"results/{job.id}/{job.attempt}-{index}.{request.output_format}"
            media_type = MEDIA_TYPES[request.output_format]
            self.store.put(key, packed.getvalue(), media_type)
            outputs.append(
                OutputRef(
                    key=key,
                    content_type=media_type,
                    size_bytes=len(packed.getvalue()),
                    width=bucket.width,
                    height=bucket.height,
                    frames=1,
                    seed=sample_seed(request.seed, index),
                )
            )
        self.settled = self.queue.complete(job, outputs, TIMING)
        return job

    def _finish_video(self, job: Job) -> Job:
        request, bucket = job.request, job.request.bucket
        frames = np.full((bucket.frames, bucket.height, bucket.width, 3), 90, np.uint8)
        provenance = Provenance(
            model=job.model,
            version="0123456789ab",
            seed=request.seed,
            num_steps=request.num_steps,
            prompt_sha256=prompt_hash(request.prompt),
        )
        packed = pack(frames, request.output_format, provenance, fps=request.fps)
        outputs = []
        for variant, file in {Variant.SAMPLE: packed, **packed.previews}.items():
            key = f"{job.id}/{job.attempt}-{variant}.{file.suffix}"
            self.store.put(key, file.data, file.content_type)
            outputs.append(
                OutputRef(
                    key=key,
                    content_type=file.content_type,
                    size_bytes=len(file.data),
                    width=file.width,
                    height=file.height,
                    frames=bucket.frames if variant is Variant.SAMPLE else 1,
                    seed=request.seed,
                    variant=variant,
                )
            )
        self.settled = self.queue.complete(job, outputs if self.makes_previews else outputs[:1], TIMING)
        return job

    def draw(self) -> Job:
        """The next job, from lease to result."""
        return self.finish(self.start()[1])

    def fail(self, code: str) -> Job:
        """The next job, failed."""
        _, job = self.start()
        self.queue.fail(job, JobError(code=code, message="the reason"), {})
        return job


@dataclass
class Api:
    """One api process without its process."""

    client: httpx.AsyncClient
    services: Services
    worker: Worker
    app: Any

    async def post(self, body: Mapping[str, Any] | None = None, **options: Any) -> httpx.Response:
        return await self.client.post("/v1/images", json={"prompt": "a red cube", **(body or {})}, **options)

    async def draw(self, body: Mapping[str, Any] | None = None, **options: Any) -> httpx.Response:
        """Post a request and draw what it asks for."""
        response, _ = await asyncio.gather(self.post(body, **options), asyncio.to_thread(self.worker.draw))
        return response


@asynccontextmanager
async def running_api(settings: Settings) -> AsyncIterator[Api]:
    app = create_app(settings)
    worker = Worker(settings.redis_url, ResultStore(settings.results_url))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://server") as client,
    ):
        yield Api(client=client, services=app.state.services, worker=worker, app=app)
    worker.queue.close()
    worker.redis.close()


def error_of(response: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and param of an error response, its shape checked."""
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "code", "param"}
    assert body["error"]["message"]
    assert body["error"]["type"].endswith("_error")
    return response.status_code, body["error"]["code"], body["error"]["param"]
