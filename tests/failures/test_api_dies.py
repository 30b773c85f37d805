"""Api processes that die, and clients that leave."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from tests.failures.deployment import PREFIX, Deployment
from tests.failures.processes import PATIENCE_S, Api
from tests.server.conftest import poll


@pytest.mark.parametrize("reached_redis", [True, False])
def test_api_killed_while_it_enqueues_and_a_retry_with_the_key_makes_exactly_one_job(
    deployment: Deployment, reached_redis: bool
) -> None:
    worker = deployment.worker()
    deployment.started(worker)
    proxy = deployment.proxy()
    dying, other = deployment.api("dying", redis_url=proxy.url), deployment.api("other")
    assert dying.post("before").status_code == 200  # it has loaded its scripts

    proxy.freeze_at(b"a blue cube", answered=reached_redis)
    first = deployment.background.submit(dying.post, "a blue cube", key="k")
    assert proxy.caught.wait(PATIENCE_S)
    if reached_redis:
        poll(lambda: len(deployment.job_ids()) == 2)
    dying.kill()
    with pytest.raises(httpx.TransportError):
        first.result()
    second = other.post("a blue cube", key="k")
    proxy.heal()  # a command that was under way when its sender died arrives now

    assert second.status_code == 200
    third = other.post("a blue cube", key="k")
    assert third.json()["id"] == second.json()["id"]
    assert other.post("after").status_code == 200  # whatever was left in the queue has run before it
    assert worker.batches.count(["a blue cube"]) == 1
    assert len(deployment.job_ids()) == 3


def test_api_killed_while_it_waits_and_the_result_is_had_from_another_one(deployment: Deployment) -> None:
    worker = deployment.worker().brake()
    deployment.started(worker)
    dying, other = deployment.api("dying"), deployment.api("other")
    waiting = deployment.background.submit(dying.post, "a cube", key="k")
    poll(lambda: worker.batches)

    dying.kill()
    with pytest.raises(httpx.TransportError):
        waiting.result()
    again = deployment.background.submit(other.post, "a cube", key="k")
    worker.release()

    answer = again.result()
    assert answer.status_code == 200
    assert other.look(answer.json()["id"])["data"] == answer.json()["data"]
    assert other.http.get(answer.json()["data"][0]["url"]).status_code == 200
    assert worker.batches == [["a cube"]]
    dying.start()
    assert dying.look(answer.json()["id"])["status"] == "completed"


def leave_while_waiting(api: Api, deployment: Deployment, status: str) -> str:
    """Ask for a picture, and close the connection once its job has this status; the job's id."""
    known = set(deployment.job_ids())
    body = json.dumps({"prompt": "never mind"}).encode()
    head = (
        "POST /v1/images HTTP/1.1\r\nhost: api\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", api.http.base_url.port or 0)) as connection:
        connection.sendall(head.encode() + body)
        (job_id,) = poll(lambda: set(deployment.job_ids()) - known)
        api.wait_until(job_id, status)
        poll(lambda: api.metric("result_waiters") == 1)
    return job_id


def test_client_that_leaves_takes_its_queued_job_with_it_and_leaves_its_running_one(
    deployment: Deployment,
) -> None:
    api = deployment.api()
    deployment.introduce_model()
    queued = leave_while_waiting(api, deployment, "queued")
    end = api.ended(queued)
    assert (end["status"], end["error"]["code"]) == ("failed", "cancelled")
    poll(lambda: api.metric("result_waiters") == 0)

    worker = deployment.worker().brake()
    deployment.started(worker)
    running = leave_while_waiting(api, deployment, "in_progress")
    poll(lambda: api.metric("result_waiters") == 0)
    worker.release()
    end = api.ended(running)
    assert end["status"] == "completed"
    assert api.http.get(end["data"][0]["url"]).status_code == 200
    assert worker.batches == [["never mind"]]
    assert deployment.client.exists(f"{PREFIX}:live") == 0
