"""Handlers: whatever is raised while a request is answered, as a response; in this one place."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from server.api.errors import (
    ApiError,
    InternalError,
    InvalidJsonError,
    InvalidRequestError,
    MethodNotAllowedError,
    MissingParameterError,
    QueueUnavailableError,
    RouteNotFoundError,
    StoreUnavailableError,
    UnknownParameterError,
)
from server.api.jobs import ClientGoneError
from server.api.middleware import error_response
from server.queue.archive import ArchiveError
from server.queue.errors import QueueError

CLIENT_GONE_STATUS = 499
QUEUE_RETRY_MS = 1000

logger = logging.getLogger(__name__)


async def _on_api_error(_: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_client_gone(_: Request, __: ClientGoneError) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)  # read by the access log alone


async def _on_queue_error(request: Request, error: QueueError) -> Response:
    request.app.state.services.metrics.redis_errors.labels("request").inc()
    logger.warning("queue unavailable: %s", type(error).__name__)
    return error_response(
        QueueUnavailableError("the queue does not answer; try again shortly", retry_after_ms=QUEUE_RETRY_MS)
    )


async def _on_archive_error(_: Request, error: ArchiveError) -> Response:
    logger.warning("%s", error)
    return error_response(
        StoreUnavailableError("the result store, which has this job, does not answer", retry_after_ms=1000)
    )


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """What Starlette and FastAPI raise on their own: no such route, no such method, an undecodable body."""
    match error.status_code:
        case 404:
            api_error: ApiError = RouteNotFoundError(f"there is no {request.url.path}; see /openapi.json")
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            api_error = MethodNotAllowedError(
                f"{request.method} is not allowed here" + (f"; allowed are: {allowed}" if allowed else "")
            )
        case 400:
            api_error = InvalidJsonError("the body is not valid JSON")
        case _:
            api_error = InternalError(f"unexpected status {error.status_code}")
    response = error_response(api_error)
    response.headers.update(error.headers or {})
    return response


async def _on_validation_error(_: Request, error: RequestValidationError) -> Response:
    return error_response(describe_validation(error.errors()))


def describe_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """One API error for what pydantic found: the first problem's field and code, all in the message."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return InvalidJsonError(f"the body is not valid JSON: {first['ctx']['error']}")
    where = [".".join(str(part) for part in problem["loc"][1:]) for problem in problems]
    if not where[0]:
        return InvalidJsonError("the body must be a JSON object")
    kind = {"missing": MissingParameterError, "extra_forbidden": UnknownParameterError}.get(
        first["type"], InvalidRequestError
    )
    return kind(
        "; ".join(f"{name}: {problem['msg']}" for name, problem in zip(where, problems, strict=True)),
        param=where[0],
    )


HANDLERS: dict[type[Exception], Any] = {
    ApiError: _on_api_error,
    ClientGoneError: _on_client_gone,
    QueueError: _on_queue_error,
    ArchiveError: _on_archive_error,
    HTTPException: _on_http_exception,
    RequestValidationError: _on_validation_error,
}
