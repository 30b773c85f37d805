"""Deployment: one Redis, and the api and worker processes that a test adds to it."""

from __future__ import annotations

import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engines.bundle.manifest import read_manifest
from server.queue.connection import connect
from server.queue.keys import class_prefix, stream_of
from tests.failures.processes import PATIENCE_S, Api, RedisServer, Worker
from tests.failures.proxy import Proxy
from tests.failures.skew import SKEW
from tests.ports import reserve_port
from tests.server.conftest import poll

MODEL = "tiny"
PREFIX = class_prefix(MODEL)
LEASE_S = 2.0


class Deployment:
    """Everything under one folder; `close` ends whatever is left."""

    def __init__(self, folder: Path, bundle: Path, redis: RedisServer) -> None:
        self.redis = redis
        self.client = connect(redis.url)
        self.results = folder / "results"
        self.background = ThreadPoolExecutor(16, "client")
        self._folder = folder
        self._bundle = bundle
        self._parts: list[Api | Worker | Proxy] = []

    def api(
        self,
        name: str = "api",
        *,
        redis_url: str = "",
        listener: socket.socket | None = None,
        skew_s: float = 0,
        **settings: Any,
    ) -> Api:
        """Start an api process; returns once it answers."""
        port = reserve_port()
        environment = self._environment(redis_url, skew_s, metrics_port=port, **settings)
        api = Api(name, self._folder / name, environment, port, listener)
        self._parts.append(api)
        api.start()
        answer = api.http.get("/healthz")
        assert answer.status_code == 200, api.log
        return api

    def worker(
        self, name: str = "worker", *, redis_url: str = "", skew_s: float = 0, **settings: Any
    ) -> Worker:
        """A worker process that is not started yet."""
        port = reserve_port()
        settings = {"bundles": self._bundle, **settings}
        environment = self._environment(redis_url, skew_s, metrics_port=port - 1, **settings)
        worker = Worker(name, self._folder / name, environment, port)
        self._parts.append(worker)
        return worker

    def started(self, *workers: Worker) -> None:
        """Start workers, or let in those at the door; returns once all have announced themselves."""
        for worker in workers:
            if not worker.let_in():
                worker.start()
        poll(lambda: all(self.has_announced(worker) for worker in workers), timeout_s=PATIENCE_S)

    def has_announced(self, worker: Worker) -> bool:
        """Redis knows the worker's present life."""
        assert worker.alive, f"{worker.name} ended with {worker.join()}:\n{worker.log}"
        infos: Any = self.client.hkeys(f"{PREFIX}:w")
        return any(f"-{worker.pid}-" in consumer for consumer in infos)

    @property
    def lane(self) -> str:
        """The stream that its workers read."""
        return stream_of(MODEL, read_manifest(self._bundle).version)

    def introduce_model(self) -> None:
        """Leave the bundle's manifest in Redis, as a worker does that was here and has gone."""
        self.client.hset("q:2:models", MODEL, (self._bundle / "manifest.json").read_text())

    def proxy(self) -> Proxy:
        """A way to Redis that the test can cut."""
        proxy = Proxy(self.redis.socket)
        self._parts.append(proxy)
        return proxy

    def job_ids(self) -> list[str]:
        """Every job that Redis knows."""
        keys: Any = self.client.scan_iter(f"{PREFIX}:j:*", count=1000)
        return sorted(key.rpartition(":")[2] for key in keys)

    def attempts(self, job_id: str) -> int:
        """How often the job was started."""
        count: Any = self.client.hget(f"{PREFIX}:j:{job_id}", "attempt")
        return int(count)

    def latest_attempt(self, worker: Worker) -> int:
        """The highest attempt of the jobs that run in a worker that stands still; 0 if none does."""
        self.client.ping()  # once this is answered, so is whatever the worker sent before it stood still
        attempts = [0]
        for job_id in self.job_ids():
            found: Any = self.client.hmget(f"{PREFIX}:j:{job_id}", "status", "worker", "attempt")
            status, owner, attempt = found
            if status == "running" and f"-{worker.pid}-" in owner:
                attempts.append(int(attempt))
        return max(attempts)

    def fill_memory(self) -> None:
        """Leave Redis no memory for anything that is not allowed to go beyond it."""
        self.client.set("filler", "x" * 4_000_000)
        self.client.config_set("maxmemory", 3_000_000)

    def free_memory(self) -> None:
        """Give it back."""
        self.client.delete("filler")
        self.client.config_set("maxmemory", 0)

    def shown_files(self) -> set[str]:
        """Keys of the results that Redis knows."""
        found: set[str] = set()
        for job_id in self.job_ids():
            outputs: Any = self.client.hget(f"{PREFIX}:j:{job_id}", "outputs")
            found |= {output["key"] for output in json.loads(outputs or "[]")}
        return found

    def files(self) -> list[str]:
        """Keys of everything in the result store."""
        return sorted(
            str(path.relative_to(self.results)) for path in self.results.rglob("*") if path.is_file()
        )

    def close(self) -> None:
        """End everything but Redis, which is the caller's."""
        for part in self._parts:
            if isinstance(part, Worker):
                part.close()  # before the proxies: a killed process holds no connection
        for part in self._parts:
            if isinstance(part, Api):
                part.close()
        for part in self._parts:
            if isinstance(part, Proxy):
                part.close()
        self.background.shutdown()
        self.client.close()

    def _environment(self, redis_url: str, skew_s: float, **settings: Any) -> dict[str, str]:
        named = {
            "redis_url": redis_url or self.redis.url,
            "data_dir": self._folder,
            "store_url": self.results.as_uri(),
            "backend": "eager",
            "lease_s": LEASE_S,
            "job_deadline_s": 600,
            "max_wait_s": 300,
            **settings,
        }
        return {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **({SKEW: str(skew_s)} if skew_s else {}),
            **{f"TDM_{name.upper()}": str(value) for name, value in named.items()},
        }
