"""Everything is killed at random while clients ask for pictures; afterwards nothing is missing.

A job that was running in three workers when they were killed ends as `poison`: nobody can tell a storm from a
request that kills. That is a final answer like any other, and the job must have been started three times.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.failures.deployment import Deployment
from tests.failures.processes import PATIENCE_S, ROOT, Api, Process
from tests.server.conftest import poll

NUM_JOBS = {"short": 80, "full": 200}
KILLS_OF_EACH = {"short": 4, "full": 10}
NUM_CUSTOMERS = 6
JOBS_BETWEEN_KILLS = 8
"""So many end before the next kill, unless it follows at once, as every third one does."""
COME_AGAIN = frozenset({429, 503})


@dataclass
class Customer:
    """Asks for one picture after another, and again whenever it gets no answer, as our docs tell clients to.

    Attributes:
        orders: idempotency key -> job id.
        answers: job id -> what the first look at the finished job showed.
    """

    number: int
    apis: list[Api]
    rng: random.Random
    orders: dict[str, str] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def shop(self, enough: threading.Event) -> None:
        """Until `enough` is set; the last picture is waited for."""
        while not enough.is_set():
            key = f"{self.number}-{len(self.orders)}"
            job_id = self.order(key)
            self.orders[key] = job_id
            if self.rng.random() < 0.5:
                assert self.order(key, wait_s=5) == job_id
            self.answers[job_id] = self.final_answer(job_id)

    def order(self, key: str, *, wait_s: float = 0) -> str:
        """Ask under a key until the job's id comes back."""
        body = {"prompt": f"a cube for {key}", "wait_s": wait_s}
        answer = self.insist("POST", "/v1/images", json=body, headers={"idempotency-key": key})
        if answer.is_success:
            return str(answer.json()["id"])
        # The job has failed by now, which is what the answer says, and the id is in its words.
        named = re.search(r"img_\w+", answer.json()["error"]["message"])
        assert named is not None, answer.text
        return named[0]

    def final_answer(self, job_id: str) -> dict[str, Any]:
        """Look until the job is finished. An id that was given must stay known."""
        while True:
            answer = self.insist("GET", f"/v1/images/{job_id}")
            assert answer.status_code == 200, answer.text
            job: dict[str, Any] = answer.json()
            if job["status"] in ("completed", "failed"):
                return job | {"data": [image["seed"] for image in job["data"]]}  # its URLs name the api

    def insist(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The first answer that is not a request to come again."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            api = self.rng.choice(self.apis)
            try:
                answer = api.http.request(method, path, **request)
            except httpx.TransportError:
                continue
            if answer.status_code not in COME_AGAIN:
                return answer
            time.sleep(self.rng.uniform(0, 0.1))  # a polite client's pause
        raise TimeoutError(f"{method} {path} has not been answered for {PATIENCE_S} s")


def audited(deployment: Deployment, accepted: Path) -> dict[str, Any]:
    """What `python -m server audit` says about these ids, when all are to be finished."""
    environment = {
        **os.environ,
        "TDM_REDIS_URL": deployment.redis.url,
        "TDM_STORE_URL": deployment.results.as_uri(),
    }
    command = ["audit", "--accepted", str(accepted), "--settled", "--json"]
    audit = subprocess.run(
        [sys.executable, "-m", "server", *command],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert audit.returncode == 0, audit.stdout + audit.stderr
    report: dict[str, Any] = json.loads(audit.stdout)
    return report


@pytest.mark.timeout(1800)
def test_storm_of_kills_loses_no_job_and_shows_none_twice(
    deployment: Deployment, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    size = "full" if pytestconfig.getoption("--storm") else "short"
    seed = random.randrange(10**6)
    print(f"storm of seed {seed}")  # noqa: T201 - shown when the test fails
    rng = random.Random(seed)
    apis = [deployment.api("api 0"), deployment.api("api 1")]
    workers = [deployment.worker("worker 0"), deployment.worker("worker 1")]
    deployment.started(*workers)
    customers = [Customer(number, apis, random.Random(rng.random())) for number in range(NUM_CUSTOMERS)]
    enough = threading.Event()
    shopping = [deployment.background.submit(customer.shop, enough) for customer in customers]

    def num_ended() -> int:
        for done in [one for one in shopping if one.done()]:
            done.result()  # raises what the customer met
        return sum(len(customer.answers) for customer in customers)

    def wait_for_ended(count: int) -> None:
        poll(lambda: num_ended() >= count, timeout_s=PATIENCE_S)

    try:
        victims = ["worker", "api", "redis"] * KILLS_OF_EACH[size]
        rng.shuffle(victims)
        for victim in victims:
            if rng.random() < 2 / 3:
                wait_for_ended(num_ended() + JOBS_BETWEEN_KILLS)
            if victim == "redis":
                deployment.redis.kill()
                deployment.redis.start()
            else:
                process: Process = rng.choice([*workers] if victim == "worker" else [*apis])
                process.kill()
                process.start()
        wait_for_ended(NUM_JOBS[size])
    finally:
        enough.set()
    for one in shopping:
        one.result()

    orders = {key: job_id for customer in customers for key, job_id in customer.orders.items()}
    answers = {job_id: job for customer in customers for job_id, job in customer.answers.items()}
    assert len(orders) == len(answers) >= NUM_JOBS[size]
    assert set(orders.values()) == set(deployment.job_ids())  # no order made two jobs, and no job was lost
    failed = {job_id: job["error"]["code"] for job_id, job in answers.items() if job["status"] == "failed"}
    assert set(failed.values()) <= {"poison"}
    assert {deployment.attempts(job_id) for job_id in failed} <= {3}
    print(f"{len(answers)} jobs, {len(failed)} of them in three dying workers")  # noqa: T201 - as above
    again = Customer(0, apis, rng)
    assert {job_id: again.final_answer(job_id) for job_id in answers} == answers
    assert {key: again.order(key) for key in orders} == orders

    accepted = tmp_path / "accepted"
    accepted.write_text("".join(f"{job_id}\n" for job_id in answers))
    counts = audited(deployment, accepted)["counts"]
    assert (counts["accepted"], counts["lost"]) == (len(answers), 0)
    assert counts["done"] + counts["failed"] == len(answers)
