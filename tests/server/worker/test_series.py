"""What a worker counts is there before its first job."""

from __future__ import annotations

import pytest

from server.metrics import Metrics
from server.worker.series import begin_series
from tests.server.manifests import make_manifest


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("gpu_oom_total", {"gpu": "cuda:0"}),
        ("jobs_total", {"class": "scenes", "kind": "image", "outcome": "poison"}),
        ("dead_letters_total", {"class": "scenes", "cause": "poison"}),
        ("job_stage_seconds_count", {"class": "scenes", "kind": "image", "stage": "store"}),
        ("images_total", {"class": "scenes"}),
        ("redis_op_seconds_count", {"op": "complete"}),
    ],
)
def test_worker_begins_at_zero(name: str, labels: dict[str, str]) -> None:
    metrics = Metrics()

    begin_series(metrics, make_manifest(), "cuda:0")

    assert metrics.registry.get_sample_value(f"tdm_{name}", labels) == 0


def test_worker_for_pictures_says_nothing_of_frames() -> None:
    metrics = Metrics()

    begin_series(metrics, make_manifest(), "cpu")

    assert metrics.registry.get_sample_value("tdm_video_frames_total", {"class": "scenes"}) is None
