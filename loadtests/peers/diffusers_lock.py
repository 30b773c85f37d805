"""The server that most people write first: one diffusers pipeline behind FastAPI, one picture at a time.

It answers the same route in the same wire format as ours, from the same student directory, so that one client
measures both. It is written well, not as a straw man: inference mode, no guidance pass, PNG encoding outside
the lock, and one thread that always runs the pipeline, since OpenMP keeps a pool of threads for every thread
that calls it.

    python -m loadtests.peers.diffusers_lock STUDENT --port 8001 --threads 2
"""

import argparse
import asyncio
import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers import PixArtAlphaPipeline
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel


class ImageRequest(BaseModel):
    """The part of OpenAI's image request that the benchmark uses."""

    prompt: str
    seed: int = 0
    response_format: str = "b64_json"


class Student:
    """A few-step PixArt student in a plain diffusers pipeline."""

    def __init__(self, directory: Path, num_threads: int) -> None:
        """Load the pipeline and draw one picture, so that the first request finds everything warm."""
        config = json.loads((directory / "student.json").read_text(encoding="utf-8"))
        self.num_threads = num_threads
        self.arguments: dict[str, Any] = {
            "num_inference_steps": config["default_num_steps"],
            "guidance_scale": config["guidance_scale"],
            "height": config["height"],
            "width": config["width"],
            "max_sequence_length": config["max_text_tokens"],
            "use_resolution_binning": False,
            "clean_caption": False,
        }
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.pipeline = PixArtAlphaPipeline.from_pretrained(directory, torch_dtype=dtype).to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.draw("a red sphere", seed=0)

    def draw(self, prompt: str, seed: int) -> Image.Image:
        """Draw one picture."""
        torch.set_num_threads(self.num_threads)
        with torch.inference_mode():
            images = self.pipeline(
                prompt, generator=torch.Generator().manual_seed(seed), **self.arguments
            ).images
        image: Image.Image = images[0]
        return image


def png_base64(image: Image.Image) -> str:
    """Encode a picture as the wire format wants it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def build_app(directory: Path, num_threads: int) -> FastAPI:
    """Load the student, and the two routes that the benchmark needs."""
    torch_thread = ThreadPoolExecutor(max_workers=1)
    student = torch_thread.submit(Student, directory, num_threads).result()
    lock = asyncio.Lock()
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/images/generations")
    async def generate(request: ImageRequest) -> dict[str, Any]:
        async with lock:
            image = await asyncio.get_running_loop().run_in_executor(
                torch_thread, student.draw, request.prompt, request.seed
            )
        encoded = await asyncio.to_thread(png_base64, image)
        return {"created": int(time.time()), "data": [{"b64_json": encoded}]}

    return app


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="the same student behind a plain diffusers pipeline")
    parser.add_argument("student", type=Path, help="directory with model_index.json and student.json")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads torch may use")
    arguments = parser.parse_args()
    app = build_app(arguments.student, arguments.threads)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
