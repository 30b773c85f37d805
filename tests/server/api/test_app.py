"""The HTTP API over a real Valkey and a real store. The test plays the worker: nothing is left to timing."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engines.bundle.bucket import Bucket
from server.settings import Settings
from tests.server.api.running import Api, error_of, running_api
from tests.server.manifests import EXAMPLES

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


@pytest.mark.parametrize("margin", [1.0, 2.0])
async def test_burst_is_accepted_up_to_what_can_be_done_in_time(
    redis_url: str, tmp_path: Path, margin: float
) -> None:
    """However much longer than predicted jobs had to wait lately: there is to be room for that."""
    settings = Settings(redis_url=redis_url, data_dir=tmp_path, max_queue=1000, job_deadline_s=5.0)
    async with running_api(settings) as api:
        api.worker.announce()
        api.worker.redis.hset("q:2:{scenes}:pump", "margin", str(margin))
        model = (await api.services.catalog.models(max_age_s=0))["scenes"]  # of this one look all will go by
        asked = [api.post({"wait_s": 0, "n": 10, "seed": seed}) for seed in range(60)]
        responses = await asyncio.gather(*asked)
        stats = await api.services.queue.stats("scenes")

    batch_ms = model.batch_ms(Bucket(64, 64), 4)
    assert batch_ms is not None
    cost_ms, own_ms = 10 * batch_ms(8) / 8, 2 * batch_ms(8)  # one worker runs eight samples at once
    most = int((5000 - own_ms) / (margin * cost_ms)) + 1
    assert Counter(response.status_code for response in responses) == {202: most, 429: 60 - most}
    assert stats.waiting_ms == pytest.approx(most * cost_ms)
    promised = sorted(response.json()["eta_s"] for response in responses if response.status_code == 202)
    assert promised == pytest.approx([(i * cost_ms + own_ms) / 1000 for i in range(most)], abs=0.01)
    for response in responses:
        if response.status_code == 429:
            late_ms = most * margin * cost_ms + own_ms - 5000
            assert int(response.headers["retry-after-ms"]) == pytest.approx(late_ms, abs=2)


async def test_who_agrees_to_fewer_steps_gets_them_under_load(redis_url: str, tmp_path: Path) -> None:
    settings = Settings(redis_url=redis_url, data_dir=tmp_path, max_queue=1000, job_deadline_s=5.0)

    async def ask(api: Api, seed: int, **more: Any) -> Any:
        await api.services.catalog.models(max_age_s=0)  # sees those before it
        return await api.post({"wait_s": 0, "n": 10, "seed": seed, **more})

    async with running_api(settings) as api:
        api.worker.announce()
        answers = [await ask(api, seed, max_steps_under_load=3) for seed in range(100)]
        taken = [answer.json() for answer in answers if answer.status_code == 202]
        firm = await ask(api, 100)
        agreed = await ask(api, 100, steps=1, max_steps_under_load=2)

    steps = [job["steps"] for job in taken]
    assert steps == sorted(steps, reverse=True)
    assert set(steps) == {4, 2}
    etas = dict(zip(steps, (job["eta_s"] for job in taken), strict=True))  # of the last one each
    assert etas[4] <= 2.5 < etas[2] <= 5.0
    assert len(taken) < 100  # even so there is an end
    assert [error_of(answer) for answer in (firm, agreed)] == [(429, "queue_full", None)] * 2


async def test_a_key_finds_its_job_whatever_steps_the_load_allows(redis_url: str, tmp_path: Path) -> None:
    settings = Settings(redis_url=redis_url, data_dir=tmp_path, job_deadline_s=5.0)
    body, key = {"wait_s": 0, "seed": 1, "max_steps_under_load": 2}, {"idempotency-key": "k"}
    async with running_api(settings) as api:
        api.worker.announce()
        idle = await api.post(body, headers=key)
        for seed in range(10):
            await api.post({"wait_s": 0, "n": 10, "seed": seed})
        await api.services.catalog.models(max_age_s=0)
        busy = await api.post(body, headers=key)
        other = await api.post({**body, "max_steps_under_load": 1}, headers=key)

    assert (busy.json()["id"], busy.json()["steps"]) == (idle.json()["id"], 4)
    assert error_of(other)[:2] == (422, "idempotency_mismatch")


async def test_steps_that_no_load_would_allow_are_refused_at_any_time(settings: Settings) -> None:
    async with running_api(settings) as api:
        api.worker.manifest = api.worker.manifest.model_copy(update={"num_steps": [2, 4]})
        api.worker.announce()

        response = await api.post({"wait_s": 0, "max_steps_under_load": 1})

    assert error_of(response) == (422, "steps_not_served", "max_steps_under_load")
    assert "needs 2" in response.json()["error"]["message"]


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
    ({"max_steps_under_load": 0}, 422, "invalid_value", "max_steps_under_load"),
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
        assert f'"playground/{name}"' in page.text  # so that it works behind a proxy's prefix, too


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
