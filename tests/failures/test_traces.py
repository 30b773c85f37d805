"""A trace through real processes: from HTTP to the stored result, across the death of a worker."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from tests.failures.deployment import MODEL, Deployment
from tests.failures.processes import PATIENCE_S, Api, Worker
from tests.server.collector import Collector
from tests.server.conftest import poll

TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SECRET = "a heron that nobody may hear of"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def accept(api: Api, number: int, *, flags: str = "01") -> str:
    """A job in a trace of its caller, which begins with the job's number; its id."""
    response = api.http.post(
        "/v1/images",
        json={"prompt": f"{SECRET}, number {number}", "wait_s": 0},
        headers={"traceparent": f"00-{number}{TRACE[1:]}-{CALLER}-{flags}"},
    )
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def lines_of(process: Api | Worker, message: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in process.log.splitlines() if line.startswith("{")]
    return [line for line in lines if line["message"] == message]


@pytest.mark.parametrize("redis_server", ["valkey"], indirect=True)
def test_trace_leads_from_the_request_to_the_result_across_the_death_of_a_worker(
    deployment: Deployment, collector: Collector
) -> None:
    api = deployment.api(otlp_endpoint=collector.url)
    first = deployment.worker("first", otlp_endpoint=collector.url).brake()
    second = deployment.worker("second", otlp_endpoint=collector.url).brake().wait_at_the_door()
    deployment.started(first)
    killed = accept(api, 1)
    poll(lambda: first.batches)
    first.kill()
    deployment.started(second)
    poll(lambda: second.batches, timeout_s=PATIENCE_S)
    together = [accept(api, 2), accept(api, 3)]
    unseen = accept(api, 4, flags="00")
    second.release()
    for job_id in (killed, *together, unseen):
        assert api.ended(job_id)["status"] == "completed"
    for process in (second, api):  # what they have not sent yet is sent at their end
        process.send(signal.SIGTERM)
        assert process.join() == 0, process.log

    assert len(second.batches) == 2
    batches = collector.named(f"batch {MODEL}")
    for number, job_id in enumerate((killed, *together), start=1):
        trace = [span for span in collector.spans if span.trace_id == f"{number}{TRACE[1:]}"]
        (request,) = [span for span in trace if span.name == "POST /v1/images"]
        (sent,) = [span for span in trace if span.name == f"send {MODEL}"]
        (processed,) = [span for span in trace if span.name == f"process {MODEL}"]
        assert (request.service, request.parent_id) == ("tdm-api", CALLER)
        assert (sent.service, sent.parent_id) == ("tdm-api", request.span_id)
        assert (processed.service, processed.parent_id) == ("tdm-worker", sent.span_id)
        assert processed.attributes["tdm.job.id"] == job_id
        assert processed.attributes["tdm.attempt"] == (2 if job_id == killed else 1)
        stages = ["batch_wait", "encode", "denoise", "decode", "pack", "store"]
        assert collector.children(processed) == (stages if job_id == killed else ["queue", *stages])
        batch = batches[0 if job_id == killed else 1]
        assert processed.links == {batch.place}
        assert processed.place in batch.links
        (line,) = [line for line in lines_of(second, "job done") if line["job_id"] == job_id]
        assert (line["trace_id"], line["span_id"]) == processed.place
        assert line["batch_id"] == batch.attributes["tdm.batch.id"]
        (line,) = [line for line in lines_of(api, "request") if line.get("trace_id") == processed.trace_id]
        assert (line["span_id"], line["job_id"]) == (request.span_id, job_id)
    assert [len(batch.links) for batch in batches] == [1, 2]
    assert not [span for span in collector.spans if span.trace_id == f"4{TRACE[1:]}"]
    written = [body.decode(errors="replace") for body in collector.bodies] + [api.log, first.log, second.log]
    assert not [text for text in written if SECRET in text]
