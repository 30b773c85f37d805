"""What an api process knows of models while Redis is slow, away, or fed by workers of another version."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest
from redis.exceptions import ConnectionError as NoConnectionError

from server.api.catalog import FAILURE_AGE_S, MAX_AGE_S, Catalog
from server.queue.errors import QueueError
from server.queue.job_queue import JobQueue
from server.queue.records import QueueStats
from tests.server.manifests import make_manifest


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowQueue(JobQueue):
    """A queue whose answers the test lets through, or fails."""

    def __init__(self) -> None:
        super().__init__("unix:///nowhere")
        self.manifest: dict[str, Any] = json.loads(make_manifest("scenes").model_dump_json())
        self.num_asked = 0
        self.answer = asyncio.Event()
        self.answer.set()
        self.error: QueueError | None = None

    async def models(self) -> dict[str, Mapping[str, Any]]:
        self.num_asked += 1
        await self.answer.wait()
        if self.error is not None:
            raise self.error
        return {"scenes": self.manifest}

    async def stats(self, model: str) -> QueueStats:
        return QueueStats(waiting={}, running=0, oldest_age_ms=0, dead=0, workers=())


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def queue() -> SlowQueue:
    return SlowQueue()


async def test_all_who_ask_at_once_share_one_read(queue: SlowQueue, time: Time) -> None:
    catalog = Catalog(queue, clock=time)
    queue.answer.clear()
    asking = [asyncio.create_task(catalog.models()) for _ in range(12)]
    await asyncio.sleep(0)
    queue.answer.set()
    assert [list(models) for models in await asyncio.gather(*asking)] == [["scenes"]] * 12
    assert queue.num_asked == 1


async def test_failure_is_told_to_all_who_wait_for_it(queue: SlowQueue, time: Time) -> None:
    catalog = Catalog(queue, clock=time)
    queue.error = NoConnectionError("gone")
    queue.answer.clear()
    asking = [asyncio.create_task(catalog.models()) for _ in range(12)]
    await asyncio.sleep(0)
    queue.answer.set()
    told = await asyncio.gather(*asking, return_exceptions=True)
    assert [type(one) for one in told] == [NoConnectionError] * 12
    assert queue.num_asked == 1


async def test_old_catalogue_serves_while_redis_hangs_or_is_away(queue: SlowQueue, time: Time) -> None:
    catalog = Catalog(queue, clock=time)
    await catalog.models()
    queue.answer.clear()
    time.now += 2 * MAX_AGE_S
    assert list(await catalog.models()) == ["scenes"]  # although the answer never comes

    queue.error = NoConnectionError("gone")
    queue.answer.set()
    with pytest.raises(QueueError):
        await catalog.models(max_age_s=0.0)
    num_asked = queue.num_asked
    for _ in range(12):
        assert list(await catalog.models()) == ["scenes"]
    assert queue.num_asked == num_asked  # the failure is remembered

    queue.error = None
    time.now += 2 * FAILURE_AGE_S
    await catalog.models()
    assert queue.num_asked == num_asked + 1
    await catalog.close()


async def test_who_wants_no_old_one_gets_what_was_read_after_asking(queue: SlowQueue, time: Time) -> None:
    catalog = Catalog(queue, clock=time)
    queue.answer.clear()
    early = asyncio.create_task(catalog.models())
    await asyncio.sleep(0)
    late = asyncio.create_task(catalog.models(max_age_s=0.0))
    await asyncio.sleep(0)
    queue.answer.set()
    await asyncio.gather(early, late)
    assert queue.num_asked == 2


async def test_fields_of_a_newer_worker_cost_no_model(queue: SlowQueue, time: Time) -> None:
    known = (await Catalog(queue, clock=time).models())["scenes"].manifest
    queue.manifest["colour"] = "red"
    queue.manifest["latency"][0]["quantile"] = 0.5
    queue.manifest["platform"]["weather"] = {"rain": True}
    assert (await Catalog(queue, clock=time).models())["scenes"].manifest == known


async def test_field_that_is_wrong_costs_the_model(queue: SlowQueue, time: Time) -> None:
    queue.manifest["num_steps"] = "four"
    assert await Catalog(queue, clock=time).models() == {}
