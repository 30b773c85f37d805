"""Bodies: strict on our route, lenient where OpenAI's client sends what has no effect, never silent."""

from typing import Any

import pytest
from pydantic import ValidationError

from server.api.schemas import GenerationsRequest, ImageRequest


def problem(model: type[ImageRequest | GenerationsRequest], **fields: Any) -> tuple[str, str]:
    with pytest.raises(ValidationError) as caught:
        model.model_validate({"prompt": "a red cube", **fields})
    first = caught.value.errors()[0]
    return ".".join(str(part) for part in first["loc"]), first["type"]


@pytest.mark.parametrize("model", [ImageRequest, GenerationsRequest])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n": 0}, ("n", "greater_than_equal")),
        ({"n": 11}, ("n", "less_than_equal")),
        ({"n": "2"}, ("n", "int_type")),
        ({"n": True}, ("n", "int_type")),
        ({"n": 1.5}, ("n", "int_type")),
        ({"seed": -1}, ("seed", "greater_than_equal")),
        ({"seed": 2**63}, ("seed", "less_than_equal")),
        ({"steps": 0}, ("steps", "greater_than_equal")),
        ({"size": "64"}, ("size", "string_pattern_mismatch")),
        ({"size": "0x64"}, ("size", "string_pattern_mismatch")),
        ({"size": "64x64\n"}, ("size", "string_pattern_mismatch")),
        ({"output_format": "gif"}, ("output_format", "literal_error")),
        ({"output_compression": 101}, ("output_compression", "less_than_equal")),
        ({"response_format": "bytes"}, ("response_format", "literal_error")),
        ({"prompt": ""}, ("prompt", "string_too_short")),
        ({"prompt": " \n"}, ("prompt", "string_too_short")),
        ({"prompt": 5}, ("prompt", "string_type")),
        ({"prompt": "\ud800"}, ("prompt", "string_unicode")),
        ({"prompt": None}, ("prompt", "missing")),
        ({"colour": "red"}, ("colour", "extra_forbidden")),
    ],
)
def test_wrong_field_is_refused(
    model: type[ImageRequest | GenerationsRequest], fields: dict[str, Any], expected: tuple[str, str]
) -> None:
    assert problem(model, **fields) == expected


def test_null_means_absent() -> None:
    body = ImageRequest.model_validate({"prompt": "a red cube", "n": None, "seed": None, "size": None})

    assert (body.n, body.seed, body.size) == (1, None, "auto")


def test_our_route_does_not_take_openais_other_fields() -> None:
    assert problem(ImageRequest, quality="high") == ("quality", "extra_forbidden")


def test_openais_route_takes_fields_without_effect() -> None:
    body = GenerationsRequest.model_validate(
        {
            "prompt": "a red cube",
            "user": "someone",
            "style": "vivid",
            "quality": "high",
            "moderation": "low",
            "background": "opaque",
            "stream": False,
            "partial_images": 0,
        }
    )

    assert body.unsupported() is None


@pytest.mark.parametrize(
    ("fields", "param", "allowed"),
    [
        ({"stream": True}, "stream", "false"),
        ({"partial_images": 2}, "partial_images", "0"),
        ({"background": "transparent"}, "background", "auto and opaque"),
    ],
)
def test_openais_route_names_what_it_cannot_honour_and_what_it_can(
    fields: dict[str, Any], param: str, allowed: str
) -> None:
    refused = GenerationsRequest.model_validate({"prompt": "a red cube", **fields}).unsupported()

    assert refused is not None
    assert refused[0] == param
    assert refused[1].endswith(allowed)


def test_openais_route_answers_with_bytes_unless_asked_for_urls() -> None:
    assert GenerationsRequest(prompt="a red cube").response_format == "b64_json"
    assert ImageRequest(prompt="a red cube").response_format == "url"


def test_whole_number_may_be_written_with_a_point_as_far_as_that_is_exact() -> None:
    body = ImageRequest(prompt="a", n=2.0, seed=float(2**53), steps=4.0, output_compression=80.0)  # type: ignore[arg-type]
    assert (body.n, body.seed, body.steps, body.output_compression) == (2, 2**53, 4, 80)
    assert all(type(value) is int for value in (body.n, body.seed, body.steps))


@pytest.mark.parametrize(
    ("field", "value"), [("n", 1.5), ("n", True), ("n", "1"), ("seed", 1e16), ("steps", float("inf"))]
)
def test_other_numbers_are_no_whole_ones(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        ImageRequest.model_validate({"prompt": "a", field: value})
