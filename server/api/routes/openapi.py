"""What routes share: documented errors, headers, JSON in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Header, Request, Response
from pydantic import BaseModel

from server.api.errors import (
    ApiError,
    BodyTooLargeError,
    DeadlineExceededError,
    IdempotencyMismatchError,
    InternalError,
    InvalidHeaderError,
    InvalidJsonError,
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobPoisonedError,
    MissingParameterError,
    ModelNotFoundError,
    NoLongerServedError,
    NoWorkerError,
    OverloadedError,
    PromptTooLongError,
    QueueFullError,
    QueueUnavailableError,
    RequestTimeoutError,
    ResultExpiredError,
    ResultNotReadyError,
    SizeNotServedError,
    StepsNotServedError,
    StoreUnavailableError,
    TenantFullError,
    UnknownParameterError,
    UnsupportedMediaTypeError,
    WrongKindError,
)
from server.api.schemas import ErrorBody

BODY_ERRORS: tuple[type[ApiError], ...] = (
    InvalidJsonError,
    InvalidRequestError,
    MissingParameterError,
    UnknownParameterError,
    BodyTooLargeError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)

CREATE_ERRORS: tuple[type[ApiError], ...] = (
    InvalidHeaderError,
    PromptTooLongError,
    SizeNotServedError,
    StepsNotServedError,
    WrongKindError,
    IdempotencyMismatchError,
    ModelNotFoundError,
    QueueFullError,
    TenantFullError,
    OverloadedError,
    NoWorkerError,
)
"""Why a job of either kind is not accepted."""

CONTENT_ERRORS: tuple[type[ApiError], ...] = (
    JobNotFoundError,
    ResultNotReadyError,
    ResultExpiredError,
    StoreUnavailableError,
    InvalidRequestError,
    JobFailedError,
    JobPoisonedError,
    NoLongerServedError,
    JobCancelledError,
    DeadlineExceededError,
)
"""Why a job's bytes are not there."""

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="The same key and body give the same job and answer, also while it runs, for 24 hours "
        "or as long as the job is kept. Answers to a repetition carry `Idempotent-Replayed: true`.",
    ),
]


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
    media_type = media_type_of(request)
    if not is_json(media_type):
        raise UnsupportedMediaTypeError(
            f"content-type {media_type or '(none)'} is not supported; send application/json",
            param="content-type",
        )


def media_type_of(request: Request) -> str:
    """What a request's body is declared as, without parameters; empty if it is not."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(media_type: str) -> bool:
    """True for `application/json` and for the types that build on it."""
    return media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )


def json_response(
    view: BaseModel, *, status_code: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A body that needs no second validation."""
    return Response(
        view.model_dump_json(), status_code=status_code, media_type="application/json", headers=headers
    )
