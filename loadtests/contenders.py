"""What the benchmark compares: our server, and others around the same student; a round starts each anew."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from loadtests import machine
from loadtests.process import ServerProcess, free_port

PEERS = ("lock", "litserve", "litserve-engine")
"""Names for the command line."""
LITSERVE = ("litserve==0.2.19", "pyzmq==27.3.0")
"""Installed when it is compared with; all else that it needs is here."""
LITSERVE_BATCHES = (8, 16)


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a server's processes: seconds of CPU by what they are, and memory, shared pages counted once."""

    cpu_s: dict[str, float]
    memory_bytes: int


class MeasuredServer(ServerProcess):
    """One that can say what it takes."""

    def usage(self) -> Usage:
        """What it and its children have used so far, and hold now."""
        cpu_s: dict[str, float] = {}
        memory_bytes = 0
        server = psutil.Process(self._process.pid)
        for process in [server, *server.children(recursive=True)]:
            try:
                name, times = _role(process.cmdline()), process.cpu_times()
                memory_bytes += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
            cpu_s[name] = cpu_s.get(name, 0.0) + times.user + times.system
        return Usage(cpu_s, memory_bytes)


def _role(command: Sequence[str]) -> str:
    """What a process is, as far as its command line says."""
    words = [Path(word).name for word in command]
    for role in ("api", "worker", "up"):
        if role in words:
            return role
    return "valkey" if any("valkey" in word for word in words) else "server"


class Contender(Protocol):
    """A server that can be started for one round."""

    name: str

    def start(self) -> MeasuredServer:
        """A process that is not started yet, on a free port."""
        ...


class OurServer:
    """`python -m server up` on a data directory of its own; the first start builds the bundle."""

    name = "tdm-server"

    def __init__(self, bundle: Path | None, scratch: Path, **settings: object) -> None:
        """Serve `bundle`, or build the shipped one; `settings` go into the environment as TDM_*."""
        self._bundle = bundle
        self._scratch = scratch
        self._settings = {f"TDM_{setting.upper()}": str(value) for setting, value in settings.items()}

    def built_bundle(self) -> Path:
        """The bundle for pictures that a start without one has built."""
        for path in sorted((self._scratch / "data" / "bundles").glob("*/manifest.json")):
            if json.loads(path.read_text(encoding="utf-8"))["kind"] == "image":
                return path.parent
        raise RuntimeError(f"{self.name} has built no bundle for pictures")

    def start(self) -> MeasuredServer:
        """A process that is not started yet, on a free port."""
        port = free_port()
        environment = {
            "TDM_HOST": "127.0.0.1",
            "TDM_PORT": str(port),
            "TDM_METRICS_PORT": "0",
            "TDM_DATA_DIR": str(self._scratch / "data"),
            "TDM_BUNDLES": str(self._bundle or ""),
            "TDM_REDIS_URL": "",
            **self._settings,
        }
        log = self._scratch / "server.log"
        return MeasuredServer(["server", "up"], port=port, log=log, environment=environment)


class DiffusersBehindALock:
    """`loadtests.peers.diffusers_lock` with a number of threads for torch."""

    def __init__(self, student: Path, num_threads: int, scratch: Path) -> None:
        self.name = f"diffusers + lock, {num_threads} thread{'s' * (num_threads > 1)}"
        self._student = student
        self._num_threads = num_threads
        self._scratch = scratch

    def start(self) -> MeasuredServer:
        """A process that is not started yet, on a free port."""
        port = free_port()
        arguments = ["loadtests.peers.diffusers_lock", str(self._student), f"--port={port}"]
        return MeasuredServer(
            [*arguments, f"--threads={self._num_threads}"],
            port=port,
            log=self._scratch / "peer.log",
            environment={"OMP_NUM_THREADS": str(self._num_threads)},
        )


class LitServe:
    """`loadtests.peers.litserve_batches`: two processes of one thread around a student or a bundle."""

    def __init__(self, directory: Path, max_batch: int, packages: Path, scratch: Path) -> None:
        around = "our engine" if (directory / "manifest.json").exists() else "diffusers"
        self.name = f"LitServe, {around}, batches of {max_batch}"
        self._directory = directory
        self._max_batch = max_batch
        self._packages = packages
        self._scratch = scratch

    def start(self) -> MeasuredServer:
        """A process that is not started yet, on a free port."""
        port = free_port()
        arguments = ["loadtests.peers.litserve_batches", str(self._directory), f"--port={port}"]
        return MeasuredServer(
            [*arguments, f"--batch={self._max_batch}", f"--workers={machine.hardware()['cores']}"],
            port=port,
            log=self._scratch / "litserve.log",
            environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self._packages)},
        )


def install_litserve(folder: Path) -> Path:
    """A folder with LitServe in it, for PYTHONPATH.

    Raises:
        RuntimeError: it cannot be had.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, *LITSERVE], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(LITSERVE)} cannot be installed:\n{done.stderr}")
    return folder


def rivals(peers: Sequence[str], *, student: Path, bundle: Path, scratch: Path) -> dict[str, list[Contender]]:
    """For each of `PEERS` that is asked for, settings among which a trial finds the best.

    Raises:
        RuntimeError: what one of them needs cannot be had.
    """
    found: dict[str, list[Contender]] = {}
    for peer in peers:
        if peer == "lock":
            threads = sorted({1, machine.hardware()["cores"]})
            found[peer] = [DiffusersBehindALock(student, num_threads, scratch) for num_threads in threads]
            continue
        packages = scratch / "litserve"
        if not packages.exists():
            install_litserve(packages)
        around = student if peer == "litserve" else bundle
        found[peer] = [LitServe(around, max_batch, packages, scratch) for max_batch in LITSERVE_BATCHES]
    return found
