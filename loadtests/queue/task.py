"""What every queue of the benchmark carries: a request and a result of real size; counts executions."""

import mmap
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROMPT = "a small red cube on the left of a large blue ball, on a grey floor, in soft light"
_COUNTER = struct.Struct("<q")


class WrongResultError(Exception):
    """A queue lost a job, or returned another result than the job's."""


def request(serial: int) -> dict[str, Any]:
    """The request of job `serial`: what an image job carries."""
    return {
        "prompt": PROMPT,
        "n": 1,
        "height": 512,
        "width": 512,
        "frames": 1,
        "seed": serial,
        "num_steps": 4,
        "output_format": "png",
        "output_compression": 100,
    }


def null_engine(request: Mapping[str, Any]) -> dict[str, Any]:
    """Draws nothing and names the file that it would have stored."""
    return {
        "key": f"{request['seed']:032d}/1-0.png",
        "content_type": "image/png",
        "size_bytes": 393_216,
        "width": request["width"],
        "height": request["height"],
        "frames": request["frames"],
        "seed": request["seed"],
    }


def check(serial: int, result: object) -> None:
    """Accept only the result of job `serial`.

    Raises:
        WrongResultError: `result` is anything else.
    """
    expected = null_engine(request(serial))
    if result != expected:
        raise WrongResultError(f"job {serial}: {result!r} instead of {expected!r}")


class Executions:
    """How often a worker process has run the engine, in a file that outlives it."""

    def __init__(self, path: Path) -> None:
        """Starts at 0 in a new file, else goes on from what the file says."""
        if not path.exists():
            path.write_bytes(_COUNTER.pack(0))
        self._file = path.open("r+b")
        self._map = mmap.mmap(self._file.fileno(), _COUNTER.size)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._map.close()
        self._file.close()

    def count(self) -> int:
        """Executions so far, of all processes that shared the file one after another."""
        value: int = _COUNTER.unpack_from(self._map)[0]
        return value

    def execute(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Count, and run the null engine."""
        with self._lock:
            _COUNTER.pack_into(self._map, 0, self.count() + 1)
        return null_engine(request)
