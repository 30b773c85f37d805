"""What an api process counts is there before anything happens."""

from __future__ import annotations

from prometheus_client import generate_latest

from server.api.app import create_app
from server.api.series import begin_model
from server.job import JobKind
from server.metrics import Metrics
from server.settings import Settings


def test_errors_of_every_route_can_be_seen_to_rise_from_zero() -> None:
    metrics = Metrics()
    create_app(Settings(redis_url="redis://nobody"), metrics=metrics)
    lines = generate_latest(metrics.registry).decode().splitlines()

    for code in (200, 202, 429, 499, 500, 503):
        assert f'tdm_http_requests_total{{code="{code}",method="POST",route="/v1/images"}} 0.0' in lines
    assert 'tdm_http_requests_total{code="404",method="GET",route="/v1/videos/{job_id}"} 0.0' in lines
    assert 'tdm_redis_errors_total{op="request"} 0.0' in lines
    assert 'tdm_redis_op_seconds_count{op="enqueue"} 0.0' in lines


def test_model_begins_with_its_refusals_and_what_was_counted_stays() -> None:
    metrics = Metrics()
    refused = {"class": "scenes", "kind": "image", "reason": "queue"}
    begin_model(metrics, "scenes", JobKind.IMAGE)
    assert metrics.registry.get_sample_value("tdm_jobs_rejected_total", refused) == 0
    metrics.jobs_rejected.labels("scenes", "image", "queue").inc()

    begin_model(metrics, "scenes", JobKind.IMAGE)

    assert metrics.registry.get_sample_value("tdm_jobs_rejected_total", refused) == 1
