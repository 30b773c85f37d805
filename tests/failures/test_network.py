"""Connections to Redis that are cut, or go silent without being closed."""

from __future__ import annotations

import pytest

from server.job import result_folders
from tests.failures.deployment import Deployment
from tests.failures.processes import PATIENCE_S
from tests.server.conftest import poll


@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_job_of_a_worker_without_network_runs_elsewhere_and_its_late_result_is_discarded(
    deployment: Deployment, how: str
) -> None:
    api = deployment.api()
    proxy = deployment.proxy()
    lonely = deployment.worker("lonely", redis_url=proxy.url).brake()
    other = deployment.worker("other").wait_at_the_door()
    deployment.started(lonely)
    job_id = api.accept("contested", seed=1)
    poll(lambda: lonely.batches)

    getattr(proxy, how)()
    deployment.started(other)
    done = api.ended(job_id)
    assert (done["status"], deployment.attempts(job_id)) == ("completed", 2)

    lonely.release()
    poll(lambda: lonely.metric("redis_errors_total", op="finish") > 0, timeout_s=PATIENCE_S)
    proxy.heal()
    poll(lambda: lonely.metric("job_duplicates_total", cause="stale") == 1, timeout_s=PATIENCE_S)

    assert (lonely.batches, other.batches) == ([["contested"]], [["contested"]])
    assert api.look(job_id) == done
    assert deployment.files() == [f"{result_folders(job_id)[0]}/2-0.png"]
    other.kill()
    assert api.post("next").status_code == 200
    assert lonely.batches[-1] == ["next"]


@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_client_of_an_api_that_was_without_network_for_a_while_gets_its_picture(
    deployment: Deployment, how: str
) -> None:
    proxy = deployment.proxy()
    lonely, other = deployment.api("lonely", redis_url=proxy.url), deployment.api("other")
    worker = deployment.worker().brake()
    deployment.started(worker)
    waiting = deployment.background.submit(lonely.post, "a cube")
    poll(lambda: worker.batches)
    (job_id,) = deployment.job_ids()

    getattr(proxy, how)()
    worker.release()
    assert other.ended(job_id)["status"] == "completed"
    refused = lonely.post("refused", wait_s=0)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_unavailable")
    assert int(refused.headers["retry-after"]) > 0
    proxy.heal()

    assert waiting.result().status_code == 200
    assert lonely.post("next").status_code == 200
