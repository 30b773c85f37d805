"""A Redis that restarts, forgets, or has no room left."""

from __future__ import annotations

import signal

import pytest

from tests.failures.deployment import Deployment
from tests.failures.processes import PATIENCE_S
from tests.server.conftest import poll


def test_redis_killed_under_load_loses_no_accepted_job(deployment: Deployment) -> None:
    api = deployment.api()
    first, second = deployment.worker("first").brake(), deployment.worker("second").brake()
    deployment.started(first, second)
    job_ids = [api.accept(f"job {number}") for number in range(24)]
    poll(lambda: first.batches and second.batches)

    deployment.redis.kill()
    refused = api.post("while it is away", wait_s=0)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_unavailable")
    assert int(refused.headers["retry-after"]) > 0
    first.release()
    second.release()
    poll(lambda: min(worker.metric("redis_errors_total", op="finish") for worker in (first, second)) > 0)
    deployment.redis.start()

    ends = [api.ended(job_id) for job_id in job_ids]
    assert [end["status"] for end in ends] == ["completed"] * len(job_ids)
    # What was computed while Redis was away was not lost: nothing ran twice.
    drawn = [prompt for worker in (first, second) for batch in worker.batches for prompt in batch]
    assert sorted(drawn) == sorted(end["prompt"] for end in ends)
    assert len(deployment.files()) == len(job_ids)
    assert api.post("afterwards").status_code == 200


@pytest.mark.parametrize("copy", ["an hour ago", "never made"])
def test_redis_that_lost_its_last_writes_or_all_of_them_forgets_jobs_and_serves_on(
    deployment: Deployment, copy: str
) -> None:
    api = deployment.api()
    worker = deployment.worker()
    deployment.started(worker)
    old = api.post("old", key="old").json()
    if copy == "an hour ago":
        deployment.redis.save_data(copy)
    worker.brake()
    lost = api.accept("lost", key="k")

    deployment.redis.kill()
    deployment.redis.restore_data(copy)
    deployment.redis.start()

    worker.release()
    unknown = api.http.get(f"/v1/images/{lost}")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "job_not_found")
    poll(api.ready, timeout_s=PATIENCE_S)  # the worker has announced itself anew
    again = api.post("lost", key="k").json()
    assert (again["status"], again["id"] != lost) == ("completed", True)
    assert (api.look(old["id"]) == old) == (copy == "an hour ago")
    poll(lambda: not [key for key in deployment.files() if key.startswith(lost)])
    assert worker.alive


def test_flushed_redis_is_served_on_by_the_same_processes(deployment: Deployment) -> None:
    api = deployment.api()
    worker = deployment.worker().brake()
    deployment.started(worker)
    waiting = deployment.background.submit(api.post, "in hand")
    poll(lambda: worker.batches)
    (in_hand,) = deployment.job_ids()
    pids = (api.pid, worker.pid)

    deployment.client.flushall()

    answer = waiting.result()  # the sweep tells who waits that there is nothing to wait for any more
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
    worker.release()
    poll(api.ready, timeout_s=PATIENCE_S)
    assert api.post("new").status_code == 200
    assert api.http.get(f"/v1/images/{in_hand}").status_code == 404
    assert (worker.alive, worker.batches, (api.pid, worker.pid)) == (True, [["in hand"], ["new"]], pids)
    poll(lambda: len(deployment.files()) == 1)  # nobody's picture is removed


def test_full_redis_refuses_new_jobs_finishes_those_it_has_and_then_takes_new_ones(
    deployment: Deployment,
) -> None:
    api = deployment.api()
    first = deployment.worker("first").brake()
    deployment.started(first)
    running = api.accept("running")
    poll(lambda: first.batches)
    queued = api.accept("queued")

    deployment.fill_memory()
    refused = api.post("too much", wait_s=0)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) > 0
    second = deployment.worker("second")
    deployment.started(second)  # a worker may even start
    first.release()
    assert [api.ended(job_id)["status"] for job_id in (running, queued)] == ["completed"] * 2

    deployment.free_memory()
    assert api.post("accepted").status_code == 200


def test_full_redis_still_ends_jobs_past_their_deadline(deployment: Deployment) -> None:
    api = deployment.api(job_deadline_s=2)
    deployment.introduce_model()
    waiting = deployment.background.submit(api.post, "late")
    poll(deployment.job_ids)

    deployment.fill_memory()

    answer = waiting.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")


def test_first_worker_ever_announces_its_model_once_a_full_redis_has_room(deployment: Deployment) -> None:
    api = deployment.api()
    deployment.fill_memory()
    deployment.started(deployment.worker())
    assert api.post("who would draw it?", wait_s=0).status_code == 503
    deployment.free_memory()
    poll(api.ready, timeout_s=PATIENCE_S)
    assert api.post("a cube").status_code == 200


def test_frozen_redis_is_refused_to_all_at_once_and_served_on_when_it_wakes(deployment: Deployment) -> None:
    api, worker = deployment.api(), deployment.worker()
    deployment.started(worker)
    assert api.post("before").status_code == 200
    deployment.redis.send(signal.SIGSTOP)
    try:
        asking = [deployment.background.submit(api.post, f"cube {index}") for index in range(12)]
        answers = [one.result() for one in asking]
    finally:
        deployment.redis.send(signal.SIGCONT)
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["error"]["code"] for answer in answers} == {"queue_unavailable"}
    waited_s = [answer.elapsed.total_seconds() for answer in answers]
    assert max(waited_s) < 3 * min(waited_s)  # they were not told one after the other
    poll(api.ready, timeout_s=PATIENCE_S)
    assert api.post("after").status_code == 200
