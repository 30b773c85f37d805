"""The HTTP API over a real Valkey and a real store. The test plays the worker: nothing is left to timing."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server.job import JobError, JobStatus
from server.queue.connection import connect
from server.settings import Settings
from tests.server.api import Api, error_of, running_api
from tests.server.manifests import EXAMPLES


@pytest.fixture
def redis_url(valkey_url: str) -> str:
    client = connect(valkey_url)
    client.flushall()
    client.config_set("maxmemory", 0)
    client.close()
    return valkey_url


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    return Settings(redis_url=redis_url, data_dir=tmp_path, max_queue=3)


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    """An api process whose one worker is announced."""
    async with running_api(settings) as api:
        api.worker.announce()
        yield api


async def test_picture_is_drawn_and_described(api: Api) -> None:
    response = await api.draw({"seed": 7, "steps": 2})

    assert response.status_code == 200
    job = response.json()
    assert (job["status"], job["progress"], job["model"], job["seed"], job["steps"]) == (
        "completed",
        100,
        "scenes",
        7,
        2,
    )
    assert (job["prompt"], job["n"], job["size"], job["output_format"]) == ("a red cube", 1, "64x64", "png")
    assert job["data"] == [
        {
            "url": f"http://server/v1/images/{job['id']}/content?index=0",
            "b64_json": None,
            "seed": 7,
            "width": 64,
            "height": 64,
            "content_type": "image/png",
            "size_bytes": job["data"][0]["size_bytes"],
        }
    ]
    assert job["expires_at"] == job["completed_at"] + api.services.settings.result_ttl_s
    assert {"queue": 5.0, "batch": 1.0, "denoise": 30.0}.items() <= job["timing_ms"].items()
    assert job["timing_ms"]["total"] >= 0


async def test_stages_are_in_the_server_timing_header(api: Api) -> None:
    response = await api.draw()

    stages = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert list(stages)[:6] == ["queue", "batch", "encode", "denoise", "decode", "pack"]
    assert float(stages["denoise"]) == 30.0


async def test_url_leads_to_the_bytes(api: Api) -> None:
    job = (await api.draw()).json()

    response = await api.client.get(job["data"][0]["url"])

    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "immutable" in response.headers["cache-control"]
    assert Image.open(io.BytesIO(response.content)).size == (64, 64)


async def test_client_with_a_good_copy_gets_no_bytes(api: Api) -> None:
    url = (await api.draw()).json()["data"][0]["url"]
    etag = (await api.client.get(url)).headers["etag"]

    response = await api.client.get(url, headers={"if-none-match": etag})

    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == etag


async def test_image_i_has_seed_plus_i(api: Api) -> None:
    job = (await api.draw({"n": 3, "seed": 2**63 - 2})).json()

    assert [image["seed"] for image in job["data"]] == [2**63 - 2, 2**63 - 1, 0]
    second = await api.client.get(job["data"][1]["url"])
    assert Image.open(io.BytesIO(second.content)).getpixel((0, 0)) == (255, 40, 0)


async def test_seed_is_drawn_and_reported_when_none_is_given(api: Api) -> None:
    first, second = (await api.draw()).json(), (await api.draw()).json()

    assert first["seed"] != second["seed"]
    assert 0 <= first["seed"] < 2**32
    assert first["data"][0]["seed"] == first["seed"]


async def test_bytes_come_in_the_body_when_asked_for(api: Api) -> None:
    job = (await api.draw({"response_format": "b64_json", "n": 2, "output_format": "webp"})).json()

    images = [Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))) for image in job["data"]]
    assert [(image.format, image.size) for image in images] == [("WEBP", (64, 64))] * 2
    assert [image["url"] for image in job["data"]] == [None, None]


async def test_compression_goes_with_the_format_that_is_negotiated(api: Api) -> None:
    response = await api.draw({"output_compression": 80}, headers={"accept": "image/jpeg"})
    assert (response.status_code, response.headers["content-type"]) == (200, "image/jpeg")

    response = await api.post({"output_compression": 80}, headers={"accept": "image/png"})
    assert error_of(response) == (422, "unsupported_parameter", "output_compression")


@pytest.mark.parametrize(
    ("accept", "asked_format", "media_type"),
    [
        ("image/png", "png", "image/png"),
        ("image/webp;q=0.9, */*;q=0.1", "png", "image/webp"),
        ("image/*", "jpeg", "image/jpeg"),
        ("image/png, image/jpeg", "jpeg", "image/jpeg"),
    ],
)
async def test_client_that_accepts_an_image_gets_the_bytes(
    api: Api, accept: str, asked_format: str, media_type: str
) -> None:
    response = await api.draw({"output_format": asked_format, "seed": 5}, headers={"accept": accept})

    assert response.status_code == 200
    assert response.headers["content-type"] == media_type
    assert Image.open(io.BytesIO(response.content)).size == (64, 64)
    assert response.headers["x-seed"] == "5"
    assert response.headers["x-job-id"].startswith("img_")
    assert "denoise" in response.headers["server-timing"]


async def test_several_images_do_not_fit_one_image_response(api: Api) -> None:
    response = await api.post({"n": 2}, headers={"accept": "image/png"})

    assert error_of(response) == (422, "invalid_value", "n")


async def test_size_is_width_by_height(api: Api) -> None:
    job = (await api.draw({"size": "64x96"})).json()

    assert (job["size"], job["data"][0]["width"], job["data"][0]["height"]) == ("64x96", 64, 96)


async def test_job_that_outlasts_the_wait_can_be_followed(api: Api) -> None:
    accepted = await api.post({"wait_s": 0, "n": 2})

    assert accepted.status_code == 202
    job = accepted.json()
    assert accepted.headers["location"] == f"http://server/v1/images/{job['id']}"
    assert (job["status"], job["progress"], job["queue_position"], job["data"]) == ("queued", 0, 0, [])
    assert job["eta_s"] > 0

    lease, started = await asyncio.to_thread(api.worker.start)
    await asyncio.to_thread(api.worker.queue.extend, {lease: 50})
    running = (await api.client.get(accepted.headers["location"])).json()
    assert (running["status"], running["progress"], running["queue_position"]) == ("in_progress", 50, None)
    assert running["eta_s"] > 0

    await asyncio.to_thread(api.worker.finish, started)
    done = (await api.client.get(accepted.headers["location"])).json()
    assert (done["status"], done["progress"], done["eta_s"], len(done["data"])) == ("completed", 100, None, 2)


@pytest.mark.parametrize("prefer", ["wait=0", "respond-async, wait=0", "respond-async"])
async def test_client_may_prefer_not_to_wait(api: Api, prefer: str) -> None:
    response = await api.post(headers={"prefer": prefer})

    assert response.status_code == 202


async def test_position_counts_the_jobs_ahead(api: Api) -> None:
    jobs = [(await api.post({"wait_s": 0})).json() for _ in range(3)]

    assert [job["queue_position"] for job in jobs] == [0, 1, 2]
    looked_up = [(await api.client.get(f"/v1/images/{job['id']}")).json() for job in jobs]
    assert [job["queue_position"] for job in looked_up] == [0, 1, 2]


async def test_content_of_an_unfinished_job_is_not_there_yet(api: Api) -> None:
    job = (await api.post({"wait_s": 0})).json()

    response = await api.client.get(f"/v1/images/{job['id']}/content")

    assert error_of(response) == (404, "result_not_ready", None)
    assert int(response.headers["retry-after-ms"]) > 0


async def test_content_that_the_store_no_longer_has_is_gone(api: Api) -> None:
    job = (await api.draw()).json()
    api.worker.store.delete(f"results/{job['id']}/1-0.png")

    assert error_of(await api.client.get(job["data"][0]["url"])) == (410, "result_expired", None)


async def test_content_index_is_checked(api: Api) -> None:
    job = (await api.draw()).json()

    assert error_of(await api.client.get(f"/v1/images/{job['id']}/content?index=1")) == (
        422,
        "invalid_value",
        "index",
    )
    assert error_of(await api.client.get(f"/v1/images/{job['id']}/content?index=x")) == (
        422,
        "invalid_value",
        "index",
    )


async def test_queued_job_is_cancelled_at_once(api: Api) -> None:
    job = (await api.post({"wait_s": 0})).json()

    cancelled = (await api.client.delete(f"/v1/images/{job['id']}")).json()

    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    value = api.services.metrics.registry.get_sample_value
    assert value("tdm_jobs_total", {"class": "scenes", "kind": "image", "outcome": "cancelled"}) == 1
    assert error_of(await api.client.get(f"/v1/images/{job['id']}/content")) == (410, "cancelled", None)


async def test_finished_job_cannot_be_cancelled(api: Api) -> None:
    job = (await api.draw()).json()

    assert (await api.client.delete(f"/v1/images/{job['id']}")).json()["status"] == "completed"


@pytest.mark.parametrize(
    ("code", "status", "told", "retry"),
    [
        ("out_of_memory", 500, "generation_failed", "false"),
        ("poison", 500, "poison", "false"),
        ("deadline", 504, "deadline_exceeded", "false"),
        ("storage", 503, "store_unavailable", None),
    ],
)
async def test_failed_job_is_a_typed_error_for_who_waits(
    api: Api, code: str, status: int, told: str, retry: str | None
) -> None:
    response, job = await asyncio.gather(api.post(), asyncio.to_thread(api.worker.fail, code))

    assert error_of(response) == (status, told, None)
    assert response.headers.get("x-should-retry") == retry
    looked_up = (await api.client.get(f"/v1/images/{job.id}")).json()
    assert (looked_up["status"], looked_up["error"]) == ("failed", {"code": code, "message": "the reason"})


async def test_cancelling_answers_who_waits(api: Api) -> None:
    waiting = asyncio.create_task(api.post())
    lease, job = await asyncio.to_thread(api.worker.start)
    await api.client.delete(f"/v1/images/{job.id}")
    assert (await asyncio.to_thread(api.worker.queue.extend, {lease: 0}))[lease] == "cancel"
    await asyncio.to_thread(
        api.worker.queue.fail, job, JobError(code="cancelled", message=""), {}, status=JobStatus.CANCELLED
    )

    assert error_of(await waiting) == (410, "cancelled", None)


# Idempotency


async def test_same_key_and_body_give_the_same_job(api: Api) -> None:
    first = (await api.draw({"n": 2}, headers={"idempotency-key": "k1"})).json()
    again = (await api.post({"n": 2}, headers={"idempotency-key": "k1"})).json()

    # Without a seed in the request too: the first one's was drawn, and stays.
    assert again == first


async def test_same_key_with_another_body_is_refused(api: Api) -> None:
    await api.post({"wait_s": 0}, headers={"idempotency-key": "k1"})

    response = await api.post({"wait_s": 0, "n": 2}, headers={"idempotency-key": "k1"})

    assert error_of(response) == (422, "idempotency_mismatch", "Idempotency-Key")


async def test_known_key_finds_its_job_although_the_queue_is_full(api: Api) -> None:
    first = (await api.post({"wait_s": 0}, headers={"idempotency-key": "k1"})).json()
    while (await api.post({"wait_s": 0})).status_code == 202:
        pass

    again = await api.post({"wait_s": 0}, headers={"idempotency-key": "k1"})

    assert (again.status_code, again.json()["id"]) == (202, first["id"])


# Not now


async def test_full_queue_refuses_and_says_when_to_come_back(api: Api) -> None:
    responses = [await api.post({"wait_s": 0}) for _ in range(4)]

    assert [response.status_code for response in responses] == [202, 202, 202, 429]
    assert error_of(responses[-1]) == (429, "queue_full", None)
    assert int(responses[-1].headers["retry-after-ms"]) > 0
    assert int(responses[-1].headers["retry-after"]) >= 1


async def test_job_that_cannot_meet_its_deadline_is_refused(settings: Settings) -> None:
    hurried = settings.model_copy(update={"job_deadline_s": 0.1})  # four steps take 180 ms
    async with running_api(hurried) as api:
        api.worker.announce()

        response = await api.post()

    assert error_of(response) == (429, "queue_full", None)
    assert "deadline" in response.json()["error"]["message"]


async def test_full_redis_is_a_typed_503(api: Api) -> None:
    api.worker.redis.config_set("maxmemory", "1mb")

    response = await api.post({"wait_s": 0})

    assert error_of(response) == (503, "overloaded", None)
    assert int(response.headers["retry-after"]) >= 1


async def test_redis_that_is_down_is_a_typed_503(tmp_path: Path) -> None:
    async with running_api(Settings(redis_url=f"unix://{tmp_path}/nothing.sock", data_dir=tmp_path)) as api:
        response = await api.post()
        readiness = await api.client.get("/readyz")
        alive = await api.client.get("/healthz")

    assert error_of(response) == (503, "queue_unavailable", None)
    assert response.headers["retry-after-ms"] == "1000"
    assert (readiness.status_code, readiness.json()["queue"]) == (503, "unavailable")
    assert readiness.json()["error"]["code"] == "queue_unavailable"
    assert alive.status_code == 200


async def test_before_any_worker_there_is_no_model(settings: Settings) -> None:
    async with running_api(settings) as api:
        assert error_of(await api.post()) == (503, "no_worker", None)
        assert error_of(await api.post({"model": "scenes"})) == (404, "model_not_found", "model")
        assert (await api.client.get("/v1/models")).json() == {"object": "list", "data": []}
        readiness = await api.client.get("/readyz")

    assert (readiness.status_code, readiness.json()["error"]["code"]) == (503, "no_worker")


async def test_with_the_worker_gone_jobs_wait_and_readyz_says_so(api: Api) -> None:
    assert (await api.client.get("/readyz")).json()["models"]["scenes"]["workers"] == 1
    await asyncio.to_thread(api.worker.queue.leave)

    readiness = await api.client.get("/readyz")
    job = await api.post({"wait_s": 0})

    assert readiness.status_code == 503
    assert readiness.json()["error"]["code"] == "no_worker"
    assert "scenes" in readiness.json()["error"]["message"]
    assert (job.status_code, job.json()["status"], job.json()["eta_s"]) == (202, "queued", None)


async def test_ready_server_says_who_serves_what(api: Api) -> None:
    response = await api.client.get("/readyz")

    assert response.status_code == 200
    assert response.json()["status"] == "ready"
    assert response.json()["models"]["scenes"] == {
        "workers": 1,
        "backends": ["eager"],
        "waiting": 0,
        "running": 0,
        "oldest_age_s": 0.0,
        "warnings": ["runs eager"],
    }


# Clients that leave, processes that end


async def post_and_leave(api: Api, headers: dict[str, str], leave_when: Callable[[], Any]) -> int | None:
    """Send a request over raw ASGI, disconnect once `leave_when` returns; the status, if one was sent."""
    body = json.dumps({"prompt": "a red cube"}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/images",
        "raw_path": b"/v1/images",
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "server": ("server", 80),
        "headers": [
            (b"content-type", b"application/json"),
            *((k.encode(), v.encode()) for k, v in headers.items()),
        ],
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    status = None

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.to_thread(leave_when)
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    await api.app(scope, receive, send)
    return status


async def test_client_that_leaves_takes_its_queued_job_along(api: Api) -> None:
    status = await post_and_leave(api, {}, api.worker.wait_for_jobs)

    assert status == 499
    assert [job.status for job in api.worker.jobs()] == ["cancelled"]


async def test_job_with_an_idempotency_key_outlives_its_client(api: Api) -> None:
    await post_and_leave(api, {"idempotency-key": "k1"}, api.worker.wait_for_jobs)

    assert [job.status for job in api.worker.jobs()] == ["queued"]


async def test_running_job_outlives_its_client(api: Api) -> None:
    await post_and_leave(api, {}, api.worker.start)

    assert [job.status for job in api.worker.jobs()] == ["running"]


async def test_ending_process_answers_who_waits_with_the_job(api: Api) -> None:
    waiting = asyncio.create_task(api.post())
    await asyncio.to_thread(api.worker.wait_for_jobs)
    api.services.draining.set()

    response = await waiting

    assert (response.status_code, response.json()["status"]) == (202, "queued")


async def test_ending_process_tells_openais_client_to_ask_again(api: Api) -> None:
    waiting = asyncio.create_task(api.client.post("/v1/images/generations", json={"prompt": "a red cube"}))
    await asyncio.to_thread(api.worker.wait_for_jobs)
    api.services.draining.set()

    response = await waiting

    assert error_of(response) == (503, "shutting_down", None)
    assert int(response.headers["retry-after-ms"]) > 0
    assert [job.status for job in api.worker.jobs()] == ["cancelled"]


# OpenAI's route


async def draw_openai(api: Api, body: Mapping[str, Any]) -> httpx.Response:
    response, _ = await asyncio.gather(
        api.client.post("/v1/images/generations", json={"prompt": "a red cube", **body}),
        asyncio.to_thread(api.worker.draw),
    )
    return response


async def test_openais_route_answers_in_openais_shape(api: Api) -> None:
    body = (
        await draw_openai(api, {"seed": 3, "steps": 1, "size": "64x64", "user": "u", "quality": "low"})
    ).json()

    assert Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"]))).size == (64, 64)
    assert (body["size"], body["output_format"], body["background"]) == ("64x64", "png", "opaque")
    assert body["usage"]["total_tokens"] == 0
    assert (body["seed"], body["steps"], body["model"]) == (3, 1, "scenes")
    assert isinstance(body["created"], int)


async def test_openais_route_gives_urls_when_asked(api: Api) -> None:
    image = (await draw_openai(api, {"response_format": "url"})).json()["data"][0]

    assert image["b64_json"] is None
    assert (await api.client.get(image["url"])).headers["content-type"] == "image/png"


async def test_openais_route_gives_up_at_the_deadline(settings: Settings) -> None:
    hurried = settings.model_copy(update={"job_deadline_s": 0.2})
    async with running_api(hurried) as api:
        api.worker.announce()

        response = await api.client.post("/v1/images/generations", json={"prompt": "a red cube", "steps": 1})

        assert error_of(response) == (504, "deadline_exceeded", None)


# Bad input: one row per way to be wrong

BAD_BODIES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"prompt": None}, 422, "missing_parameter", "prompt"),
    ({"prompt": "  "}, 422, "invalid_value", "prompt"),
    ({"prompt": "x" * 2001}, 422, "prompt_too_long", "prompt"),
    ({"n": 0}, 422, "invalid_value", "n"),
    ({"n": 11}, 422, "invalid_value", "n"),
    ({"n": "1"}, 422, "invalid_value", "n"),
    ({"size": "65x64"}, 422, "size_not_served", "size"),
    ({"size": "96x64"}, 422, "size_not_served", "size"),
    ({"size": "big"}, 422, "invalid_value", "size"),
    ({"steps": 3}, 422, "steps_not_served", "steps"),
    ({"seed": -1}, 422, "invalid_value", "seed"),
    ({"seed": 2**63}, 422, "invalid_value", "seed"),
    ({"seed": 10**400}, 422, "invalid_value", "seed"),
    ({"model": "dall-e-3"}, 404, "model_not_found", "model"),
    ({"output_format": "gif"}, 422, "invalid_value", "output_format"),
    ({"output_compression": 50}, 422, "unsupported_parameter", "output_compression"),
    ({"response_format": "file"}, 422, "invalid_value", "response_format"),
    ({"colour": "red"}, 422, "unknown_parameter", "colour"),
]


@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/generations"])
@pytest.mark.parametrize(("body", "status", "code", "param"), BAD_BODIES)
async def test_bad_body_is_a_typed_error(
    api: Api, path: str, body: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    response = await api.client.post(path, json={"prompt": "a red cube", **body})

    assert error_of(response) == (status, code, param)
    assert api.worker.jobs() == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream": True}, "stream"),
        ({"background": "transparent"}, "background"),
        ({"partial_images": 1}, "partial_images"),
    ],
)
async def test_openai_feature_that_is_missing_is_a_typed_error(
    api: Api, body: dict[str, Any], param: str
) -> None:
    response = await api.client.post("/v1/images/generations", json={"prompt": "a red cube", **body})

    assert error_of(response) == (422, "unsupported_parameter", param)


async def test_errors_name_what_is_allowed(api: Api) -> None:
    messages = {
        name: (await api.post({name: value})).json()["error"]["message"]
        for name, value in {"size": "1x1", "steps": 3, "model": "x", "output_format": "gif"}.items()
    }

    assert "auto, 64x64, 64x96" in messages["size"]
    assert "1, 2, 4" in messages["steps"]
    assert "scenes" in messages["model"]
    assert "'png', 'jpeg' or 'webp'" in messages["output_format"]


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "invalid_json"),
        (b"[1]", "application/json", 400, "invalid_json"),
        (b'"text"', "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"[" * 60_000, "application/json", 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (b'{"prompt": "a red cube"}', "text/plain", 415, "unsupported_media_type"),
        (b"prompt=a", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b'{"prompt": "' + b"x" * 65_536 + b'"}', "application/json", 413, "body_too_large"),
    ],
)
async def test_bad_bytes_are_a_typed_error(
    api: Api, content: bytes, content_type: str, status: int, code: str
) -> None:
    response = await api.client.post("/v1/images", content=content, headers={"content-type": content_type})

    assert error_of(response)[:2] == (status, code)


async def test_body_without_a_length_is_counted_as_it_comes(api: Api) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 10_000

    response = await api.client.post(
        "/v1/images", content=endless(), headers={"content-type": "application/json"}
    )

    assert error_of(response) == (413, "body_too_large", None)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "route_not_found"),
        ("GET", "/v1/images/img_00000000000000000000000000000000", 404, "job_not_found"),
        ("GET", "/v1/images/..%2f..", 404, "route_not_found"),
        ("DELETE", "/v1/images/img_1", 404, "job_not_found"),
        ("GET", "/v1/images/img_1/content", 404, "job_not_found"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", "/playground/other.js", 404, "route_not_found"),
        ("PUT", "/v1/images", 405, "method_not_allowed"),
        ("GET", "/v1/images", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
    ],
)
async def test_wrong_address_is_a_typed_error(
    api: Api, method: str, path: str, status: int, code: str
) -> None:
    response = await api.client.request(method, path)

    assert error_of(response)[:2] == (status, code)


async def test_wrong_method_names_the_right_one(api: Api) -> None:
    assert (await api.client.get("/v1/images")).headers["allow"] == "POST"


@pytest.mark.parametrize("key", ["", "k" * 256, "two words"])
async def test_bad_idempotency_key_is_a_typed_error(api: Api, key: str) -> None:
    response = await api.post(headers={"idempotency-key": key})

    assert error_of(response) == (400, "invalid_header", "Idempotency-Key")


# What every response and every log line has


async def test_request_id_is_given_or_kept(api: Api) -> None:
    given = await api.client.get("/healthz")
    kept = await api.client.get("/healthz", headers={"x-request-id": "mine-1"})
    replaced = await api.client.get("/healthz", headers={"x-request-id": "no good" * 50})

    assert given.headers["x-request-id"].startswith("req_")
    assert kept.headers["x-request-id"] == "mine-1"
    assert replaced.headers["x-request-id"].startswith("req_")


async def test_our_own_bug_is_a_plain_500_with_the_trace_in_the_log_alone(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    api.app.state.services = None

    response = await api.client.get("/v1/models", headers={"x-request-id": "find-me"})

    assert error_of(response) == (500, "internal_error", None)
    assert "find-me" in response.json()["error"]["message"]
    assert "Traceback" not in response.text
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]


async def test_prompts_are_never_logged(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await api.draw({"prompt": "a private matter"})
    await api.post({"prompt": "a private matter", "n": 99})

    assert "private" not in caplog.text


async def test_requests_are_counted_by_route_template(api: Api) -> None:
    job = (await api.draw()).json()
    await api.client.get(f"/v1/images/{job['id']}")
    await api.client.get("/nothing/1")

    value = api.services.metrics.registry.get_sample_value
    counted = {
        (route, method): value(
            "tdm_http_requests_total", {"route": route, "method": method, "code": str(code)}
        )
        for route, method, code in [
            ("/v1/images", "POST", 200),
            ("/v1/images/{job_id}", "GET", 200),
            ("unmatched", "GET", 404),
        ]
    }
    assert set(counted.values()) == {1.0}
    assert value("tdm_http_request_duration_seconds_count", {"route": "/v1/images"}) == 1


async def test_refusals_are_counted_by_reason(api: Api) -> None:
    for _ in range(4):
        await api.post({"wait_s": 0})

    value = api.services.metrics.registry.get_sample_value
    assert value("tdm_jobs_rejected_total", {"class": "scenes", "kind": "image", "reason": "queue"}) == 1


# Models, page, OpenAPI document


async def test_models_say_what_can_be_asked_of_them(api: Api) -> None:
    listed = (await api.client.get("/v1/models")).json()
    one = (await api.client.get("/v1/models/scenes")).json()

    assert listed == {"object": "list", "data": [one]}
    assert one == {
        "id": "scenes",
        "object": "model",
        "created": 1_700_000_000,
        "owned_by": "tdm-server",
        "kind": "image",
        "version": "0123456789ab",
        "gate": "never gated",
        "sizes": ["64x64", "64x96"],
        "seconds": [],
        "frames": [],
        "fps": None,
        "steps": [1, 2, 4],
        "default_steps": 4,
        "max_prompt_chars": 2000,
        "examples": EXAMPLES,
        "workers": 1,
        "backends": ["eager"],
    }


async def test_page_loads_nothing_from_elsewhere(api: Api) -> None:
    page = await api.client.get("/")

    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert "unsafe" not in policy
    for name, media_type in {
        "app.js": "text/javascript",
        "style.css": "text/css",
        "icon.svg": "image/svg+xml",
    }.items():
        part = await api.client.get(f"/playground/{name}")
        assert part.status_code == 200
        assert part.headers["content-type"].startswith(media_type)
        assert f"/playground/{name}" in page.text


async def test_page_offers_no_prompt_but_what_a_model_says_it_draws(api: Api) -> None:
    for part in ("/", "/playground/app.js"):
        text = (await api.client.get(part)).text.lower()
        assert [
            noun for noun in ("sphere", "cube", "cone", "cylinder", "torus", "ball") if noun in text
        ] == []


async def test_openapi_documents_our_errors_and_none_of_fastapis(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()

    create = document["paths"]["/v1/images"]["post"]["responses"]
    assert {"200", "202", "400", "404", "413", "415", "422", "429", "500", "503", "504"} <= create.keys()
    assert "HTTPValidationError" not in json.dumps(document)
    assert create["429"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
    assert "queue_full" in create["429"]["description"]
