"""Real processes under a test's control: Redis or Valkey, api, worker. Started, killed, frozen, looked at."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Self

import httpx
import redis
from prometheus_client.parser import text_string_to_metric_families

from server.queue.connection import connect
from server.supervisor.valkey import die_with_parent
from tests.failures.engine import BATCHES, BRAKE, DOOR, LOADED, run_scripted_worker
from tests.failures.skew import SKEW
from tests.server.conftest import poll

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 560.0
"""How long tests wait for what must come. Not an expectation: shared machines can be very slow."""


class RedisServer:
    """A Redis or Valkey that syncs every write to its append-only file, as production is told to."""

    def __init__(self, binary: Path, folder: Path, **options: str) -> None:
        """Nothing runs before `start`; its data lies in `folder/data` and outlasts it."""
        self.socket = folder / "redis.sock"
        self.data = folder / "data"
        self._binary = binary
        self._more_options = options
        self._log = folder / "redis.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """`unix://` URL."""
        return f"unix://{self.socket}"

    def start(self) -> RedisServer:
        """Run it on the data that is there; returns once it answers."""
        self.data.mkdir(exist_ok=True)
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.data),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
            **self._more_options,
        }
        command = [part for name, value in options.items() for part in (f"--{name}", value)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, *command],
                stdout=log,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, looked up before the fork
            )
        poll(self._answers)
        return self

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None, "not started"
        self._process.kill()
        self._process.wait()
        self.socket.unlink(missing_ok=True)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None, "not started"
        self._process.send_signal(number)

    def join(self) -> int:
        """Its exit status, once it has ended by itself."""
        assert self._process is not None, "not started"
        return self._process.wait(PATIENCE_S)

    def save_data(self, name: str) -> None:
        """Keep a copy of the data as it is on disk now."""
        shutil.copytree(self.data, self.data.with_name(name))

    def restore_data(self, name: str) -> None:
        """Replace the data of a server that does not run; without such a copy there is none left."""
        shutil.rmtree(self.data)
        with suppress(FileNotFoundError):
            shutil.copytree(self.data.with_name(name), self.data)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        client = connect(self.url)
        try:
            return bool(client.ping())
        except redis.ConnectionError:  # also: it is still loading its data
            return False
        finally:
            client.close()


class Process(ABC):
    """What api and worker have in common."""

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str], metrics_port: int) -> None:
        self.name = name
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self._environment = environment
        self._metrics_port = metrics_port

    @property
    @abstractmethod
    def pid(self) -> int:
        """Process id of its present life."""

    @property
    def log(self) -> str:
        """What all its lives have written."""
        return (self.folder / "log").read_text(errors="replace")

    @abstractmethod
    def start(self) -> Self:
        """Begin a new life."""

    @abstractmethod
    def join(self) -> int:
        """Its exit status (negative for a signal), once it has ended."""

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; also to a frozen one, or to one that has died a moment ago."""
        with suppress(ProcessLookupError):
            self.send(signal.SIGKILL)
        self.join()

    @property
    def scraped(self) -> str:
        """`HOST:PORT` of its metrics."""
        return f"127.0.0.1:{self._metrics_port}"

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that have these labels, as Prometheus would read them."""
        text = httpx.get(f"http://{self.scraped}/metrics", timeout=PATIENCE_S).text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == f"tdm_{name}" and labels.items() <= sample.labels.items()
        )


class Api(Process):
    """`python -m server api`. The socket is the test's, as it is the supervisor's in `up`: a new life, or
    another process, goes on with the connections that wait in it.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        environment: Mapping[str, str],
        metrics_port: int,
        listener: socket.socket | None = None,
    ) -> None:
        super().__init__(name, folder, environment, metrics_port)
        self.listener = listener or socket.create_server(("127.0.0.1", 0), backlog=512)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        # A connection per request: those of a killed process are of no use to its successor's clients.
        self.http = httpx.Client(
            base_url=self.url, timeout=PATIENCE_S, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> Self:
        """Run it; its socket takes connections at once."""
        with (self.folder / "log").open("ab") as log:
            module = "tests.failures.skew" if SKEW in self._environment else "server"
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "api"],
                cwd=ROOT,
                env={**self._environment, "TDM_LISTEN_FD": str(self.listener.fileno())},
                pass_fds=[self.listener.fileno()],
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, looked up before the fork
            )
        return self

    def join(self) -> int:
        assert self._process is not None, "not started"
        return self._process.wait(PATIENCE_S)

    def close(self) -> None:
        """End it for good, and refuse its clients."""
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self.http.close()
        self.listener.close()

    def post(
        self, prompt: str, *, key: str | None = None, wait_s: float | None = None, **fields: Any
    ) -> httpx.Response:
        """`POST /v1/images`; it waits for the picture unless `wait_s` says otherwise."""
        headers = {} if key is None else {"idempotency-key": key}
        body = {"prompt": prompt, **({} if wait_s is None else {"wait_s": wait_s}), **fields}
        return self.http.post("/v1/images", json=body, headers=headers)

    def accept(self, prompt: str, **fields: Any) -> str:
        """Have a job accepted and do not wait for it; its id."""
        response = self.post(prompt, wait_s=0, **fields)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def look(self, job_id: str) -> dict[str, Any]:
        """The job as `GET /v1/images/{id}` shows it, or the error."""
        body: dict[str, Any] = self.http.get(f"/v1/images/{job_id}").json()
        return body

    def ended(self, job_id: str) -> dict[str, Any]:
        """The job, once it has its final answer."""
        poll(lambda: self.look(job_id).get("status") in ("completed", "failed"), timeout_s=PATIENCE_S)
        return self.look(job_id)

    def wait_until(self, job_id: str, status: str) -> None:
        """Return once the job has this status."""
        poll(lambda: self.look(job_id).get("status") == status, timeout_s=PATIENCE_S)

    def ready(self) -> bool:
        """A request sent now would be served."""
        return self.http.get("/readyz").status_code == 200


class Worker(Process):
    """A worker process over a `ScriptedPipeline`, forked from a server that has torch imported already.

    What runs in it is what `python -m server worker` runs; it only starts in a fraction of the time.
    """

    def __init__(self, name: str, folder: Path, environment: Mapping[str, str], metrics_port: int) -> None:
        super().__init__(name, folder, environment, metrics_port)
        self._process: ForkServerProcess | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        assert self._process.pid is not None
        return self._process.pid

    @property
    def batches(self) -> list[list[str]]:
        """Prompts of the batches that its lives have begun."""
        path = self.folder / BATCHES
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def alive(self) -> bool:
        """It has not ended."""
        return self._process is not None and self._process.is_alive()

    def start(self) -> Self:
        if self._process is not None:
            self.join()
            self._process.close()
        self._process = fork_server().Process(
            target=run_scripted_worker,
            args=(dict(self._environment), self.folder, self.folder / "log"),
            daemon=True,
        )
        self._process.start()
        return self

    def wait_at_the_door(self) -> Worker:
        """Begin a new life up to where it would announce itself; `Deployment.started` lets it go on."""
        (self.folder / LOADED).unlink(missing_ok=True)
        (self.folder / DOOR).touch()
        self.start()
        poll((self.folder / LOADED).exists, timeout_s=PATIENCE_S)
        return self

    def let_in(self) -> bool:
        """Let it go on; False if it does not wait at the door."""
        waited = (self.folder / DOOR).exists()
        (self.folder / DOOR).unlink(missing_ok=True)
        return waited

    def brake(self) -> Worker:
        """Have its engine wait before each step, in this life and the next ones."""
        (self.folder / BRAKE).touch()
        return self

    def release(self) -> None:
        """Let its engine go on."""
        (self.folder / BRAKE).unlink(missing_ok=True)

    def join(self) -> int:
        assert self._process is not None, "not started"
        self._process.join(PATIENCE_S)
        assert self._process.exitcode is not None, f"{self.name} does not end:\n{self.log}"
        return self._process.exitcode

    def close(self) -> None:
        """End it for good."""
        if self._process is not None:
            if self.alive:
                self.kill()
            self._process.close()


@cache
def fork_server() -> ForkServerContext:
    """One for all tests: a process that has imported what a worker needs, and done nothing with it."""
    context = multiprocessing.get_context("forkserver")
    # The family, too: a worker imports diffusers for code that is not compiled, which takes it seconds.
    context.set_forkserver_preload([run_scripted_worker.__module__, "engines.families.pixart"])
    return context
