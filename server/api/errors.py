"""Everything the HTTP API can refuse or fail with: one class per case, each with its status and stable code.

Responses have OpenAI's shape, `{"error": {"message", "type", "code", "param"}}`, so that every OpenAI client
turns them into its own exceptions. `server.api.handlers` turns these classes into responses.
"""

from __future__ import annotations

import math
from typing import ClassVar


class ApiError(Exception):
    """Base of all API errors.

    Attributes:
        status: HTTP status of the response.
        code: stable machine-readable name; clients may switch on it.
        type: OpenAI's family of the error.
        retry: what the `x-should-retry` header tells OpenAI clients; None leaves it to the status.
        message: for people: what was wrong, and what would be right.
        param: the field of the request at fault.
        retry_after_ms: when trying again makes sense.
        extra_headers: what else the response says.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    retry: ClassVar[bool | None] = None

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_ms: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms
        self.extra_headers: dict[str, str] = {}

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body of the response."""
        return {"error": {"message": self.message, "type": self.type, "code": self.code, "param": self.param}}

    def headers(self) -> dict[str, str]:
        """Retry hints, in the two forms that clients read: milliseconds (OpenAI) and whole seconds (HTTP);
        and `extra_headers`.
        """
        headers = dict(self.extra_headers)
        if self.retry_after_ms is not None:
            headers["retry-after-ms"] = str(math.ceil(self.retry_after_ms))
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_ms / 1000)))
        if self.retry is not None:
            headers["x-should-retry"] = "true" if self.retry else "false"
        return headers


class InvalidRequestError(ApiError):
    """The body is JSON, but a value in it is missing, has the wrong type or is out of range."""

    status = 422
    code = "invalid_value"
    type = "invalid_request_error"


class MissingParameterError(InvalidRequestError):
    """A required field is absent."""

    code = "missing_parameter"


class UnknownParameterError(InvalidRequestError):
    """A field that this route does not have."""

    code = "unknown_parameter"


class UnsupportedParameterError(InvalidRequestError):
    """A field that OpenAI's API has, with a value that this server cannot honour."""

    code = "unsupported_parameter"


class PromptTooLongError(InvalidRequestError):
    """The prompt has more characters than TDM_MAX_PROMPT_CHARS."""

    code = "prompt_too_long"


class SizeNotServedError(InvalidRequestError):
    """The model has no compiled bucket of this size."""

    code = "size_not_served"


class LengthNotServedError(InvalidRequestError):
    """The model has no compiled bucket of this size with so many frames or seconds."""

    code = "length_not_served"


class FpsNotServedError(InvalidRequestError):
    """The model's videos have another number of frames per second."""

    code = "fps_not_served"


class WrongKindError(InvalidRequestError):
    """An image model was asked for a video, or a video model for an image."""

    code = "wrong_kind"


class StepsNotServedError(InvalidRequestError):
    """The student was not distilled for this number of steps."""

    code = "steps_not_served"


class IdempotencyMismatchError(InvalidRequestError):
    """An Idempotency-Key was used again with another body."""

    code = "idempotency_mismatch"


class InvalidJsonError(ApiError):
    """The body does not parse."""

    status = 400
    code = "invalid_json"
    type = "invalid_request_error"


class InvalidFormError(ApiError):
    """The body is declared as a form and does not parse as one."""

    status = 400
    code = "invalid_form"
    type = "invalid_request_error"


class InvalidHeaderError(ApiError):
    """A header that this server reads has a value that it cannot read."""

    status = 400
    code = "invalid_header"
    type = "invalid_request_error"


class RequestTimeoutError(ApiError):
    """The client sends its body too slowly."""

    status = 408
    code = "request_timeout"
    type = "invalid_request_error"


class BodyTooLargeError(ApiError):
    """The body has more bytes than any request needs."""

    status = 413
    code = "body_too_large"
    type = "invalid_request_error"


class UnsupportedMediaTypeError(ApiError):
    """The body is not declared as JSON, or where forms are read as one."""

    status = 415
    code = "unsupported_media_type"
    type = "invalid_request_error"


class RangeNotSatisfiableError(ApiError):
    """The part of the content that was asked for begins beyond its end."""

    status = 416
    code = "range_not_satisfiable"
    type = "invalid_request_error"


class RouteNotFoundError(ApiError):
    """No such path."""

    status = 404
    code = "route_not_found"
    type = "not_found_error"


class MethodNotAllowedError(ApiError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"
    type = "invalid_request_error"


class ModelNotFoundError(ApiError):
    """No worker serves, and no bundle here describes, a model of this name or kind."""

    status = 404
    code = "model_not_found"
    type = "not_found_error"


class JobNotFoundError(ApiError):
    """No job of this id, or it is older than TDM_RESULT_TTL_S."""

    status = 404
    code = "job_not_found"
    type = "not_found_error"


class VariantNotFoundError(ApiError):
    """The video was made by a worker that made no such preview."""

    status = 404
    code = "variant_not_found"
    type = "not_found_error"


class ResultNotReadyError(ApiError):
    """The job has no content yet. Not 409: OpenAI clients retry that on their own."""

    status = 404
    code = "result_not_ready"
    type = "not_found_error"


class ResultExpiredError(ApiError):
    """The job is known, its bytes are gone from the store."""

    status = 410
    code = "result_expired"
    type = "not_found_error"


class JobFailedError(ApiError):
    """The job ran and failed. Asking again without a change would most likely fail again."""

    status = 500
    code = "generation_failed"
    retry = False


class JobPoisonedError(JobFailedError):
    """The job was running each time one of several workers died; it will not be tried again."""

    code = "poison"


class NoLongerServedError(ApiError):
    """Before the job started, the model was replaced by one that does not draw this size or these steps."""

    status = 410
    code = "not_served"
    type = "invalid_request_error"
    retry = False


class DeadlineExceededError(ApiError):
    """The job did not start before its deadline, or the client's wait ended before the job did."""

    status = 504
    code = "deadline_exceeded"
    retry = False


class JobCancelledError(ApiError):
    """The job was cancelled through the API while this request waited for it."""

    status = 410
    code = "cancelled"
    type = "invalid_request_error"
    retry = False


class QueueFullError(ApiError):
    """As many jobs wait as TDM_MAX_QUEUE allows, or more than can finish before their deadline."""

    status = 429
    code = "queue_full"
    type = "rate_limit_error"


class TenantFullError(QueueFullError):
    """This tenant has as many jobs in flight as it may."""

    code = "tenant_full"


class OverloadedError(ApiError):
    """The queue's memory is nearly full."""

    status = 503
    code = "overloaded"
    type = "overloaded_error"


class NoWorkerError(ApiError):
    """No live worker serves the model, or any model."""

    status = 503
    code = "no_worker"
    type = "overloaded_error"


class QueueUnavailableError(ApiError):
    """Redis does not answer."""

    status = 503
    code = "queue_unavailable"
    type = "overloaded_error"


class StoreUnavailableError(ApiError):
    """The result store does not answer."""

    status = 503
    code = "store_unavailable"
    type = "overloaded_error"


class ShuttingDownError(ApiError):
    """The process is about to end, and the job was not finished in time."""

    status = 503
    code = "shutting_down"
    type = "overloaded_error"


class InternalError(ApiError):
    """Our own bug; the log has the details under the response's x-request-id."""


def all_errors() -> list[type[ApiError]]:
    """Every class of the tree, base included; for the OpenAPI document and its test."""
    found: list[type[ApiError]] = [ApiError]
    for cls in found:
        found.extend(cls.__subclasses__())
    return found
