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
from loadtests.process import ROOT, ServerProcess, free_port


@dataclass(frozen=True, slots=True)
class Framework:
    """Its name, the module in `loadtests.peers` that serves with it, and what to tell pip."""

    name: str
    module: str
    packages: tuple[str, ...]


PEERS = ("lock", "litserve", "litserve-engine", "ray", "ray-engine")
"""Names for the command line."""
FRAMEWORKS = {
    "litserve": Framework("LitServe", "litserve_batches", ("--no-deps", "litserve==0.2.19", "pyzmq==27.3.0")),
    "ray": Framework("Ray Serve", "ray_serve", ("ray[serve]==2.60.0",)),
}
"""Those that batch. What is missing is installed when they are compared with."""
BATCHES = (8, 16)


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


class Batching:
    """A framework that batches: a process of one thread for each core, around a student or a bundle."""

    def __init__(
        self, framework: Framework, directory: Path, max_batch: int, packages: Path, scratch: Path
    ) -> None:
        around = "our engine" if (directory / "manifest.json").exists() else "diffusers"
        self.name = f"{framework.name}, {around}, batches of {max_batch}"
        self._module = f"loadtests.peers.{framework.module}"
        self._directory = directory
        self._max_batch = max_batch
        self._packages = packages
        self._scratch = scratch

    def start(self) -> MeasuredServer:
        """A process that is not started yet, on a free port."""
        port = free_port()
        arguments = [self._module, str(self._directory), f"--port={port}"]
        return MeasuredServer(
            [*arguments, f"--batch={self._max_batch}", f"--workers={machine.hardware()['cores']}"],
            port=port,
            log=self._scratch / "peer.log",
            environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(self._packages)},
        )


def install(packages: Sequence[str], folder: Path) -> None:
    """Put packages into a folder for PYTHONPATH; what we have too is there in our version.

    Raises:
        RuntimeError: they cannot be had.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
    command += ["--constraint", str(ROOT / "constraints.txt"), *packages]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(packages)} cannot be installed:\n{done.stderr}")


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
        name, _, engine = peer.partition("-")
        framework, packages = FRAMEWORKS[name], scratch / name
        if not packages.exists():
            install(framework.packages, packages)
        around = bundle if engine else student
        found[peer] = [Batching(framework, around, size, packages, scratch) for size in BATCHES]
    return found
