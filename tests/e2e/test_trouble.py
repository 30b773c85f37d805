"""Ordinary trouble around `up`, none of which may end it: what is healthy is served."""

from __future__ import annotations

import json
import shutil
import signal
import socket
from pathlib import Path

import httpx
import psutil

from tests.e2e.system import TIMEOUT_S, System, poll, running


def draws(http: httpx.Client, model: str = "tiny") -> bool:
    return http.post("/v1/images", json={"prompt": "a red cube", "model": model}).status_code == 200


def test_reader_of_its_output_may_leave(bundle: Path, tmp_path: Path) -> None:
    with running(System(tmp_path, bundle), through_a_pipe=True) as system, system.client() as http:
        worker = system.worker()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        assert system.worker().pid != worker.pid  # its end was told to nobody, and it has a successor
        assert draws(http)
        assert system.end() == 0


def test_every_process_may_open_as_many_files_as_the_system_allows(system: System) -> None:
    limits = {process.rlimit(psutil.RLIMIT_NOFILE) for process in system.processes()}
    assert {soft for soft, _ in limits} == {hard for _, hard in limits}


def test_damaged_bundle_leaves_the_other_one_served(bundle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bundle, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "name": "other"}))
    weights = next((other / "checkpoint" / "vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")

    with running(System(tmp_path, f"{other},{bundle}", workers=2)) as system, system.client() as http:
        poll(lambda: "other: worker 0 ended with status 2; it is not served" in system.log)
        assert "model tiny, 1 worker" in system.log
        assert draws(http)
        assert system.end() == 0


def test_metrics_port_that_is_taken_costs_the_metrics_alone(bundle: Path, tmp_path: Path) -> None:
    system = System(tmp_path, bundle)
    with socket.create_server(("127.0.0.1", system.metrics_port + 1)), running(system):
        with system.client() as http:
            assert draws(http)
        assert f"no metrics: cannot listen on 127.0.0.1:{system.metrics_port + 1}" in system.log
        api = httpx.get(f"http://127.0.0.1:{system.metrics_port}/metrics", timeout=TIMEOUT_S)
        assert "tdm_" in api.text


def test_bundle_that_is_damaged_while_it_is_served_is_tried_again(bundle: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(bundle, tmp_path / "mine")
    weights = next((mine / "checkpoint" / "vae").glob("*.safetensors"))
    whole = weights.read_bytes()
    with running(System(tmp_path, mine)) as system, system.client() as http:
        weights.write_bytes(whole[:-1] + b"!")
        system.worker().send_signal(signal.SIGKILL)
        poll(lambda: "worker 0 ended with status 2; starting it again" in system.log)
        weights.write_bytes(whole)
        assert draws(http)
