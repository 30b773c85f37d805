"""A server under test as a child process: started, waited for over HTTP, interrupted."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ServerProcess:
    """Runs `python -m MODULE ...` until the block ends.

    Attributes:
        base_url: where it answers.
        ready_s: seconds from its start to the first 200 from `/readyz`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
        ready_timeout_s: float = 600.0,
    ) -> None:
        self.base_url = f"http://127.0.0.1:{port}"
        self.ready_s = 0.0
        self._command = [sys.executable, "-m", *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._log = log
        self._ready_timeout_s = ready_timeout_s

    def __enter__(self) -> Self:
        """Start it and wait until it is ready.

        Raises:
            RuntimeError: it ended, or was not ready in time; the message ends with its last lines.
        """
        started_s = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        with httpx.Client(base_url=self.base_url, trust_env=False, timeout=5.0) as http:
            while not _is_ready(http):
                waited_s = time.monotonic() - started_s
                if self._process.poll() is not None or waited_s > self._ready_timeout_s:
                    self._stop()
                    tail = self._log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"{self._command} was not ready after {waited_s:.0f} s:\n{tail}")
                time.sleep(0.1)
        self.ready_s = time.monotonic() - started_s
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Interrupt it, as Ctrl-C would, and wait for its end."""
        self._stop()

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False
