"""Over the wire: pictures, OpenAI's own client, errors, metrics."""

from __future__ import annotations

import base64
import io
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.system import System, poll

CLOCK_ERROR_MS = 25.0
"""What api and worker may be apart: half of the quickest of five answers of Redis each, on a busy machine."""


def image_of(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


@pytest.fixture(scope="module")
def client(system: System) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system.url}/v1", api_key="none", max_retries=0)


def test_openais_client_gets_a_picture(client: openai.OpenAI) -> None:
    reply = client.images.generate(prompt="a red cube", extra_body={"seed": 7, "steps": 2})

    assert reply.data is not None
    assert reply.data[0].b64_json is not None
    assert image_of(base64.b64decode(reply.data[0].b64_json)).size == (64, 64)
    assert reply.model_extra is not None
    assert (reply.model_extra["seed"], reply.model_extra["steps"]) == (7, 2)


def test_what_the_model_does_not_hear_of_a_prompt_is_told(client: openai.OpenAI, http: httpx.Client) -> None:
    reply = client.images.generate(prompt="a red cube on a zebra")
    assert reply.model_extra is not None
    assert reply.model_extra["warnings"] == ["the model does not know: zebra"]

    job = http.post("/v1/images", json={"prompt": "very " * 30 + "red cube"}).json()
    assert [warning.partition(":")[0] for warning in job["warnings"]] == [
        "the model does not know",
        "the model reads 19 tokens of this prompt and not the rest",
    ]
    assert http.get(f"/v1/images/{job['id']}").json()["warnings"] == job["warnings"]
    assert http.post("/v1/images", json={"prompt": "a red cube"}).json()["warnings"] == []


def test_openais_client_gets_urls_that_work(client: openai.OpenAI) -> None:
    reply = client.images.generate(
        prompt="a red cube", n=2, size="64x64", response_format="url", output_format="webp", user="u"
    )

    assert reply.data is not None
    images = [image_of(httpx.get(str(one.url), timeout=60).content) for one in reply.data]
    assert [(one.format, one.size) for one in images] == [("WEBP", (64, 64))] * 2


def test_openais_client_raises_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as unprocessable:
        client.images.generate(prompt="a red cube", size="1024x1024")
    with pytest.raises(openai.NotFoundError) as not_found:
        client.images.generate(prompt="a red cube", model="dall-e-3")

    assert (unprocessable.value.code, unprocessable.value.param) == ("size_not_served", "size")
    assert "64x64" in unprocessable.value.message
    assert not_found.value.code == "model_not_found"
    assert unprocessable.value.request_id


def test_openais_client_lists_the_model(client: openai.OpenAI) -> None:
    models = client.models.list().data

    assert [model.id for model in models] == ["tiny"]
    assert client.models.retrieve("tiny") == models[0]


def test_same_seed_gives_the_same_picture_alone_and_in_company(http: httpx.Client) -> None:
    def pixels(job: dict[str, list[dict[str, str]]], index: int) -> Image.Image:
        return image_of(base64.b64decode(job["data"][index]["b64_json"]))

    body = {"prompt": "a red cube", "response_format": "b64_json"}
    alone = http.post("/v1/images", json={**body, "seed": 12}).json()
    company = http.post("/v1/images", json={**body, "seed": 10, "n": 4}).json()

    first, second = pixels(alone, 0).tobytes(), pixels(company, 2).tobytes()
    # One level of 256 is the stated tolerance between batch sizes.
    assert max(abs(a - b) for a, b in zip(first, second, strict=True)) <= 1


def test_accepted_image_type_is_answered_with_bytes(http: httpx.Client) -> None:
    response = http.post("/v1/images", json={"prompt": "a red cube"}, headers={"accept": "image/jpeg"})

    assert (image_of(response.content).format, response.headers["content-type"]) == ("JPEG", "image/jpeg")


def test_stages_of_a_job_add_up(http: httpx.Client) -> None:
    sent_at = time.perf_counter()
    timing = http.post("/v1/images", json={"prompt": "a red cube"}).json()["timing_ms"]
    took_ms = (time.perf_counter() - sent_at) * 1000

    in_worker = [timing[name] for name in ("batch", "encode", "denoise", "decode", "pack", "store")]
    assert all(spent >= 0 for spent in (*in_worker, timing["queue"], timing["total"]))
    assert timing["denoise"] > 0
    # One after the other, by one clock, while the client waited.
    assert sum(in_worker) <= took_ms
    # These two begin by the api's clock and end by the worker's.
    assert timing["queue"] + sum(in_worker) <= timing["total"] + CLOCK_ERROR_MS
    assert timing["total"] <= took_ms + CLOCK_ERROR_MS


def test_job_is_followed_from_queue_to_picture(http: httpx.Client) -> None:
    accepted = http.post("/v1/images", json={"prompt": "a red cube", "wait_s": 0})
    assert accepted.status_code == 202

    def finished() -> dict[str, object] | None:
        job: dict[str, object] = http.get(accepted.headers["location"]).json()
        return job if job["status"] not in ("queued", "in_progress") else None

    assert poll(finished)["status"] == "completed"
    assert image_of(http.get(f"{accepted.headers['location']}/content").content).size == (64, 64)


@pytest.mark.parametrize(
    ("method", "path", "body", "content_type", "status", "code"),
    [
        ("POST", "/v1/images", b"{", "application/json", 400, "invalid_json"),
        ("POST", "/v1/images", b"{}", "text/plain", 415, "unsupported_media_type"),
        ("POST", "/v1/images", b"{}", "application/json", 422, "missing_parameter"),
        ("POST", "/v1/images", b'{"prompt": "a", "x": 1}', "application/json", 422, "unknown_parameter"),
        ("POST", "/v1/images", b'{"prompt": "a", "n": 99}', "application/json", 422, "invalid_value"),
        ("POST", "/v1/images", b'{"prompt": "a", "size": "9x9"}', "application/json", 422, "size_not_served"),
        ("POST", "/v1/images", b'{"prompt": "a", "steps": 3}', "application/json", 422, "steps_not_served"),
        ("POST", "/v1/images", b'{"prompt": "a", "model": "x"}', "application/json", 404, "model_not_found"),
        (
            "POST",
            "/v1/images/generations",
            b'{"prompt": "a", "stream": true}',
            "application/json",
            422,
            "unsupported_parameter",
        ),
        ("POST", "/v1/images", b'"%s"' % (b"x" * 3000), "application/json", 400, "invalid_json"),
        (
            "POST",
            "/v1/images",
            b'{"prompt": "%s"}' % (b"x" * 3000),
            "application/json",
            422,
            "prompt_too_long",
        ),
        ("POST", "/v1/images", b" " * 2_000_000, "application/json", 413, "body_too_large"),
        ("PATCH", "/v1/images", b"", "application/json", 405, "method_not_allowed"),
        ("GET", "/v1/images/img_1", b"", "", 404, "job_not_found"),
        ("GET", "/elsewhere", b"", "", 404, "route_not_found"),
        ("POST", "/v1/videos", b'{"prompt": "a"}', "application/json", 404, "model_not_found"),
    ],
)
def test_bad_request_gets_its_error_over_the_wire(
    http: httpx.Client, method: str, path: str, body: bytes, content_type: str, status: int, code: str
) -> None:
    response = http.request(method, path, content=body, headers={"content-type": content_type})

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["x-request-id"]


def test_client_that_hangs_up_while_its_job_waits_takes_the_job_along(
    system: System, http: httpx.Client
) -> None:
    # The worker is held, so the job cannot start before the client is gone.
    worker = system.worker()
    worker.suspend()
    try:
        # One job may already sit in the worker's hands; behind it, ours waits in the queue.
        body = json.dumps({"prompt": "a red cube", "n": 10}).encode()
        with socket.create_connection((urlsplit(system.url).hostname, urlsplit(system.url).port)) as raw:
            raw.sendall(
                b"POST /v1/images HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\n"
                b"content-length: %d\r\n\r\n%s" % (len(body), body)
            )
            poll(lambda: readiness(http)["waiting"] == 1)
        poll(lambda: readiness(http)["waiting"] == 0)
    finally:
        worker.resume()

    assert readiness(http)["running"] == 0


def readiness(http: httpx.Client) -> dict[str, int]:
    model: dict[str, int] = http.get("/readyz").json()["models"]["tiny"]
    return model


def scrape(system: System) -> dict[tuple[str, ...], float]:
    """Samples of the worker's and the api's metrics, by name and sorted label values; the api's where both
    have one: what it reads from Redis stands at 0 in a worker.
    """
    texts = [httpx.get(f"http://127.0.0.1:{system.metrics_port + i}/metrics").text for i in (1, 0)]
    assert all("torus" not in text and "img_" not in text for text in texts)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for text in texts
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_tell_what_happened_and_nothing_private(system: System, http: httpx.Client) -> None:
    http.post("/v1/images", json={"prompt": "a rare purple torus"})

    samples = scrape(system)
    assert samples["tdm_http_requests_total", "/v1/images", "200", "POST"] >= 1
    assert samples["tdm_jobs_total", "done", "image", "tiny"] >= 1
    assert samples["tdm_batch_size_count", "tiny"] >= 1
    assert samples["tdm_output_engine_seconds_count", "tiny"] >= 1
    assert samples["tdm_eta_ratio_count", "image", "tiny"] >= 1
    for stage in ("queue", "batch_wait", "encode", "denoise", "decode", "pack", "store"):
        assert samples["tdm_job_stage_seconds_count", *sorted((stage, "image", "tiny"))] >= 1
    poll(lambda: scrape(system).get(("tdm_workers_live", "tiny")) == 1)  # read from Redis every few seconds
    poll(lambda: scrape(system)[("tdm_redis_aof_ok",)] == 1)  # and so is this, a moment later
    samples = scrape(system)
    assert (samples["tdm_queue_capacity", "tiny"], samples["tdm_queue_limit", "tiny"]) == (4, 256)
    assert samples["tdm_wait_margin_ratio", "tiny"] >= 1  # nothing was late
    assert 0 < samples[("tdm_redis_memory_bytes",)] < samples[("tdm_redis_memory_limit_bytes",)]
    assert http.get("/metrics").status_code == 404


def test_log_is_one_json_object_a_line_without_prompts(system: System, http: httpx.Client) -> None:
    http.post("/v1/images", json={"prompt": "a rare green cone"}, headers={"x-request-id": "look-for-me"})

    def logged() -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in system.log.splitlines(keepends=True) if _is_whole_json(line)]
        return [line for line in lines if line.get("request_id") == "look-for-me"]

    # the line is written once the answer is sent, which the client may notice first
    found = poll(logged)
    assert [(line["route"], line["status"]) for line in found] == [("/v1/images", 200)]
    assert "green cone" not in system.log


def _is_whole_json(line: str) -> bool:
    return line.startswith("{") and line.endswith("\n")
