"""Series: what an api process counts, at 0 from the start (`server/metrics.py` says why)."""

from __future__ import annotations

from fastapi.routing import APIRoute, APIRouter

from server.api.admission import Refusal
from server.api.handlers import CLIENT_GONE_STATUS
from server.job import JobKind
from server.metrics import Metrics, Outcome
from server.queue.ops import API_OPS

FAILING = ("request", "stats")
"""Where this process notices that Redis does not answer."""
ENDED_HERE = (Outcome.CANCELLED, Outcome.DEADLINE)
"""How jobs end that no worker has started."""


def begin_routes(metrics: Metrics, router: APIRouter) -> None:
    """Begin a router's routes, each with every status that it is documented to answer."""
    for route in router.routes:
        if not isinstance(route, APIRoute):
            continue
        metrics.http_request_duration.labels(route.path)
        for code in {route.status_code or 200, *route.responses, CLIENT_GONE_STATUS}:
            for method in route.methods or ():
                metrics.http_requests.labels(route.path, method, str(code))


def begin_process(metrics: Metrics) -> None:
    """Begin what depends on no route and no model."""
    for op in API_OPS:
        metrics.redis_op.labels(op)
    for op in FAILING:
        metrics.redis_errors.labels(op)
    metrics.storage_op.labels("get")


def begin_model(metrics: Metrics, model: str, kind: JobKind) -> None:
    """Begin what is counted by model; again is of no effect."""
    for reason in Refusal:
        metrics.jobs_rejected.labels(model, kind, reason)
    for outcome in ENDED_HERE:
        metrics.jobs.labels(model, kind, outcome)
    metrics.jobs_archived.labels(model)
    metrics.accepted_work.labels(model)
    metrics.eta.labels(model, kind)
