"""Every way in which a request can fail has one class, one status, one stable code, and OpenAI's shape."""

import pytest

from server.api.errors import (
    ApiError,
    InternalError,
    JobPoisonedError,
    QueueFullError,
    SizeNotServedError,
    all_errors,
)

LEAVES = [error for error in all_errors() if error is not ApiError]


@pytest.mark.parametrize("error", LEAVES)
def test_body_has_openais_shape(error: type[ApiError]) -> None:
    body = error("what is wrong", param="field").body()

    assert body == {
        "error": {"message": "what is wrong", "type": error.type, "code": error.code, "param": "field"}
    }


@pytest.mark.parametrize("error", LEAVES)
def test_status_is_one_that_openais_client_understands(error: type[ApiError]) -> None:
    assert 400 <= error.status < 600
    # The client repeats 409 on its own, whatever it was about.
    assert error.status != 409


def test_codes_are_unique_and_in_snake_case() -> None:
    codes = [error.code for error in LEAVES]

    assert len(codes) == len(set(codes))
    assert all(code.replace("_", "").isalpha() and code == code.lower() for code in codes)


def test_every_class_says_what_it_is_for() -> None:
    assert [error.__name__ for error in LEAVES if not error.__doc__] == []


def test_retry_hint_is_exact_in_milliseconds_and_rounded_up_in_seconds() -> None:
    assert QueueFullError("full", retry_after_ms=1200.4).headers() == {
        "retry-after-ms": "1201",
        "retry-after": "2",
    }


def test_retry_hint_in_seconds_is_never_zero() -> None:
    assert QueueFullError("full", retry_after_ms=20).headers()["retry-after"] == "1"


def test_error_without_a_hint_has_no_retry_headers() -> None:
    assert SizeNotServedError("no").headers() == {}


def test_client_is_told_not_to_repeat_a_job_that_kills_workers() -> None:
    assert JobPoisonedError("poison").headers() == {"x-should-retry": "false"}


def test_internal_error_is_a_500() -> None:
    assert (InternalError.status, InternalError.code) == (500, "internal_error")
