"""Traces of requests: who called, what was put into the queue, and nothing that a client wrote."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from server.logs import JsonFormatter
from server.settings import Settings
from server.tracing import parse_traceparent
from tests.server.api.running import Api, running_api
from tests.server.collector import Collector
from tests.server.conftest import poll_async

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
SECRET = "a heron that nobody may hear of"


@pytest.fixture
def traced(settings: Settings, collector: Collector) -> Settings:
    return settings.model_copy(update={"otlp_endpoint": collector.url})


class Lines(logging.Handler):
    """Keeps what would be written."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []
        self.setFormatter(JsonFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))


@pytest.fixture
def access() -> Iterator[list[dict[str, Any]]]:
    """Lines of the access log."""
    handler, logger = Lines(), logging.getLogger("server.access")
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(before)


async def test_request_is_one_trace_from_its_caller_to_the_job_in_the_queue(
    traced: Settings, collector: Collector, access: list[dict[str, Any]]
) -> None:
    async with running_api(traced) as api:
        api.worker.announce()
        response = await api.draw(
            {"prompt": SECRET, "n": 2},
            headers={"traceparent": TRACEPARENT, "x-secret": SECRET},
            params={"q": SECRET},
        )
        assert response.status_code == 200
        (job,) = api.worker.jobs()

    request, sent = collector.one("POST /v1/images"), collector.one("send scenes")
    assert (request.service, request.kind, request.trace_id, request.parent_id) == (
        "tdm-api",
        "server",
        TRACE,
        CALLER,
    )
    assert request.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "http.route": "/v1/images",
        "network.protocol.version": "1.1",
        "tdm.job.id": job.id,
        "url.path": "/v1/images",
        "url.scheme": "http",
    }
    assert (sent.kind, sent.trace_id, sent.parent_id) == ("producer", TRACE, request.span_id)
    assert sent.attributes == {
        "messaging.destination.name": "scenes",
        "messaging.message.id": job.id,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.system": "redis",
        "tdm.job.id": job.id,
        "tdm.job.kind": "image",
        "tdm.num_samples": 2,
        "tdm.num_steps": 4,
    }
    assert job.traceparent == f"00-{TRACE}-{sent.span_id}-01"
    assert request.begun_ns <= sent.begun_ns <= sent.ended_ns <= request.ended_ns
    assert all(SECRET.encode() not in body for body in collector.bodies)
    (line,) = access
    assert (line["trace_id"], line["span_id"], line["job_id"]) == (TRACE, request.span_id, job.id)


async def test_without_tracing_the_callers_trace_is_in_the_log_and_in_the_job(
    api: Api, access: list[dict[str, Any]]
) -> None:
    await api.post({"wait_s": 0}, headers={"traceparent": TRACEPARENT})
    await api.post({"wait_s": 0}, headers={"traceparent": TRACEPARENT + "-more"})
    await api.post({"wait_s": 0}, headers=[("traceparent", TRACEPARENT), ("traceparent", TRACEPARENT)])

    by_id = {job.id: job.traceparent for job in api.worker.jobs()}
    assert [by_id[line["job_id"]] for line in access] == [TRACEPARENT, None, None]
    assert [line.get("trace_id") for line in access] == [TRACE, None, None]
    assert all("span_id" not in line for line in access)


async def test_caller_that_does_not_want_its_trace_recorded_is_obeyed_by_all_that_follows(
    traced: Settings, collector: Collector
) -> None:
    async with running_api(traced) as api:
        api.worker.announce()
        await api.post({"wait_s": 0}, headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
        (job,) = api.worker.jobs()

    assert collector.spans == []
    passed_on = parse_traceparent(job.traceparent or "")
    assert passed_on is not None
    assert (passed_on.trace_id, passed_on.sampled) == (TRACE, False)


async def test_repeated_request_sends_no_job_and_is_linked_to_the_trace_of_the_first(
    traced: Settings, collector: Collector
) -> None:
    headers = {"idempotency-key": "one"}
    async with running_api(traced) as api:
        api.worker.announce()
        first = await api.post({"wait_s": 0, "seed": 7}, headers=headers)
        again = await api.post({"wait_s": 0, "seed": 7}, headers=headers)
        refused = await api.post({"wait_s": 0, "seed": 8}, headers=headers)
        (job,) = api.worker.jobs()

    assert [one.status_code for one in (first, again, refused)] == [202, 202, 422]
    sent, repeated, mismatch = collector.named("send scenes")
    assert job.traceparent == f"00-{sent.trace_id}-{sent.span_id}-03"  # sampled, a random trace id
    assert repeated.attributes["tdm.job.id"] == job.id
    assert repeated.attributes["tdm.replayed"] is True
    assert (repeated.is_error, mismatch.is_error) == (False, True)
    assert mismatch.attributes["error.type"] == "mismatch"
    requests = collector.named("POST /v1/images")
    assert [request.links for request in requests] == [set(), {sent.place}, set()]
    assert len({request.trace_id for request in requests}) == 3


async def test_spans_are_named_by_known_methods_and_route_templates_and_probes_have_none(
    traced: Settings, collector: Collector
) -> None:
    async with running_api(traced) as api:
        await api.client.get("/healthz")
        await api.client.get("/nowhere")
        await api.client.request("BREW", "/v1/images")
        await api.client.get("/v1/images/img_of_nobody")

    assert [span.name for span in collector.spans] == ["GET", "HTTP /v1/images", "GET /v1/images/{job_id}"]
    brewed = collector.one("HTTP /v1/images").attributes
    assert (brewed["http.request.method"], brewed["http.request.method_original"]) == ("_OTHER", "BREW")
    lookup = collector.one("GET /v1/images/{job_id}")
    assert (lookup.attributes["http.response.status_code"], lookup.is_error) == (404, False)
    assert "tdm.job.id" not in lookup.attributes


async def test_answer_that_is_our_fault_is_an_error(traced: Settings, collector: Collector) -> None:
    async with running_api(traced) as api:
        assert (await api.post()).status_code == 503  # nobody serves it
        api.app.state.services = None
        assert (await api.client.get("/v1/models")).status_code == 500

    unavailable, broken = collector.one("POST /v1/images"), collector.one("GET /v1/models")
    assert (unavailable.is_error, unavailable.attributes["error.type"]) == (True, "503")
    assert (broken.is_error, broken.attributes["error.type"]) == (True, "AttributeError")


async def test_job_that_no_worker_starts_in_time_shows_it_in_its_trace(
    settings: Settings, collector: Collector
) -> None:
    hurried = settings.model_copy(update={"otlp_endpoint": collector.url, "job_deadline_s": 0.2})
    async with running_api(hurried) as api:
        api.worker.announce()
        await api.post({"wait_s": 0, "steps": 1})
        (job,) = api.worker.jobs()

        async def is_swept() -> bool:
            await api.services.queue.sweep()
            (seen,) = api.worker.jobs()
            return seen.finished

        await poll_async(is_swept)

    sent, settled = collector.one("send scenes"), collector.one("settle scenes")
    assert (settled.kind, settled.trace_id, settled.parent_id) == ("client", sent.trace_id, sent.span_id)
    assert (settled.is_error, settled.attributes["error.type"]) == (True, "deadline")
    assert (settled.attributes["tdm.job.id"], settled.attributes["tdm.attempt"]) == (job.id, 0)
