"""Api and worker processes replaced one after another while clients go on asking."""

from __future__ import annotations

import signal
import threading

import httpx

from tests.failures.deployment import Deployment
from tests.failures.processes import PATIENCE_S
from tests.server.conftest import poll

NUM_CLIENTS = 4
NUM_GENERATIONS = 2


def ask_for_pictures(url: str, answers: list[httpx.Response], enough: threading.Event) -> None:
    """One client: a picture, its bytes, the next. It keeps its connection and tries nothing twice: whatever
    fails, fails the test.
    """
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as http:
        while not enough.wait(0.02):  # steady, and yet leaving a machine of one core time to start processes
            answer = http.post("/v1/images", json={"prompt": "a red cube"})
            answers.append(answer)
            if answer.status_code == 200:
                answers.append(http.get(answer.json()["data"][0]["url"]))


def test_rolling_restart_under_load_fails_no_request(deployment: Deployment) -> None:
    api = deployment.api("api 0")
    worker = deployment.worker("worker 0")
    deployment.started(worker)
    answers: list[httpx.Response] = []
    enough = threading.Event()
    clients = [
        deployment.background.submit(ask_for_pictures, api.url, answers, enough) for _ in range(NUM_CLIENTS)
    ]

    def serve_some() -> None:
        """Return when every client had some answers more."""
        wanted = len(answers) + 8 * NUM_CLIENTS
        poll(lambda: len(answers) >= wanted or any(client.done() for client in clients), timeout_s=PATIENCE_S)

    for generation in range(1, NUM_GENERATIONS + 1):
        serve_some()
        retiring, api = api, deployment.api(f"api {generation}", listener=api.listener)
        retiring.send(signal.SIGTERM)
        assert retiring.join() == 0
        serve_some()
        leaving, worker = worker, deployment.worker(f"worker {generation}")
        deployment.started(worker)
        leaving.send(signal.SIGTERM)
        assert leaving.join() == 0
    serve_some()
    enough.set()
    for client in clients:
        client.result()

    assert {answer.status_code for answer in answers} == {200}
    assert {deployment.attempts(job_id) for job_id in deployment.job_ids()} == {1}
