"""Images over HTTP, from the request to the bytes. The test plays the worker: nothing is left to timing."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server.job import JobError, JobStatus
from server.settings import Settings
from tests.server.api.running import Api, error_of, running_api
from tests.server.manifests import make_manifest


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
    assert (response.headers["x-seed"], response.headers["x-steps"]) == ("5", "4")
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


@pytest.mark.parametrize("state", ["queued", "in_progress"])
async def test_job_of_a_size_that_its_bundle_no_longer_has_can_be_followed(api: Api, state: str) -> None:
    accepted = (await api.post({"wait_s": 0, "size": "64x96"})).json()
    if state == "in_progress":
        await asyncio.to_thread(api.worker.start)
    rebuilt = make_manifest(buckets=["64x64"])
    api.worker.redis.hset("q:2:models", "scenes", rebuilt.model_dump_json())
    await api.services.catalog.models(max_age_s=0.0)

    for method in ("GET", "DELETE"):
        response = await api.client.request(method, f"/v1/images/{accepted['id']}")
        job = response.json()
        assert (response.status_code, job["size"], job["steps"], job["eta_s"]) == (200, "64x96", 4, None)
    content = await api.client.get(f"/v1/images/{accepted['id']}/content")
    assert error_of(content)[1] != "size_not_served"
    refused = await api.post({"size": "64x96"})
    assert error_of(refused) == (422, "size_not_served", "size")


async def test_bundle_that_was_never_measured_promises_no_time(api: Api) -> None:
    api.worker.redis.hset("q:2:models", "scenes", make_manifest(latency=[]).model_dump_json())
    await api.services.catalog.models(max_age_s=0.0)

    accepted = await api.post({"wait_s": 0})
    assert (accepted.status_code, accepted.json()["eta_s"]) == (202, None)


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


@pytest.mark.parametrize("public_url", ["https://pictures.example.com", "https://example.com:8443/tdm/"])
async def test_links_lead_where_the_operator_says(redis_url: str, tmp_path: Path, public_url: str) -> None:
    settings = Settings(redis_url=redis_url, data_dir=tmp_path, public_url=public_url)
    async with running_api(settings) as api:
        api.worker.announce()
        job = (await api.draw()).json()
        (image,) = job["data"]
        assert image["url"] == f"{public_url.rstrip('/')}/v1/images/{job['id']}/content?index=0"
        waiting = await api.post({"wait_s": 0})
        assert waiting.headers["location"] == f"{public_url.rstrip('/')}/v1/images/{waiting.json()['id']}"


async def test_pages_of_named_origins_may_call_and_others_may_not(redis_url: str, tmp_path: Path) -> None:
    settings = Settings(
        redis_url=redis_url, data_dir=tmp_path, cors_origins="https://ui.example.com, http://localhost:3000"
    )
    async with running_api(settings) as api:
        for origin, allowed in (("https://ui.example.com", True), ("https://elsewhere.example.com", False)):
            asked = {
                "access-control-request-method": "POST",
                "access-control-request-headers": "idempotency-key",
            }
            preflight = await api.client.options("/v1/images", headers={"origin": origin, **asked})
            assert (preflight.status_code == 200) is allowed
            refused = await api.post({"n": 0}, headers={"origin": origin})  # it may read why
            assert error_of(refused)[0] == 422
            for answer in (preflight, refused):
                told = answer.headers.get("access-control-allow-origin")
                assert told == (origin if allowed else None)


async def test_no_page_but_ours_may_call_unless_told(api: Api) -> None:
    answer = await api.post({"n": 0}, headers={"origin": "https://ui.example.com"})
    assert "access-control-allow-origin" not in answer.headers
