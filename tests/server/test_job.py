"""Jobs as data: ids, fingerprints, seeds."""

import pytest

from server.job import MAX_SEED, TERMINAL, JobStatus, fingerprint, model_tag, new_job, new_job_id, sample_seed


def test_ids_are_unique_sort_by_age_and_name_kind_and_class() -> None:
    ids = [new_job_id("image", "scenes", now_ms) for now_ms in (1, 1_800_000_000_000, 1_800_000_000_001)]
    assert ids == sorted(ids)
    assert all(job_id.startswith("img_") and job_id.endswith(model_tag("scenes")) for job_id in ids)
    assert len({new_job_id("video", "clips", 5) for _ in range(1000)}) == 1000
    assert new_job_id("video", "clips", 5).startswith("vid_")


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'audio'"):
        new_job_id("audio", "scenes", 0)


def test_fingerprint_is_of_the_content_not_of_its_order() -> None:
    assert fingerprint({"a": 1, "b": "ü"}) == fingerprint({"b": "ü", "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_seeds_of_a_job_s_samples_follow_each_other_and_stay_in_range() -> None:
    assert [sample_seed(7, i) for i in range(3)] == [7, 8, 9]
    assert sample_seed(MAX_SEED - 1, 1) == 0


def test_only_done_failed_and_cancelled_are_final() -> None:
    job = new_job(kind="image", model="scenes", request={"prompt": "x"}, now_ms=1, deadline_ms=2)
    assert {JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED} == TERMINAL
    assert not job.finished
