"""What `up` does when it or its parts are killed or frozen; for other failures see tests/failures."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.system import System, poll, running, still_running


def accept(http: httpx.Client, **fields: Any) -> str:
    """Have a job accepted, not waited for; its id."""
    response = http.post("/v1/images", json={"prompt": "a red cube", "wait_s": 0, **fields})
    assert response.status_code == 202, response.text
    job_id: str = response.json()["id"]
    return job_id


def look(http: httpx.Client, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = http.get(f"/v1/images/{job_id}").json()
    return job


def wait_completed(http: httpx.Client, job_ids: list[str]) -> list[dict[str, Any]]:
    """The jobs, once none is queued or running any more."""
    poll(lambda: all(look(http, one)["status"] not in ("queued", "in_progress") for one in job_ids))
    jobs = [look(http, one) for one in job_ids]
    assert [job["status"] for job in jobs] == ["completed"] * len(jobs)
    return jobs


def test_worker_killed_in_the_middle_of_a_batch_loses_nothing(system: System, http: httpx.Client) -> None:
    job_ids = [accept(http, seed=seed, n=4) for seed in range(4)]
    poll(lambda: any(look(http, one)["status"] == "in_progress" for one in job_ids))

    system.worker().kill()

    jobs = wait_completed(http, job_ids)
    assert [job["seed"] for job in jobs] == [0, 1, 2, 3]
    for job in jobs:
        assert [http.get(image["url"]).status_code for image in job["data"]] == [200] * 4
    assert "worker 0 was killed by SIGKILL; starting it again" in system.log


def test_with_the_worker_frozen_jobs_wait_and_readyz_says_so(system: System, http: httpx.Client) -> None:
    worker = system.worker()
    worker.suspend()
    try:
        job_id = accept(http)
        poll(lambda: http.get("/readyz").status_code == 503)
        assert http.get("/readyz").json()["error"]["code"] == "no_worker"
        assert look(http, job_id)["status"] == "queued"
    finally:
        worker.resume()

    wait_completed(http, [job_id])
    assert http.get("/readyz").status_code == 200


def test_killed_api_is_replaced_and_knows_the_jobs(system: System, http: httpx.Client) -> None:
    job_id = accept(http)

    api = next(one for one in system.processes() if "api" in one.cmdline())
    api.kill()
    poll(lambda: not still_running([api]))

    # The supervisor holds the socket: a new connection waits for the next api process instead of failing.
    with system.client() as again:
        wait_completed(again, [job_id])


def test_sigterm_ends_everything_and_a_second_start_goes_on(bundle: Path, tmp_path: Path) -> None:
    with running(System(tmp_path, bundle)) as first:
        with first.client() as http:
            done = wait_completed(http, [accept(http, seed=1)])[0]
            first.worker().suspend()  # so that this job cannot be finished before the end
            waiting = accept(http, seed=2)
        first.worker().resume()
        processes = first.processes()

        assert first.end(signal.SIGTERM) == 0
        assert still_running(processes) == []
        assert len(processes) >= 4  # supervisor, Valkey, api, worker: the list was not empty

    with running(System(tmp_path, bundle)) as second:
        with second.client() as http:
            assert http.get(f"/v1/images/{done['id']}/content").status_code == 200
            wait_completed(http, [waiting])
        processes = second.processes()

        second.end(signal.SIGKILL)
        poll(lambda: not still_running(processes))
