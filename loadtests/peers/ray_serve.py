"""Ray Serve with `@serve.batch`, around the student in a diffusers pipeline or around our own engine.

It answers the same route in the same wire format as ours, from the same student, so that one client measures
all. Like LitServe it keeps what it has accepted in memory.

    python -m loadtests.peers.ray_serve STUDENT --port 8001 --batch 8     a diffusers pipeline
    python -m loadtests.peers.ray_serve BUNDLE --port 8001 --batch 16     our `Pipeline`
"""

import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import ray  # type: ignore[import-not-found]  # installed for the benchmark that compares with it
import torch
from fastapi import FastAPI
from PIL import Image
from ray import serve

from loadtests.peers.diffusers_lock import ImageRequest, png_base64
from loadtests.peers.engines import load_engine, read_arguments

WAIT_S = 0.005
"""For more requests, while a batch is not full."""

app = FastAPI()


@serve.deployment(max_ongoing_requests=256)
@serve.ingress(app)
class Pictures:
    """The route, batched, in each replica."""

    def __init__(self, directory: str, max_batch: int) -> None:
        """Load, and draw something, so that the first request finds everything warm."""
        torch.set_num_threads(1)
        self._engine = load_engine(Path(directory))
        self._engine.draw(["a red sphere"], [0])
        self._draw.set_max_batch_size(max_batch)

    @serve.batch(max_batch_size=8, batch_wait_timeout_s=WAIT_S)  # type: ignore[untyped-decorator]
    async def _draw(self, requests: list[ImageRequest]) -> list[Image.Image]:
        prompts, seeds = zip(*((request.prompt, request.seed) for request in requests), strict=True)
        return self._engine.draw(prompts, seeds)

    @app.get("/readyz")
    def ready(self) -> dict[str, str]:
        """Serve starts its proxy when all replicas are there."""
        return {"status": "ok"}

    @app.post("/v1/images/generations")
    async def generate(self, request: ImageRequest) -> dict[str, Any]:
        """One picture."""
        image = await self._draw(request)
        return {"created": int(time.time()), "data": [{"b64_json": png_base64(image)}]}


def main() -> None:
    """Serve until interrupted."""
    arguments = read_arguments("Ray Serve")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(num_cpus=os.cpu_count(), include_dashboard=False, _temp_dir=folder, configure_logging=False)
        serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
        pictures = Pictures.options(num_replicas=arguments.workers)  # type: ignore[attr-defined]
        serve.run(pictures.bind(str(arguments.directory), arguments.batch), blocking=False)
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
