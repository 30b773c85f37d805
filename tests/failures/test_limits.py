"""A queue that is full, a deadline that passes, a result store that is down."""

from __future__ import annotations

import signal

from tests.failures.deployment import Deployment
from tests.failures.processes import PATIENCE_S
from tests.server.conftest import poll


def test_full_queue_refuses_with_a_time_to_come_back_and_takes_jobs_again(deployment: Deployment) -> None:
    api = deployment.api(max_queue=2)
    worker = deployment.worker().brake()
    deployment.started(worker)
    running = api.accept("running")
    poll(lambda: worker.batches)
    queued = [api.accept(f"queued {number}", key=f"{number}") for number in range(2)]

    refused = api.post("one too many", key="k")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    assert int(refused.headers["retry-after-ms"]) > 0
    assert api.accept("queued 0", key="0") == queued[0]  # a known key finds its job all the same

    worker.release()
    assert [api.ended(job_id)["status"] for job_id in (running, *queued)] == ["completed"] * 3
    assert api.post("one too many", key="k").status_code == 200
    assert sorted(prompt for batch in worker.batches for prompt in batch) == [
        "one too many",
        "queued 0",
        "queued 1",
        "running",
    ]


def test_job_past_its_deadline_never_reaches_an_engine(deployment: Deployment) -> None:
    hasty, patient = deployment.api("hasty", job_deadline_s=1), deployment.api("patient")
    worker = deployment.worker()
    deployment.started(worker)
    before = patient.post("before").json()["id"]
    worker.send(signal.SIGSTOP)

    late = deployment.background.submit(hasty.post, "late", key="late")
    timely = patient.accept("timely")
    answer = late.result()
    worker.send(signal.SIGCONT)

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert patient.ended(timely)["status"] == "completed"
    assert worker.batches == [["before"], ["timely"]]
    (job_id,) = set(deployment.job_ids()) - {before, timely}
    job = patient.look(job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "deadline")


def take_store_away(deployment: Deployment) -> None:
    """Put a file where the still empty directory of results is: nothing can be stored until it is removed."""
    if deployment.results.exists():
        deployment.results.rmdir()
    deployment.results.touch()


def test_result_store_that_comes_back_within_the_lease_costs_nothing(deployment: Deployment) -> None:
    api = deployment.api()
    worker = deployment.worker(lease_s=120)
    deployment.started(worker)
    take_store_away(deployment)
    waiting = deployment.background.submit(api.post, "a cube")
    poll(lambda: worker.metric("storage_op_seconds_count", op="put") > 1)

    deployment.results.unlink()

    assert waiting.result().status_code == 200
    assert worker.batches == [["a cube"]]
    assert len(deployment.files()) == 1


def test_result_store_that_stays_down_fails_the_job_as_such_and_asking_again_is_allowed(
    deployment: Deployment,
) -> None:
    api = deployment.api()
    worker = deployment.worker()
    deployment.started(worker)
    take_store_away(deployment)

    answer = api.post("a cube")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert answer.headers.get("x-should-retry") != "false"
    (job_id,) = deployment.job_ids()
    assert api.look(job_id)["error"]["code"] == "storage"
    assert worker.metric("storage_op_seconds_count", op="put") > 1

    deployment.results.unlink()
    poll(lambda: api.post("a cube").status_code == 200, timeout_s=PATIENCE_S)
    assert len(deployment.files()) == 1
