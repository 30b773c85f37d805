"""ASGI middleware around every request: its id, span, log line, metrics, size limit and last resort."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, BodyTooLargeError, InternalError, RequestTimeoutError
from server.api.spans import METHODS, PROBES, begin_request, end_request
from server.job import created_ms_of
from server.logs import bound
from server.metrics import Metrics
from server.tracing import NO_TRACING, Tracing, current_span

MAX_BODY_BYTES = 64 * 1024
DRAIN_BYTES = 1024 * 1024
BODY_TIMEOUT_S = 10.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

logger = logging.getLogger("server.access")


def error_response(error: ApiError) -> JSONResponse:
    """The response for an API error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers())


class RequestContext:
    """Gives every request an id and a span, logs and counts it; what nobody caught becomes a plain 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing = NO_TRACING) -> None:
        self._app = app
        self._metrics = metrics
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request; the client's own x-request-id is kept if it is a sane one."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        span = begin_request(self._tracing, scope)
        token = current_span.set(span)
        try:
            with bound(request_id=request_id, **span.log_ids):
                await self._answer(scope, receive, send, request_id)
        finally:
            current_span.reset(token)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started = time.perf_counter()
        status = 0
        failure: Exception | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if scope.get("state", {}).get("replayed"):
                    headers["idempotent-replayed"] = "true"
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as uncaught:
            failure = uncaught
            logger.exception("unhandled exception")
            if status == 0:
                error = InternalError(f"internal error; it is logged under request id {request_id}")
                await error_response(error)(scope, receive, send_with_id)
        finally:
            job_id = _job_id_of(scope)
            end_request(current_span.get(), scope, status, job_id=job_id, failure=failure)
            self._count(scope, status, time.perf_counter() - started, job_id)

    def _count(self, scope: Scope, status: int, duration_s: float, job_id: str | None) -> None:
        # The template, never the path: one label value per route, and no ids in the log of a 404 scan.
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.http_requests.labels(route, method, str(status)).inc()
        self._metrics.http_request_duration.labels(route).observe(duration_s)
        # Probes come every few seconds for ever; they tell something only when somebody looks for it.
        logger.log(
            logging.DEBUG if route in PROBES else logging.INFO,
            "request",
            extra={
                "method": method,
                "route": route,
                "status": status,
                "duration_ms": round(duration_s * 1000, 1),
                **({"job_id": job_id} if job_id else {}),
            },
        )


def _job_id_of(scope: Scope) -> str | None:
    """The job that a request was about: the one it made, or the one in its path, if that is an id."""
    job_id = scope.get("state", {}).get("job_id") or scope.get("path_params", {}).get("job_id", "")
    return job_id if created_ms_of(job_id) is not None else None


class BodyLimit:
    """Reads the body before the application sees the request, and refuses more bytes than `MAX_BODY_BYTES`.

    Bytes are counted as they come: Content-Length may be absent or a lie.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run one request with its body at hand."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await _read_body(receive)
        except TimeoutError:
            error: ApiError = RequestTimeoutError(f"the body did not arrive within {BODY_TIMEOUT_S:g} s")
            await _refuse(error, scope, receive, send)
            return
        except BodyTooLargeError as error:
            await _refuse(error, scope, receive, send)
            return
        if body is None:  # the client left in the middle of it
            return
        replayed = False

        async def receive_body() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, receive_body, send)


async def _read_body(receive: Receive) -> bytes | None:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        elif size > DRAIN_BYTES:
            break
        if not message.get("more_body", False):
            break
    # Somewhat too large a body is read to its end: many clients look at the answer only after sending all of
    # it.
    if size > MAX_BODY_BYTES:
        raise BodyTooLargeError(f"the body has more than {MAX_BODY_BYTES} bytes")
    return b"".join(chunks)


async def _refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    response = error_response(error)
    response.headers["connection"] = "close"  # the rest of the body may still be on its way
    await response(scope, receive, send)
