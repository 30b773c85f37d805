"""What a storm is made of: customers who go on asking, and blows that fall on every process meanwhile."""

from __future__ import annotations

import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx

from tests.failures.deployment import Deployment
from tests.failures.engine import LETHAL
from tests.failures.processes import PATIENCE_S, Api, Worker

COME_AGAIN = frozenset({429, 503})
NUM_IMAGES = (1, 1, 1, 1, 2, 8)
"""A job asks for one of these, at random."""
MAX_ATTEMPTS = 3
FREEZE_S = {"worker": (0.3, 4.0), "api": (0.3, 2.0), "redis": (0.3, 0.8)}
"""A worker also stays away longer than its lease lasts. Redis less long: while it stands still, nobody can
extend a lease, so each freeze of it would count as an attempt of whatever runs."""


@dataclass
class Customer:
    """Asks for one job after another, and again whenever it gets no answer, as our docs tell clients to.

    Attributes:
        orders: idempotency key -> job id.
        bodies: idempotency key -> what was asked for.
        answers: job id -> what the first look at the finished job showed.
        waits_s: from the first word of a request to the sight of its answer, of each.
        refusals: error code -> how often it was asked to come again.
    """

    number: int
    apis: list[Api]
    rng: random.Random
    orders: dict[str, str] = field(default_factory=dict)
    bodies: dict[str, dict[str, Any]] = field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)
    waits_s: list[float] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)

    def shop(self, enough: threading.Event) -> None:
        """Until `enough` is set; the last answer is waited for."""
        while not enough.is_set():
            self.buy(f"a cube for {self.number}-{len(self.orders)}", n=self.rng.choice(NUM_IMAGES))

    def buy(self, prompt: str, *, n: int = 1) -> dict[str, Any]:
        """One job, from the order to its final answer."""
        key = f"{self.number}-{len(self.orders)}"
        self.bodies[key] = {"prompt": prompt, "n": n}
        began = time.monotonic()
        job_id = self.order(key)
        self.orders[key] = job_id
        if self.rng.random() < 0.5:
            assert self.order(key, wait_s=5) == job_id
        self.answers[job_id] = answer = self.final_answer(job_id)
        self.waits_s.append(time.monotonic() - began)
        return answer

    def order(self, key: str, *, wait_s: float = 0) -> str:
        """Ask under a key until the job's id comes back."""
        body = {**self.bodies[key], "wait_s": wait_s}
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

    def picture(self, job_id: str, index: int) -> bytes:
        """The bytes of one image of a finished job."""
        answer = self.insist("GET", f"/v1/images/{job_id}/content", params={"index": index})
        assert answer.status_code == 200, answer.text
        return answer.content

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
            self.refusals[answer.json()["error"]["code"]] += 1
            time.sleep(self.rng.uniform(0, 0.1))  # a polite client's pause
        raise TimeoutError(f"{method} {path} has not been answered for {PATIENCE_S} s")


@dataclass(frozen=True)
class Blow:
    """What happens to one process."""

    how: Literal["kill", "freeze"]
    whom: Literal["worker", "api", "redis"]


class Storm:
    """Deals the blows, and starts again what died; nobody can tell one blow too many on one job from a
    request that kills, so a worker with a job in its last attempt is spared.
    """

    def __init__(
        self, deployment: Deployment, apis: Sequence[Api], workers: Sequence[Worker], rng: random.Random
    ) -> None:
        self._deployment = deployment
        self._apis = apis
        self._workers = workers
        self._rng = rng
        self._at_workers = threading.Lock()
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper")
        self.num_deaths = 0
        """Of workers that this storm did not kill."""

    def __enter__(self) -> Storm:
        self._keeper.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._keeper.join()

    def rage(self, *, kills: int, freezes: int, calm: Callable[[], None]) -> None:
        """Kill and freeze each kind of process so often, in any order; `calm` waits between two blows."""
        kinds: tuple[Literal["worker", "api", "redis"], ...] = ("worker", "api", "redis")
        blows = [
            *[Blow("kill", whom) for whom in kinds] * kills,
            *[Blow("freeze", whom) for whom in kinds] * freezes,
        ]
        self._rng.shuffle(blows)
        for blow in blows:
            if self._rng.random() < 2 / 3:
                calm()
            self._strike(blow)

    def _strike(self, blow: Blow) -> None:
        if blow.whom == "worker":
            self._strike_a_worker(blow)
        elif blow.whom == "api":
            api = self._rng.choice(self._apis)
            if blow.how == "kill":
                api.kill()
                api.start()
            else:
                self._freeze(api.send, blow)
        elif blow.how == "kill":
            self._deployment.redis.kill()
            self._deployment.redis.start()
        else:
            self._freeze(self._deployment.redis.send, blow)

    def _strike_a_worker(self, blow: Blow) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            with self._at_workers:
                worker = self._rng.choice(self._workers)
                if not _held(worker):
                    continue
                try:
                    struck = self._deployment.latest_attempt(worker) < MAX_ATTEMPTS
                    if struck and blow.how == "kill":
                        worker.kill()
                        worker.start()
                    elif struck:
                        self._last(blow)
                finally:
                    if worker.alive:
                        worker.send(signal.SIGCONT)
            if struck:
                return
        raise TimeoutError(f"no worker without a job in its last attempt for {PATIENCE_S} s")

    def _freeze(self, send: Callable[[signal.Signals], None], blow: Blow) -> None:
        send(signal.SIGSTOP)
        self._last(blow)
        send(signal.SIGCONT)

    def _last(self, blow: Blow) -> None:
        time.sleep(self._rng.uniform(*FREEZE_S[blow.whom]))  # what a freeze is; nothing is waited for

    def _keep(self) -> None:
        """Start workers again that died of a request."""
        while not self._over.wait(0.05):
            with self._at_workers:
                for worker in self._workers:
                    if not worker.alive:
                        self.num_deaths += 1
                        worker.start()


def _held(worker: Worker) -> bool:
    """Stop a worker: whoever is looked at must not move. False if it has died of a request."""
    if worker.alive:
        with suppress(ProcessLookupError):  # this very moment
            worker.send(signal.SIGSTOP)
    return worker.alive


def buy_poison(customer: Customer) -> dict[str, Any]:
    """Ask for what kills whoever draws it; its final answer."""
    return customer.buy(LETHAL)
