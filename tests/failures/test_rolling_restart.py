"""Api and worker processes replaced one after another while clients go on asking."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

from tests.failures.deployment import Deployment
from tests.failures.processes import PATIENCE_S, Api, Worker
from tests.server.conftest import poll

NUM_CLIENTS = 4
NUM_GENERATIONS = 2
K6 = Path(sys.executable).parent / "k6"


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


def replace_all(deployment: Deployment, api: Api, worker: Worker, serve_some: Callable[[], None]) -> None:
    """Replace api and worker, twice, as a rolling update does: the new one first, then SIGTERM to the old."""
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

    replace_all(deployment, api, worker, serve_some)
    enough.set()
    for client in clients:
        client.result()

    assert {answer.status_code for answer in answers} == {200}
    assert {deployment.attempts(job_id) for job_id in deployment.job_ids()} == {1}


class Control:
    """Asked by clients before each picture whether to go on."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.enough = False
        self.url = ""


@contextmanager
def control() -> Iterator[Control]:
    """One that answers 200 until there is enough, and 204 then."""
    state = Control()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.num_asked += 1
            self.send_response(204 if state.enough else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()


def test_rolling_restart_under_k6_fails_no_request(deployment: Deployment, tmp_path: Path) -> None:
    api = deployment.api("api 0")
    worker = deployment.worker("worker 0")
    deployment.started(worker)
    summary = tmp_path / "summary.json"
    with control() as clients:
        environment = [f"--env=BASE_URL={api.url}", f"--env=CONTROL={clients.url}"]
        script = Path(__file__).with_name("rolling.js")
        k6 = subprocess.Popen(
            [K6, "run", "--quiet", "--no-usage-report", *environment, f"--summary-export={summary}", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

        def serve_some() -> None:
            wanted = clients.num_asked + 8 * NUM_CLIENTS
            poll(lambda: clients.num_asked >= wanted or k6.poll() is not None, timeout_s=PATIENCE_S)

        replace_all(deployment, api, worker, serve_some)
        clients.enough = True
        printed, _ = k6.communicate(timeout=PATIENCE_S)

    assert k6.returncode == 0, printed
    metrics = json.loads(summary.read_text())["metrics"]
    assert metrics["http_req_failed"]["passes"] == 0  # k6's word for those that did fail
    assert metrics["checks"]["passes"] > 2 * 8 * NUM_CLIENTS * NUM_GENERATIONS
    assert {deployment.attempts(job_id) for job_id in deployment.job_ids()} == {1}
