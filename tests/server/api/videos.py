"""What tests of videos have in common."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from typing import Any

import av
import httpx

from tests.server.api.running import Api, Worker


def num_frames(content: bytes) -> int:
    """Of an MP4 file, decoded."""
    with av.open(io.BytesIO(content), "r") as file:
        return len(list(file.decode(video=0)))


async def post(api: Api, body: Mapping[str, Any] | None = None, **options: Any) -> httpx.Response:
    return await api.client.post("/v1/videos", json={"prompt": "a red cube", **(body or {})}, **options)


async def look(api: Api, job_id: str) -> dict[str, Any]:
    response = await api.client.get(f"/v1/videos/{job_id}")
    assert response.status_code == 200, response.text
    video: dict[str, Any] = response.json()
    return video


async def make(api: Api, worker: Worker, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A finished video."""
    response = await post(api, body)
    assert response.status_code == 200, response.text
    await asyncio.to_thread(worker.draw)
    return await look(api, response.json()["id"])
