"""LitServe with dynamic batching, around the student in a diffusers pipeline or around our own engine.

It answers the same route in the same wire format as ours, from the same student, so that one client measures
all. Its queue lives in memory: what it has accepted is lost with its process, and nobody learns how long a
request will take. What is measured is what it costs to promise more.

    python -m loadtests.peers.litserve_batches STUDENT --port 8001 --batch 8     a diffusers pipeline
    python -m loadtests.peers.litserve_batches BUNDLE --port 8001 --batch 16     our `Pipeline`
"""

import time
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-not-found]  # installed for the benchmark that compares with it
import torch
from PIL import Image

from loadtests.peers.diffusers_lock import png_base64
from loadtests.peers.engines import load_engine, read_arguments

WAIT_S = 0.005
"""For more requests, while a batch is not full."""


class Pictures(litserve.LitAPI):
    """The route, batched."""

    def __init__(self, directory: Path, max_batch: int) -> None:
        super().__init__(max_batch_size=max_batch, batch_timeout=WAIT_S, api_path="/v1/images/generations")
        self._directory = directory

    def setup(self, device: str) -> None:  # noqa: ARG002 (LitServe's signature)
        """Load, in each worker, and draw something, so that the first request finds everything warm."""
        torch.set_num_threads(1)
        self._engine = load_engine(self._directory)
        self._engine.draw(["a red sphere"], [0])

    def decode_request(self, request: dict[str, Any]) -> tuple[str, int]:
        """Prompt and seed."""
        return request["prompt"], request.get("seed", 0)

    def predict(self, asked: Any) -> list[Image.Image]:
        """A picture of each request: a list of them, or one alone where batches hold one."""
        prompts, seeds = zip(*(asked if isinstance(asked, list) else [asked]), strict=True)
        return self._engine.draw(prompts, seeds)

    def unbatch(self, output: list[Image.Image]) -> list[Image.Image]:
        """They are in a list already."""
        return output

    def encode_response(self, output: Image.Image) -> dict[str, Any]:
        """The wire format."""
        return {"created": int(time.time()), "data": [{"b64_json": png_base64(output)}]}


def main() -> None:
    """Serve until interrupted."""
    arguments = read_arguments("LitServe")
    server = litserve.LitServer(
        Pictures(arguments.directory, arguments.batch),
        accelerator="cpu",
        workers_per_device=arguments.workers,
        healthcheck_path="/readyz",
        timeout=False,
    )
    server.run(
        host="127.0.0.1",
        port=arguments.port,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main()
