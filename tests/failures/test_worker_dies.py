"""Workers that die, freeze, or come back late."""

from __future__ import annotations

import signal
from typing import Any

from server.job import result_folders
from tests.failures.conftest import MAX_BATCH
from tests.failures.deployment import MODEL, PREFIX, Deployment
from tests.failures.engine import LETHAL
from tests.failures.processes import PATIENCE_S, Api, Worker
from tests.server.conftest import poll

PROMPTS = [f"job {number}" for number in range(MAX_BATCH)]


def two_on_one_job(deployment: Deployment, api: Api) -> tuple[Worker, Worker, str]:
    """A frozen worker that was drawing a job, another one that has begun the same job since, and its id."""
    frozen, other = deployment.worker("frozen").brake(), deployment.worker("other").brake()
    other.wait_at_the_door()
    deployment.started(frozen)
    job_id = api.accept("contested", seed=1)
    poll(lambda: frozen.batches)
    frozen.send(signal.SIGSTOP)
    deployment.started(other)
    poll(lambda: other.batches, timeout_s=PATIENCE_S)
    assert (frozen.batches, other.batches) == ([["contested"]], [["contested"]])
    return frozen, other, job_id


def test_worker_killed_in_a_batch_of_eight_has_all_eight_restart_one_by_one(deployment: Deployment) -> None:
    api = deployment.api()
    deployment.introduce_model()
    job_ids = [api.accept(prompt) for prompt in PROMPTS]
    first = deployment.worker("first").brake()
    deployment.started(first)
    poll(lambda: first.batches)
    assert first.batches == [PROMPTS]

    first.kill()
    second = deployment.worker("second")
    deployment.started(second)

    assert [api.ended(job_id)["status"] for job_id in job_ids] == ["completed"] * MAX_BATCH
    assert sorted(second.batches) == [[prompt] for prompt in PROMPTS]
    assert [deployment.attempts(job_id) for job_id in job_ids] == [2] * MAX_BATCH
    assert second.metric("job_redeliveries_total", cause="lease_lapsed") == MAX_BATCH


def test_frozen_worker_that_wakes_after_its_job_was_finished_changes_nothing(deployment: Deployment) -> None:
    api = deployment.api()
    frozen, other, job_id = two_on_one_job(deployment, api)
    other.release()
    done = api.ended(job_id)
    assert done["status"] == "completed"

    frozen.send(signal.SIGCONT)
    frozen.release()
    other.kill()
    assert (
        api.post("next").status_code == 200
    )  # the frozen one is back at work, so it has done with the other

    assert api.look(job_id) == done
    assert [key for key in deployment.files() if job_id in key] == [f"{result_folders(job_id)[0]}/2-0.png"]


def test_frozen_worker_that_wakes_in_time_finishes_first_and_the_other_one_is_too_late(
    deployment: Deployment,
) -> None:
    api = deployment.api()
    frozen, other, job_id = two_on_one_job(deployment, api)
    frozen.send(signal.SIGCONT)
    frozen.release()
    done = api.ended(job_id)
    assert done["status"] == "completed"

    other.release()
    frozen.kill()
    assert api.post("next").status_code == 200

    assert api.look(job_id) == done
    assert [key for key in deployment.files() if job_id in key] == [f"{result_folders(job_id)[0]}/1-0.png"]


def test_poison_request_takes_three_processes_and_no_neighbour(deployment: Deployment) -> None:
    api = deployment.api()
    deployment.introduce_model()
    innocent = [api.accept(f"innocent {number}") for number in range(3)]
    poison = deployment.background.submit(api.post, LETHAL, key="poison")
    poll(lambda: len(deployment.job_ids()) == 4)
    worker = deployment.worker()

    deaths = 0
    worker.start()  # which may have died of it before anybody looks
    while not poison.done():
        if not worker.alive:
            assert worker.join() == -signal.SIGKILL
            deaths += 1
            worker.start()

    answer = poison.result()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "poison")
    assert deaths == 3
    assert len(worker.batches[0]) == 4
    assert worker.batches.count([LETHAL]) == 2
    assert [api.ended(job_id)["status"] for job_id in innocent] == ["completed"] * 3
    (poisoned,) = set(deployment.job_ids()) - set(innocent)
    letters: Any = deployment.client.xrange(f"{PREFIX}:dead")
    ((_, letter),) = letters
    assert letter["id"] == poisoned
    assert worker.metric("dead_letters_total", **{"class": MODEL, "cause": "poison"}) == 1
    again = api.post(LETHAL, key="poison")
    assert (again.status_code, again.json()) == (answer.status_code, answer.json())
    assert api.post("next").status_code == 200


def test_job_that_is_delivered_twice_runs_once_and_the_second_delivery_is_counted(
    deployment: Deployment,
) -> None:
    api = deployment.api()
    worker = deployment.worker()
    deployment.started(worker)
    job_id = api.accept("once")
    done = api.ended(job_id)

    deployment.client.xadd(deployment.lane, {"id": job_id})
    poll(lambda: worker.metric("job_duplicates_total", cause="start") == 1)

    assert worker.batches == [["once"]]
    assert api.look(job_id) == done
    assert deployment.client.xlen(deployment.lane) == 0
