"""Old results go by themselves, and from the moment they are over the API says so."""

import asyncio
import dataclasses
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis.exceptions import RedisError

from server.api.expiry import GRACE_S, MAX_PERIOD_S, expire_old
from server.job import Job, JobStatus, is_over
from server.settings import EXPIRED_RECORD_S, Settings
from server.store import ResultStore
from server.worker.finisher import REDIS_PATIENCE_S
from tests.server.api.running import Api, error_of, running_api
from tests.server.conftest import poll_async

TTL_S = 10


@pytest.fixture
def settings(settings_of_both: Settings) -> Settings:
    return settings_of_both.model_copy(update={"result_ttl_s": TTL_S})


def set_clock(api: Api, now_ms: int) -> None:
    """What time the routes take it to be."""
    api.app.state.services = dataclasses.replace(api.services, now_ms=lambda: now_ms)


def end_of(api: Api) -> int:
    """Unix ms at which the only job ended."""
    (job,) = api.worker.jobs()
    assert job.finished_ms is not None
    return job.finished_ms


@pytest.fixture
def soon(settings: Settings) -> Settings:
    """Old results are looked for every second."""
    return settings.model_copy(update={"result_ttl_s": 1})


def put_old(results: Path, key: str) -> None:
    ResultStore(results.as_uri()).put(key, b"x", "image/png")
    then = time.time() - GRACE_S - 60
    os.utime(results / key, (then, then))


async def test_results_past_their_time_go_and_the_others_stay(soon: Settings, tmp_path: Path) -> None:
    put_old(tmp_path / "results", "img_old/1-0.png")
    store = ResultStore(soon.results_url)
    store.put("img_new/1-0.png", b"x", "image/png")

    async def gone() -> bool:
        return not store.exists("img_old/1-0.png")

    async with running_api(soon):
        await poll_async(gone)
    assert store.exists("img_new/1-0.png")


async def test_store_that_does_not_answer_is_asked_again(soon: Settings, tmp_path: Path) -> None:
    results, away = tmp_path / "results", tmp_path / "away"
    put_old(results, "img_old/1-0.png")
    results.rename(away)
    results.write_text("in the way")

    async def gone() -> bool:
        return not (away / "img_old").exists() and not (results / "img_old").exists()

    async with running_api(soon) as api:
        asked = api.worker.redis

        async def tried() -> bool:
            return bool(asked.exists("q:2:expiry"))

        await poll_async(tried)
        results.unlink()
        away.rename(results)
        await poll_async(gone)


async def test_one_api_process_of_several_removes_old_results(api: Api, settings: Settings) -> None:
    async with running_api(settings) as other:
        turns = [await one.services.queue.takes_turn("expiry", 60_000) for one in (api, other, api)]

    assert turns == [True, False, False]


async def test_old_results_go_while_redis_is_away(api: Api, soon: Settings, tmp_path: Path) -> None:
    put_old(tmp_path / "results", "img_old/1-0.png")
    services = dataclasses.replace(api.services, settings=soon)
    await services.queue.close()
    closing = asyncio.Event()
    api.worker.redis.config_set("maxmemory", 1)  # a lock is refused
    with pytest.raises(RedisError):
        await services.queue.takes_turn("expiry", 1000)
    expiring = asyncio.create_task(expire_old(services, closing))

    async def gone() -> bool:
        return not (tmp_path / "results/img_old").exists()

    await poll_async(gone)
    closing.set()
    await expiring
    api.worker.redis.config_set("maxmemory", 0)


def test_result_is_over_at_its_time_and_not_a_millisecond_before(new: Callable[..., Job]) -> None:
    job = dataclasses.replace(new(), status=JobStatus.DONE, finished_ms=5_000)

    assert not is_over(job, TTL_S, 14_999)
    assert is_over(job, TTL_S, 15_000)


@pytest.mark.parametrize(
    "status", [JobStatus.QUEUED, JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELLED]
)
def test_what_has_no_result_is_never_over(status: JobStatus, new: Callable[..., Job]) -> None:
    assert not is_over(dataclasses.replace(new(), status=status, finished_ms=0), TTL_S, 10**15)


def test_bytes_outlive_completed_and_the_record_outlives_the_bytes() -> None:
    # A result that is stored at 0 is completed at most REDIS_PATIENCE_S later and over a TTL after that;
    # it is not swept before TTL + GRACE_S.
    assert GRACE_S > 2 * REDIS_PATIENCE_S
    # Swept at most one period after the grace; a missed sweep is made up for by the next.
    assert GRACE_S + 2 * MAX_PERIOD_S < EXPIRED_RECORD_S


async def test_job_says_expired_from_its_time_on_though_its_bytes_are_still_there(api: Api) -> None:
    drawn = (await api.draw()).json()
    end_ms = end_of(api)

    set_clock(api, end_ms + TTL_S * 1000 - 1)
    assert (await api.client.get(f"/v1/images/{drawn['id']}")).json()["status"] == "completed"
    content = await api.client.get(f"/v1/images/{drawn['id']}/content")
    assert (content.status_code, content.headers["cache-control"]) == (200, "private, max-age=0, immutable")

    set_clock(api, end_ms + TTL_S * 1000)
    job = (await api.client.get(f"/v1/images/{drawn['id']}")).json()
    assert (job["status"], job["data"], job["error"]) == ("expired", [], None)
    assert (job["seed"], job["expires_at"]) == (drawn["seed"], drawn["expires_at"])
    etag = {"if-none-match": content.headers["etag"]}
    for headers in ({}, etag):
        gone = await api.client.get(f"/v1/images/{drawn['id']}/content", headers=headers)
        assert error_of(gone)[:2] == (410, "result_expired")
    assert (await api.client.delete(f"/v1/images/{drawn['id']}")).json()["status"] == "expired"


async def test_job_says_expired_when_somebody_removed_its_bytes_before_their_time(api: Api) -> None:
    drawn = (await api.draw({"n": 2})).json()
    (job,) = api.worker.jobs()
    api.worker.store.delete(job.outputs[1].key)

    shown = (await api.client.get(f"/v1/images/{drawn['id']}")).json()

    assert (shown["status"], shown["data"]) == ("expired", [])
    gone = await api.client.get(f"/v1/images/{drawn['id']}/content?index=1")
    assert error_of(gone)[:2] == (410, "result_expired")


@pytest.mark.parametrize("response_format", ["url", "b64_json"])
async def test_repeated_key_of_an_expired_job_never_says_completed(api: Api, response_format: str) -> None:
    key = {"idempotency-key": "k"}
    await api.draw({"response_format": response_format}, headers=key)
    set_clock(api, end_of(api) + TTL_S * 1000)

    ours = await api.post({"response_format": response_format}, headers=key)
    body = {"prompt": "a red cube", "response_format": response_format}
    theirs = await api.client.post("/v1/images/generations", json=body, headers=key)

    for response in (ours, theirs):
        assert error_of(response)[:2] == (410, "result_expired")
        assert response.headers["idempotent-replayed"] == "true"


async def test_failed_job_stays_failed(api: Api) -> None:
    response = await api.post({"wait_s": 0})
    api.worker.fail("generation_failed")
    set_clock(api, end_of(api) + TTL_S * 1000)

    assert (await api.client.get(f"/v1/images/{response.json()['id']}")).json()["status"] == "failed"


async def test_record_is_kept_until_it_has_said_expired_and_then_unknown(api: Api) -> None:
    drawn = (await api.draw()).json()
    end_ms, key = end_of(api), f"q:2:{{scenes}}:j:{drawn['id']}"

    # Redis counts by its own clock: what is asked of it is the span, within what this test may take.
    left_ms = api.worker.redis.pexpiretime(key) - end_ms
    assert abs(left_ms - (TTL_S + EXPIRED_RECORD_S) * 1000) < 600_000
    api.worker.redis.pexpire(key, 0)

    for path in ("", "/content"):
        gone = await api.client.get(f"/v1/images/{drawn['id']}{path}")
        assert error_of(gone)[:2] == (404, "job_not_found")


async def test_store_that_does_not_answer_expires_nothing(api: Api, tmp_path: Path) -> None:
    drawn = (await api.draw()).json()
    results = tmp_path / "results"
    results.rename(tmp_path / "away")
    results.write_text("in the way")  # each look into it fails with NotADirectoryError

    assert (await api.client.get(f"/v1/images/{drawn['id']}")).json()["status"] == "completed"
    down = await api.client.get(f"/v1/images/{drawn['id']}/content")
    assert error_of(down)[:2] == (503, "store_unavailable")


def test_several_at_once_do_no_harm(tmp_path: Path) -> None:
    for index in range(50):
        ResultStore(tmp_path.as_uri()).put(f"img_{index}/1-0.png", b"x", "image/png")
    with ThreadPoolExecutor(4) as pool:
        rounds = [pool.submit(lambda: sum(ResultStore(tmp_path.as_uri()).expire(-1.0))) for _ in range(4)]
        assert sum(one.result() for one in rounds) == 50
    assert list(tmp_path.iterdir()) == []
