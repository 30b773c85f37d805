"""Everything is killed and frozen at random while clients ask for pictures; afterwards nothing is missing."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.failures.deployment import Deployment
from tests.failures.processes import PATIENCE_S, ROOT, Api
from tests.failures.storm import Customer, Storm, buy_poison
from tests.server.conftest import poll

NUM_JOBS = {"short": 200, "full": 300}
KILLS_OF_EACH = {"short": 10, "full": 10}
FREEZES_OF_EACH = {"short": 3, "full": 10}
"""So often are worker, api and Redis each killed, and each frozen."""
JOBS_BETWEEN_BLOWS = {"short": 4, "full": 8}
"""So many end before the next blow, unless it follows at once, as every third one does."""
NUM_CUSTOMERS = 6
MEDIAN_WAIT_S = 5.0
"""From the request to its answer, in the full storm, as promised for a machine of two cores."""


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


def run_short_of_memory(deployment: Deployment, api: Api) -> None:
    """While Redis is full, one more job is refused for now."""
    deployment.fill_memory()
    refused = api.post("too much", wait_s=0)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    deployment.free_memory()


def look_again(customers: list[Customer], suicide: Customer) -> int:
    """Answers, ids and pictures are the same at a second look; how many pictures there are."""
    for customer in [*customers, suicide]:
        assert {job_id: customer.final_answer(job_id) for job_id in customer.answers} == customer.answers
        assert {key: customer.order(key) for key in customer.orders} == customer.orders
    pictures = {
        (job_id, index): customer.picture(job_id, index)
        for customer in customers
        for key, job_id in customer.orders.items()
        for index in range(customer.bodies[key]["n"])
    }
    assert pictures == {shown: customers[0].picture(*shown) for shown in pictures}
    return len(pictures)


def account_for(deployment: Deployment, orders: list[str], num_done: int, accepted: Path) -> int:
    """The audit misses nothing, and names every file that no job shows; how many those are."""
    accepted.write_text("".join(f"{job_id}\n" for job_id in orders))
    report = audited(deployment, accepted)
    counts = report["counts"]
    assert (counts["accepted"], counts["lost"], counts["failed"]) == (len(orders), 0, 1)
    assert counts["done"] == num_done
    named = {leftover["object"] for leftover in report["leftovers"]}
    assert set(deployment.files()) - deployment.shown_files() == named
    return len(named)


def serve_again(apis: list[Api]) -> None:
    """Each api draws."""
    for api in apis:
        poll(api.ready, timeout_s=PATIENCE_S)
        assert api.post("after the storm").status_code == 200


def median_wait_s(customers: list[Customer], made: str) -> float:
    """From a request to its answer."""
    waits_s = sorted(wait_s for customer in customers for wait_s in customer.waits_s)
    median_s = statistics.median(waits_s)
    print(  # noqa: T201 - shown when the test fails
        f"{len(waits_s)} jobs, {made}; answered after {median_s:.2f} s (median), {waits_s[-1]:.1f} s at most"
    )
    return median_s


@pytest.mark.timeout(3600)
def test_storm_of_kills_and_freezes_loses_no_job_and_shows_none_twice(
    deployment: Deployment, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    size = "full" if pytestconfig.getoption("--storm") else "short"
    seed = random.randrange(10**6)
    print(f"storm of seed {seed}")  # noqa: T201 - shown when the test fails
    apis = [deployment.api("api 0"), deployment.api("api 1")]
    workers = [deployment.worker("worker 0").brake(), deployment.worker("worker 1").brake()]
    deployment.started(*workers)
    rng = random.Random(seed)
    *customers, suicide = [
        Customer(number, apis, random.Random(rng.random())) for number in range(NUM_CUSTOMERS + 1)
    ]
    enough = threading.Event()
    shopping = [deployment.background.submit(customer.shop, enough) for customer in customers]

    def num_ended() -> int:
        for done in [one for one in shopping if one.done()]:
            done.result()  # raises what the customer met
        return sum(len(customer.answers) for customer in customers)

    def wait_for_ended(count: int) -> None:
        poll(lambda: num_ended() >= count, timeout_s=PATIENCE_S)

    try:
        # Memory is short before anything has ended: nobody is told "come again" and forgotten.
        poll(lambda: len(deployment.job_ids()) == NUM_CUSTOMERS)
        run_short_of_memory(deployment, apis[0])
        for worker in workers:
            worker.release()

        with Storm(deployment, apis, workers, rng) as storm:
            poisoning = deployment.background.submit(buy_poison, suicide)
            storm.rage(
                kills=KILLS_OF_EACH[size],
                freezes=FREEZES_OF_EACH[size],
                calm=lambda: wait_for_ended(num_ended() + JOBS_BETWEEN_BLOWS[size]),
            )
            wait_for_ended(NUM_JOBS[size])
            poison = poisoning.result()
            enough.set()
            for one in shopping:
                one.result()
    finally:
        enough.set()

    assert (poison["status"], poison["error"]["code"]) == ("failed", "poison")
    assert 1 <= storm.num_deaths <= 3
    orders = {key: job_id for customer in [*customers, suicide] for key, job_id in customer.orders.items()}
    answers = {job_id: job for customer in customers for job_id, job in customer.answers.items()}
    assert len(orders) == len(answers) + 1 >= NUM_JOBS[size] + 1
    assert set(orders.values()) == set(deployment.job_ids())  # no order made two jobs, and no job was lost
    assert {job["status"] for job in answers.values()} == {"completed"}  # an innocent one is never convicted

    num_pictures = look_again(customers, suicide)
    num_leftovers = account_for(deployment, list(orders.values()), len(answers), tmp_path / "accepted")
    serve_again(apis)
    median_s = median_wait_s(customers, f"{num_pictures} pictures, {num_leftovers} leftovers")
    assert size == "short" or median_s <= MEDIAN_WAIT_S
