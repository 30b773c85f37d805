"""Spans: what the api process tells of a request, and of the job that it puts into the queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import Scope

from server.job import Job
from server.tracing import NO_SPAN, Kind, Span, Tracing, current_span, messaging, parse_traceparent

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
PROBES = frozenset({"/healthz", "/readyz"})


def begin_request(tracing: Tracing, scope: Scope) -> Span:
    """The span of an HTTP request, in the trace of a caller who sent one valid `traceparent`.

    Probes have none. The query is left out: it may hold anything.
    """
    given = Headers(scope=scope).getlist("traceparent")
    parent = Span(parse_traceparent(given[0])) if len(given) == 1 else NO_SPAN
    if not tracing.is_on or scope["path"] in PROBES:
        return parent
    method = scope["method"]
    attributes = {
        "http.request.method": method if method in METHODS else "_OTHER",
        "url.scheme": scope["scheme"],
        "url.path": scope["path"],
        "network.protocol.version": scope["http_version"],
    }
    if method not in METHODS:
        attributes["http.request.method_original"] = method
    return tracing.start(_name(method), Kind.SERVER, parent, attributes)


def end_request(
    span: Span, scope: Scope, status: int, *, job_id: str | None, failure: Exception | None
) -> None:
    """The request has been answered.

    Args:
        span: from `begin_request`.
        scope: with the route, if there is one.
        status: of the response; 0 if the client left before there was one.
        job_id: the job that it was about.
        failure: what nobody caught.
    """
    if not span.is_recorded:
        return
    if route := getattr(scope.get("route"), "path", None):
        span.rename(f"{_name(scope['method'])} {route}")
        span.set({"http.route": route})
    if status:
        span.set({"http.response.status_code": status})
    if job_id:
        span.set({"tdm.job.id": job_id})
    if failure is not None:
        span.fail(type(failure).__qualname__)
    elif status >= 500:
        span.fail(str(status))
    span.end()


@contextmanager
def sending(tracing: Tracing, job: Job) -> Iterator[Span]:
    """The span of a job's way into the queue; whoever takes the job goes on from it."""
    attributes = {
        **messaging("send", job.model, job.id),
        "tdm.job.kind": job.kind.value,
        "tdm.num_samples": job.request.num_samples,
        "tdm.num_steps": job.request.num_steps,
    }
    span = tracing.start(f"send {job.model}", Kind.PRODUCER, current_span.get(), attributes)
    try:
        yield span
    except Exception as error:
        span.fail(type(error).__qualname__)
        raise
    finally:
        span.end()


def _name(method: str) -> str:
    return method if method in METHODS else "HTTP"
