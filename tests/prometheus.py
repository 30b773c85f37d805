"""A real Prometheus for the tests: it scrapes processes of ours each second, with the shipped rules."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.ports import reserve_port
from tests.server.conftest import poll

SHIPPED = Path(__file__).resolve().parent.parent / "deploy/prometheus"
PERIOD_S = 1
"""Between two scrapes, and between two evaluations of the rules."""


class Prometheus:
    """The API of a Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.started_s = time.time()
        self._http = httpx.Client(base_url=url, timeout=60.0)

    def get(self, path: str, **params: object) -> Any:
        """The `data` of an answer of `/api/v1/PATH`."""
        answer = self._http.get(f"/api/v1/{path}", params={name: str(one) for name, one in params.items()})
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def series(self, query: str) -> list[dict[str, Any]]:
        """What a panel that shows all the time since the start would draw for this query."""
        span = {"start": self.started_s, "end": time.time(), "step": PERIOD_S}
        found: list[dict[str, Any]] = self.get("query_range", query=query, **span)["result"]
        return found

    def is_ready(self) -> bool:
        """It can be asked."""
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def close(self) -> None:
        """Close the connections to it."""
        self._http.close()


def configuration(folder: Path, targets: Mapping[str, Sequence[str]]) -> Path:
    """The shipped configuration at a pace for tests, written to `folder`.

    Args:
        folder: takes the configuration and its rules.
        targets: `HOST:PORT` of the processes of every job of the shipped configuration.
    """
    config = yaml.safe_load((SHIPPED / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": f"{PERIOD_S}s", "evaluation_interval": f"{PERIOD_S}s"}
    assert targets.keys() == {job["job_name"] for job in config["scrape_configs"]}
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": list(targets[job["job_name"]])}]
    (folder / "rules").mkdir(parents=True)
    for file in (SHIPPED / "rules").glob("*.yml"):
        rules = yaml.safe_load(file.read_text(encoding="utf-8"))
        for group in rules["groups"]:
            group.pop("interval", None)
        (folder / "rules" / file.name).write_text(yaml.safe_dump(rules), encoding="utf-8")
    written = folder / "prometheus.yml"
    written.write_text(yaml.safe_dump(config), encoding="utf-8")
    return written


@contextmanager
def running_prometheus(folder: Path, targets: Mapping[str, Sequence[str]]) -> Iterator[Prometheus]:
    """A Prometheus with the shipped configuration that takes remote writes; the test skips without one."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (apt install prometheus)")
    address = f"127.0.0.1:{reserve_port()}"
    command = [
        *(binary, f"--config.file={configuration(folder, targets)}"),
        *(f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"),
        "--web.enable-remote-write-receiver",
    ]
    log = folder / "log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        prometheus = Prometheus(f"http://{address}")

        def is_ready() -> bool:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            return prometheus.is_ready()

        try:
            poll(is_ready)
            yield prometheus
        finally:
            prometheus.close()
            process.kill()
