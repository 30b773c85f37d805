"""A picture, a request that may be sent again, and a clip, with OpenAI's own client.

make serve                                        # in another terminal
pip install openai
python examples/client.py http://127.0.0.1:8000   # picture.png, order.png; clip.mp4 if a model makes clips
"""

from __future__ import annotations

import base64
import sys
import time
import uuid
import warnings
from pathlib import Path

import openai

PROMPT = "a large red sphere on the left, on grass at sunset"

warnings.filterwarnings("ignore", "The Sora API")  # OpenAI gives its own up; the client's methods stay


def draw(client: openai.OpenAI) -> bytes:
    """A picture; the same seed draws the same again."""
    reply = client.images.generate(prompt=PROMPT, extra_body={"seed": 7})
    assert reply.data
    return base64.b64decode(reply.data[0].b64_json or "")


def order(client: openai.OpenAI, key: str) -> bytes:
    """A picture that is drawn once, however often it is asked for.

    The client sends a request again by itself if the connection breaks or the server is busy. With a key of
    its own each of them gets the one job that the first has made.
    """
    reply = client.images.generate(prompt=PROMPT, extra_headers={"Idempotency-Key": key})
    assert reply.data
    return base64.b64decode(reply.data[0].b64_json or "")


def make_clip(client: openai.OpenAI, model: str, out: Path) -> None:
    """A clip: it takes longer, so it is a job that is looked at until it is done."""
    video = client.videos.create(prompt="a red cube moving left", model=model)
    while video.status in ("queued", "in_progress"):
        print(f"{video.id}: {video.status}, {video.progress} %")
        time.sleep(0.2)
        video = client.videos.retrieve(video.id)
    if video.error is not None:
        raise SystemExit(f"{video.id}: {video.error.message}")
    client.videos.download_content(video.id).write_to_file(out)
    print(f"{out}: {video.seconds} s of {video.size}")


def main(server: str) -> None:
    """Draw what the server's models can."""
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="not needed yet", max_retries=5)
    kinds = {model.id: (model.model_extra or {})["kind"] for model in client.models.list()}
    print(f"{server} serves {kinds}")
    if "image" in kinds.values():
        Path("picture.png").write_bytes(draw(client))
        key = str(uuid.uuid4())
        first, again = order(client, key), order(client, key)
        assert first == again
        Path("order.png").write_bytes(first)
        print("picture.png, order.png")
    for model in (name for name, kind in kinds.items() if kind == "video"):
        make_clip(client, model, Path("clip.mp4"))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
