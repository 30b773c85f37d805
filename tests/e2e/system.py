"""A whole system under test: `python -m server up` in processes of its own, as a user starts it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

from tests.ports import reserve_ports
from tests.server.conftest import pace

T = TypeVar("T")

# Patience, not expectation: shared machines can be very slow, and a dead system is noticed at once.
TIMEOUT_S = 560.0


def poll(look: Callable[[], T | None], timeout_s: float = TIMEOUT_S) -> T:
    """The first truthy answer of `look`."""
    deadline = time.monotonic() + timeout_s
    pace_s = pace()
    while not (found := look()):
        assert time.monotonic() < deadline, f"still {found!r} after {timeout_s:g} s"
        time.sleep(next(pace_s))  # the pace of the polling, not a synchronisation
    return found


class System:
    """One `up` with one worker. Processes are found as descendants, so none is overlooked."""

    def __init__(self, data_dir: Path, bundle: Path | str, *, name: str = "up", **settings: object) -> None:
        """Nothing runs before `start`; `name` tells the logs of several on one data directory apart."""
        self.data_dir = data_dir
        self.metrics_port, _ = reserve_ports(2)  # the api's, and the worker's beside it
        self._log = data_dir / f"{name}.log"
        self._environment = {
            **os.environ,
            **{
                f"TDM_{name.upper()}": str(value)
                for name, value in {
                    "port": 0,
                    "metrics_port": self.metrics_port,
                    "data_dir": data_dir,
                    "bundles": bundle,
                    "workers": 1,
                    "lease_s": 5,
                    **settings,
                }.items()
            },
        }
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, through_a_pipe: bool = False) -> System:
        """Start it, and return once it says that it is ready.

        Args:
            through_a_pipe: read what it says up to then from a pipe, whose end is closed after that.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "server", "up"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if through_a_pipe else log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a signal that a test sends must not reach the test
            )
            if self._process.stdout is not None:
                for line in self._process.stdout:
                    log.write(line)
                    if line.startswith(b"ready:"):
                        break
                self._process.stdout.close()
        self.url = poll(self._url_of_ready_line)
        return self

    def client(self) -> httpx.Client:
        """An HTTP client of it."""
        return httpx.Client(base_url=self.url, timeout=TIMEOUT_S)

    @property
    def supervisor(self) -> psutil.Process:
        """The process that `up` is."""
        assert self._process is not None, "not started"
        return psutil.Process(self._process.pid)

    def processes(self) -> list[psutil.Process]:
        """The supervisor, and everything below it."""
        return [self.supervisor, *self.supervisor.children(recursive=True)]

    def worker(self) -> psutil.Process:
        """The worker process, once there is one."""
        return poll(lambda: next((one for one in self.processes() if "worker" in _command(one)), None))

    def end(self, signal_number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal to the supervisor, and return its exit status."""
        assert self._process is not None, "not started"
        self._process.send_signal(signal_number)
        return self._process.wait(TIMEOUT_S)

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    def _url_of_ready_line(self) -> str:
        assert self._process is not None
        assert self._process.poll() is None, f"ended with status {self._process.returncode}:\n{self.log}"
        ready = re.search(r"^ready: (\S+) \(", self.log, re.MULTILINE)
        return ready[1] if ready else ""


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it ended meanwhile
        return []


@contextlib.contextmanager
def running(system: System, **options: bool) -> Iterator[System]:
    """The system, started with these options; whatever is left of it at the end is killed."""
    try:
        yield system.start(**options)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess, AssertionError):
            left = system.processes()
            with contextlib.suppress(subprocess.TimeoutExpired):
                system.end()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def still_running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
