"""What travels through Redis: out and back is the same, and what is amiss has one name."""

import json
from typing import Any

import pytest

from engines.bundle.bucket import Bucket
from server.job import JobError, JobErrorCode
from server.queue.records import UnreadableJobError, dump_error, dump_request, load_job, load_request
from tests.server.conftest import request_of

CLIP = request_of("ein Würfel", bucket=Bucket(32, 48, 9), output_format="mp4", fps=8)
PICTURE = request_of("a cube", num_samples=3, seed=2**63 - 1, output_format="webp", quality=40)


@pytest.mark.parametrize("request_", [CLIP, PICTURE], ids=["video", "image"])
def test_request_comes_back_as_it_went(request_: Any) -> None:
    assert load_request(dump_request(request_)) == request_


def test_request_is_stored_under_the_names_that_lua_and_operators_read() -> None:
    assert json.loads(dump_request(CLIP)) == {
        "prompt": "ein Würfel",
        "n": 1,
        "height": 32,
        "width": 48,
        "frames": 9,
        "seed": 7,
        "num_steps": 4,
        "output_format": "mp4",
        "output_compression": None,
        "fps": 8,
    }
    assert "fps" not in json.loads(dump_request(PICTURE))


def test_request_without_frames_is_of_an_image() -> None:
    fields = json.loads(dump_request(PICTURE))
    del fields["frames"]
    assert load_request(json.dumps(fields)) == PICTURE


@pytest.mark.parametrize(
    "change",
    [{"height": "tall"}, {"width": 0}, {"seed": None}, {"n": [1]}, {"output_compression": "much"}],
    ids=str,
)
def test_request_with_a_wrong_value_is_unreadable(change: dict[str, Any]) -> None:
    fields = json.loads(dump_request(PICTURE))
    with pytest.raises(UnreadableJobError, match="unreadable request"):
        load_request(json.dumps({**fields, **change}))


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{}", '{"prompt":"x"}'])
def test_request_that_is_none_is_unreadable(text: str) -> None:
    with pytest.raises(UnreadableJobError, match="unreadable request"):
        load_request(text)


def record(**changed: str) -> dict[str, str]:
    about = {"kind": "image", "tenant": "public", "priority": "normal", "fingerprint": "f"}
    times = {"created_ms": "1", "deadline_ms": "2"}
    return {**about, **times, "status": "queued", "attempt": "0", "request": dump_request(PICTURE), **changed}


def test_record_is_read_into_a_job() -> None:
    job = load_job("scenes", "img_1", record())
    assert (job.id, job.model, job.request, job.deadline_ms) == ("img_1", "scenes", PICTURE, 2)


@pytest.mark.parametrize(
    "changed",
    [{"request": "{}"}, {"priority": "urgent"}, {"status": "lost"}, {"created_ms": "now"}, {"kind": "video"}],
    ids=str,
)
def test_record_that_cannot_be_read_names_its_job(changed: dict[str, str]) -> None:
    with pytest.raises(UnreadableJobError, match="record of job img_1"):
        load_job("scenes", "img_1", record(**changed))


@pytest.mark.parametrize("code", JobErrorCode)
def test_error_is_stored_as_plain_text(code: JobErrorCode) -> None:
    assert dump_error(JobError(code=code, message="m")) == f'{{"code": "{code.value}", "message": "m"}}'
