"""Answers move from Redis to the store, and no client notices."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.api.archiving import MIN_KEPT_S, archive_round
from server.queue.archive import NAMES_OF_SCHEMA_1, Archive, archive_key
from server.settings import Settings
from server.store import ResultStore
from tests.server.api.running import Api, Worker, error_of, running_api
from tests.server.api.videos import make, post
from tests.server.conftest import poll_async
from tests.server.manifests import make_video_manifest

KEY = {"idempotency-key": "order-1"}
HOUR_MS = 3_600_000


@pytest.fixture
def settings(settings_of_both: Settings) -> Settings:
    return settings_of_both


async def archive(api: Api, *, later_ms: int = HOUR_MS + 1000) -> None:
    """Have the task do a round, as if it were later."""
    queue = api.services.queue
    clock = queue.clock
    queue.clock = lambda: clock() + later_ms
    try:
        await archive_round(api.services, Archive(api.services.store), asyncio.Event())
    finally:
        queue.clock = clock


def num_records(api: Api) -> int:
    keys: Any = api.worker.redis.keys("q:2:{*}:j:*")
    return len(keys)


def num_archived(api: Api, model: str = "scenes") -> float:
    value = api.services.metrics.registry.get_sample_value("tdm_jobs_archived_total", {"class": model})
    return value or 0.0


async def test_archived_job_answers_as_before(api: Api) -> None:
    drawn = await api.draw({"seed": 7, "n": 2}, headers=KEY)
    path = f"/v1/images/{drawn.json()['id']}"
    before, pixels = await api.client.get(path), await api.client.get(f"{path}/content?index=1")
    await archive(api)
    assert (num_records(api), num_archived(api)) == (0, 1)

    after, same_pixels = await api.client.get(path), await api.client.get(f"{path}/content?index=1")

    assert (before.status_code, after.status_code, pixels.status_code) == (200, 200, 200)
    assert after.json() == before.json()
    assert same_pixels.content == pixels.content
    assert same_pixels.headers["etag"] == pixels.headers["etag"]


async def test_key_leads_to_an_archived_job(api: Api) -> None:
    first = await api.draw({"seed": 7}, headers=KEY)
    await archive(api)

    again = await api.post({"seed": 7}, headers=KEY)
    other = await api.post({"seed": 8}, headers=KEY)

    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert error_of(other) == (422, "idempotency_mismatch", "Idempotency-Key")
    assert num_records(api) == 0


async def test_key_of_an_archived_job_is_taken_for_every_model(api: Api, settings: Settings) -> None:
    await api.draw({"seed": 7}, headers=KEY)
    await archive(api)
    clips = Worker(settings.redis_url, ResultStore(settings.results_url), manifest=make_video_manifest())
    clips.announce()

    refused = await post(api, headers=KEY)

    assert error_of(refused) == (422, "idempotency_mismatch", "Idempotency-Key")
    clips.queue.close()
    clips.redis.close()


@pytest.mark.parametrize(("code", "is_free"), [("generation_failed", False), ("storage", True)])
async def test_failure_that_asks_for_another_try_frees_its_key(api: Api, code: str, is_free: bool) -> None:
    asking = asyncio.create_task(api.post({"seed": 7}, headers=KEY))
    await asyncio.to_thread(api.worker.fail, code)
    failed = await asking
    await archive(api)

    again = await api.post({"seed": 7, "wait_s": 0}, headers=KEY)

    assert (again.status_code == 202) == is_free
    assert (again.json() == failed.json()) != is_free


async def test_archived_video_is_listed_until_it_is_deleted(api: Api, settings: Settings) -> None:
    clips = Worker(settings.redis_url, ResultStore(settings.results_url), manifest=make_video_manifest())
    clips.announce()
    kept, deleted = await make(api, clips), await make(api, clips, {"seed": 3})
    await archive(api)
    assert num_records(api) == 0

    listed = (await api.client.get("/v1/videos")).json()["data"]
    assert [video["id"] for video in listed] == [deleted["id"], kept["id"]]
    assert (await api.client.get(f"/v1/videos/{kept['id']}")).json() == kept

    assert (await api.client.delete(f"/v1/videos/{deleted['id']}")).status_code == 200
    for _ in range(2):  # before and after it was deleted once more
        listed = (await api.client.get("/v1/videos")).json()["data"]
        assert [video["id"] for video in listed] == [kept["id"]]
        gone = await api.client.get(f"/v1/videos/{deleted['id']}/content")
        assert error_of(gone)[:2] == (410, "result_expired")
        assert (await api.client.delete(f"/v1/videos/{deleted['id']}")).status_code == 200
    assert (await api.client.get(f"/v1/videos/{kept['id']}/content")).status_code == 200
    clips.queue.close()
    clips.redis.close()


async def test_what_has_just_ended_and_what_has_not_stay_in_redis(api: Api) -> None:
    await api.draw()
    await api.post({"wait_s": 0})
    await archive(api, later_ms=0)
    assert num_records(api) == 2
    await archive(api)
    assert num_records(api) == 1
    assert [job.status for job in api.worker.jobs()] == ["queued"]


async def test_short_memory_moves_what_ended_a_moment_ago(api: Api) -> None:
    await api.draw()
    later_ms = round(1000 * MIN_KEPT_S) + 1
    await archive(api, later_ms=later_ms)
    assert num_records(api) == 1
    used = int(api.worker.redis.info("memory")["used_memory"])
    api.worker.redis.config_set("maxmemory", round(1.5 * used))
    await archive(api, later_ms=later_ms)
    api.worker.redis.config_set("maxmemory", 0)
    assert num_records(api) == 0


async def test_store_that_does_not_answer_loses_no_answer(api: Api, tmp_path: Path) -> None:
    first, second = await api.draw(), await api.draw()
    results, away = tmp_path / "results", tmp_path / "away"
    results.rename(away)
    results.write_text("in the way")
    with pytest.raises(OSError, match="results"):
        await archive(api)
    assert num_records(api) == 2
    results.unlink()
    away.rename(results)
    await archive(api)
    (away, results)[1].rename(away)
    results.write_text("in the way")

    for drawn in (first, second):
        refused = await api.client.get(f"/v1/images/{drawn.json()['id']}")
        assert error_of(refused)[:2] == (503, "store_unavailable")
        assert "retry-after" in refused.headers


@pytest.mark.parametrize("field", ["created_ms", "finished_ms", "fingerprint", "tenant", "request"])
async def test_record_that_nobody_can_read_keeps_no_other_from_moving(api: Api, field: str) -> None:
    damaged, other = (await api.draw(headers=KEY)).json(), (await api.draw()).json()
    (key,) = api.worker.redis.keys(f"q:2:{{*}}:j:{damaged['id']}")
    api.worker.redis.hdel(key, field)
    await archive(api)
    assert num_records(api) == 0
    assert (await api.client.get(f"/v1/images/{other['id']}")).json()["status"] == "completed"


async def test_api_process_moves_answers_by_itself(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    await api.draw()
    monkeypatch.setattr("server.api.archiving.PERIOD_S", 0.01)
    async with running_api(api.services.settings) as other:
        clock = other.services.queue.clock
        other.services.queue.clock = lambda: clock() + HOUR_MS + 1000

        async def moved() -> bool:
            return num_records(api) == 0

        await poll_async(moved)


async def test_accepted_work_is_counted_once_for_each_job(api: Api) -> None:
    def work_s() -> float:
        value = api.services.metrics.registry.get_sample_value
        return value("tdm_accepted_work_seconds_total", {"class": "scenes"}) or 0.0

    first = await api.post({"wait_s": 0, "n": 2}, headers=KEY)
    (job,) = api.worker.jobs()
    assert work_s() == pytest.approx(job.cost_ms / 1000)
    assert (await api.post({"wait_s": 0, "n": 2}, headers=KEY)).json()["id"] == first.json()["id"]
    assert work_s() == pytest.approx(job.cost_ms / 1000)


async def test_answer_that_the_first_schema_wrote_is_read(api: Api) -> None:
    drawn = (await api.draw()).json()
    before = (await api.client.get(f"/v1/images/{drawn['id']}")).json()
    await archive(api)
    content = json.loads(api.services.store.get(archive_key(drawn["id"])))
    short = {name: old for old, name in NAMES_OF_SCHEMA_1.items()}
    content["record"] = {short[name]: value for name, value in content["record"].items()}
    file = json.dumps({**content, "schema": 1}).encode()
    api.services.store.put(archive_key(drawn["id"]), file, "application/json")

    assert (await api.client.get(f"/v1/images/{drawn['id']}")).json() == before


async def test_answer_that_cannot_be_read_is_said_to_be_so(api: Api) -> None:
    drawn = (await api.draw()).json()
    await archive(api)
    api.services.store.put(archive_key(drawn["id"]), b'{"schema": 99}', "application/json")

    answer = await api.client.get(f"/v1/images/{drawn['id']}")

    assert answer.status_code == 500
