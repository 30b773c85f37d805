"""Jobs as data: ids, fingerprints, seeds."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from engines.bundle.bucket import Bucket
from server.job import (
    MAX_SEED,
    TERMINAL,
    GenerationRequest,
    JobKind,
    JobStatus,
    begun_ms_of,
    fingerprint,
    model_tag,
    new_job,
    new_job_id,
    result_folders,
    sample_seed,
)
from tests.server.conftest import request_of


def test_ids_are_unique_sort_by_age_and_name_kind_and_class() -> None:
    ids = [new_job_id("image", "scenes", now_ms) for now_ms in (1, 1_800_000_000_000, 1_800_000_000_001)]
    assert ids == sorted(ids)
    assert all(job_id.startswith("img_") and job_id.endswith(model_tag("scenes")) for job_id in ids)
    assert len({new_job_id("video", "clips", 5) for _ in range(1000)}) == 1000
    assert new_job_id("video", "clips", 5).startswith("vid_")


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'audio'"):
        new_job_id("audio", "scenes", 0)


CUBE = GenerationRequest(
    prompt="a rüd cube",
    num_samples=2,
    bucket=Bucket(64, 96),
    seed=7,
    num_steps=4,
    output_format="jpeg",
    quality=80,
)


def sha256_of(asked: dict[str, object]) -> str:
    text = json.dumps(asked, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def test_fingerprint_is_what_it_was_when_requests_were_dicts() -> None:
    image = {
        "prompt": "a rüd cube",
        "n": 2,
        "height": 64,
        "width": 96,
        "frames": 1,
        "seed": 7,
        "num_steps": 4,
        "output_format": "jpeg",
        "output_compression": 80,
    }
    assert fingerprint(CUBE) == sha256_of(image)
    assert fingerprint(CUBE, model="scenes") == sha256_of({**image, "model": "scenes"})
    assert fingerprint(CUBE, seed_given=False) == sha256_of({**image, "seed": None})
    assert fingerprint(replace(CUBE, fps=8)) == sha256_of({**image, "fps": 8})


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a red cube"},
        {"num_samples": 1},
        {"bucket": Bucket(96, 64)},
        {"bucket": Bucket(64, 96, 9)},
        {"seed": 8},
        {"num_steps": 1},
        {"output_format": "webp"},
        {"quality": None},
        {"fps": 8},
    ],
    ids=str,
)
def test_every_field_of_a_request_counts_in_its_fingerprint(change: dict[str, Any]) -> None:
    assert fingerprint(replace(CUBE, **change)) != fingerprint(CUBE)


def test_seed_that_nobody_asked_for_does_not_count() -> None:
    others = replace(CUBE, seed=8)
    assert fingerprint(others, seed_given=False) == fingerprint(CUBE, seed_given=False)


def test_seeds_of_a_job_s_samples_follow_each_other_and_stay_in_range() -> None:
    assert [sample_seed(7, i) for i in range(3)] == [7, 8, 9]
    assert sample_seed(MAX_SEED - 1, 1) == 0


def test_only_done_failed_and_cancelled_are_final() -> None:
    job = new_job(kind=JobKind.IMAGE, model="scenes", request=request_of("x"), now_ms=1, deadline_ms=2)
    assert {JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED} == TERMINAL
    assert not job.finished


def test_results_lie_in_the_hour_of_their_job() -> None:
    created_ms = 1_800_000_000_000  # 2027-01-15T08:00:00Z
    first, last = (new_job_id("video", "m", created_ms + more) for more in (0, 3_599_999))

    assert result_folders(first) == [f"2027-01-15T08/{first}", first]
    assert result_folders(last)[0] == f"2027-01-15T08/{last}"
    assert begun_ms_of("2027-01-15T08") == begun_ms_of(first) == created_ms


@pytest.mark.parametrize("name", ["", "results", "2027-01-15", "2027-13-15T08", "2027-01-15T08:00", "img_1"])
def test_name_that_is_no_hour_and_no_job_says_nothing_of_its_age(name: str) -> None:
    assert begun_ms_of(name) == 0


def test_id_of_a_time_that_never_comes_has_a_folder_all_the_same() -> None:
    far = f"img_{'f' * 32}"

    assert result_folders(far) == [far]
    assert result_folders("img_1") == ["img_1"]
