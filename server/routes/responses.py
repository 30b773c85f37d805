"""What routes share: documented errors, and the check that a body is JSON."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from server.errors import (
    ApiError,
    BodyTooLargeError,
    InternalError,
    InvalidJsonError,
    InvalidRequestError,
    MissingParameterError,
    QueueUnavailableError,
    RequestTimeoutError,
    UnknownParameterError,
    UnsupportedMediaTypeError,
)
from server.schemas import ErrorBody

BODY_ERRORS: tuple[type[ApiError], ...] = (
    InvalidJsonError,
    InvalidRequestError,
    MissingParameterError,
    UnknownParameterError,
    BodyTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)


def documented(*errors: type[ApiError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that can raise `errors`: their codes under each status."""
    codes: dict[int, list[str]] = {}
    common: tuple[type[ApiError], ...] = (QueueUnavailableError, InternalError)
    for error in (*errors, *common):
        codes.setdefault(error.status, []).append(error.code)
    return {
        status: {"model": ErrorBody, "description": "Error codes: " + ", ".join(dict.fromkeys(names))}
        for status, names in sorted(codes.items())
    }


async def require_json(request: Request) -> None:
    """Dependency of routes with a body.

    Raises:
        UnsupportedMediaTypeError: the body is declared as something else.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and not (
        content_type.startswith("application/") and content_type.endswith("+json")
    ):
        raise UnsupportedMediaTypeError(
            f"content-type {content_type or '(none)'} is not supported; send application/json",
            param="content-type",
        )
