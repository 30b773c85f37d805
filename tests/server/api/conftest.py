"""An api process without its process, over an empty Valkey, and the workers that a test plays."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from server.queue.connection import connect
from server.settings import Settings
from server.store import ResultStore
from tests.server.api.running import Api, Worker, running_api
from tests.server.manifests import make_video_manifest


@pytest.fixture
def settings(valkey_url: str, tmp_path: Path) -> Settings:
    client = connect(valkey_url)
    client.flushall()
    client.config_set("maxmemory", 0)
    client.close()
    return Settings(redis_url=valkey_url, data_dir=tmp_path, max_queue=3)


@pytest.fixture
def settings_of_both(redis_url: str, tmp_path: Path) -> Settings:
    """The same over Valkey and over Redis in turn: what a file whose tests want both calls its `settings`."""
    return Settings(redis_url=redis_url, data_dir=tmp_path, max_queue=3)


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    """An api process whose one worker is announced: it serves an image model, `scenes`."""
    async with running_api(settings) as api:
        api.worker.announce()
        yield api


@pytest.fixture
def worker(settings: Settings, api: Api) -> Iterator[Worker]:
    """The one that serves `clips`."""
    worker = Worker(settings.redis_url, ResultStore(settings.results_url), manifest=make_video_manifest())
    worker.announce()
    yield worker
    worker.queue.close()
    worker.redis.close()


@pytest.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(app=api.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as http:
        yield openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", max_retries=0, http_client=http)
