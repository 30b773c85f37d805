"""Machines whose clocks disagree."""

from __future__ import annotations

import time

import pytest

from tests.failures.deployment import Deployment
from tests.server.conftest import poll

DEADLINE_S = 60


@pytest.mark.parametrize("skew_s", [-200, 200])
def test_machines_whose_clocks_are_minutes_apart_serve_together(deployment: Deployment, skew_s: int) -> None:
    api = deployment.api(skew_s=-skew_s, job_deadline_s=DEADLINE_S)
    worker = deployment.worker(skew_s=skew_s)
    deployment.started(worker)
    poll(api.ready)  # the worker counts as alive

    answer = api.post("a red cube")
    assert answer.status_code == 200, answer.text  # and the job was not late
    job = api.look(answer.json()["id"])
    assert abs(job["created"] - time.time()) < DEADLINE_S  # Redis's clock is this machine's
    assert 0 <= job["timing_ms"]["queue"] < 1000 * DEADLINE_S
    assert api.http.get(answer.json()["data"][0]["url"]).status_code == 200
