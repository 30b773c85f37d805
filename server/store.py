"""ResultStore: finished bytes in and out, in a directory or any object store that fsspec knows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from engines.files import atomic_write


@dataclass(frozen=True, slots=True)
class Stored:
    """One object in the store; `stored_s` is unix time."""

    size_bytes: int
    stored_s: float


NUM_DELETERS = 8
# Both s3fs and botocore try again on their own; without these, a store that is away takes a minute to say so.
S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": 3,
        "read_timeout": 15,
        "retries": {"mode": "standard", "total_max_attempts": 2},
    }
}


class ResultStore:
    """A flat set of keys with bytes behind them. Blocking; safe to use from many threads.

    Its root is for results alone: `sweep` removes whatever is old there. Readers see all bytes of a key or
    none. All methods raise OSError where the store does not answer.
    """

    def __init__(self, url: str) -> None:
        """Connects with the first use.

        Args:
            url: `file://` directory (created when needed), `s3://bucket/prefix`, `memory://` or any other
                that fsspec has a file system for.
        Raises:
            ValueError: fsspec does not know the scheme, or its driver is not installed.
        """
        options: dict[str, Any] = {"use_listings_cache": False}  # other processes store and remove as well
        if url.startswith(("s3://", "s3a://")):
            options |= S3_OPTIONS
        self._fs: Any
        try:
            self._fs, root = fsspec.url_to_fs(url, **options)
        except ImportError as error:
            raise ValueError(f"results at {url.partition(':')[0]}:// need a package: {error}") from None
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def check(self) -> None:
        """Return if the place for results is there and answers.

        Raises:
            FileNotFoundError: there is no such bucket.
            PermissionError: we may not look into it.
            OSError: the store does not answer.
        """
        with _os_errors():
            if self._is_local:
                Path(self._root).mkdir(parents=True, exist_ok=True)
            elif _is_s3(self._fs):
                bucket, _, prefix = self._root.partition("/")
                self._fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store `data` under `key`, replacing what was there."""
        path = self._path(key)
        with _os_errors():
            if self._is_local:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                atomic_write(Path(path), data, durable=True)  # an announced result survives power loss
            elif _is_s3(self._fs):
                self._fs.pipe_file(path, data, ContentType=content_type)
            else:
                self._fs.pipe_file(path, data)

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """The bytes of `key`, or those from `start` up to `end`, exclusive.

        Raises:
            FileNotFoundError: there is no such key (any longer).
        """
        path = self._path(key)
        with _os_errors():
            try:
                data: bytes = self._fs.cat_file(path, start=start, end=end)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error.__cause__):  # nothing has expired, the store is set up wrongly
                    raise OSError("result store: there is no such bucket") from error
                raise
        return data

    def exists(self, key: str) -> bool:
        """True if `key` has bytes."""
        path = self._path(key)
        with _os_errors():
            try:
                self._fs.info(path)  # not `exists`, which takes any error of a local disk for a no
            except FileNotFoundError:
                return False
        return True

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens if it is not there."""
        path = self._path(key)
        with suppress(FileNotFoundError), _os_errors():
            self._fs.rm_file(path)

    def listing(self, folder: str = "") -> dict[str, Stored]:
        """Every key, or those in one folder. What comes or goes meanwhile may or may not be in it."""
        top = self._path(folder) if folder else self._root
        if self._is_local:
            return _list_directory(Path(self._root), Path(top))
        with suppress(FileNotFoundError), _os_errors():
            self._fs.invalidate_cache()
            found: dict[str, dict[str, Any]] = self._fs.find(top, detail=True)
            return {
                path.removeprefix(f"{self._root}/"): Stored(int(info["size"]), _stored_at(info))
                for path, info in found.items()
            }
        return {}

    def sweep(self, older_than_s: float) -> int:
        """Remove what was stored more than `older_than_s` ago, half-written files included. Returns how many.

        An object store's own lifecycle rule does the same without listing; use that where there is one.
        """
        horizon = time.time() - older_than_s
        old = [key for key, found in self.listing().items() if found.stored_s < horizon]
        with ThreadPoolExecutor(NUM_DELETERS, "sweep") as pool:
            for _ in pool.map(self.delete, old):
                pass
        if self._is_local:
            for folder in {Path(self._path(key)).parent for key in old}:
                with suppress(OSError):  # other files are in it
                    folder.rmdir()
        return len(old)

    def _path(self, key: str) -> str:
        """Where `key` lies.

        Raises:
            ValueError: the key could leave the store's root.
        """
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\0" in key:
            raise ValueError(f"store key {key!r}: relative, without '..'")
        return f"{self._root}/{key}"


def _list_directory(root: Path, top: Path) -> dict[str, Stored]:
    """Files under `top` by their path from `root`; one that vanishes meanwhile takes no other with it."""

    def give_up(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found = {}
    for folder, _, names in os.walk(top, onerror=give_up):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                info = path.stat()
                found[path.relative_to(root).as_posix()] = Stored(info.st_size, info.st_mtime)
    return found


@contextmanager
def _os_errors() -> Iterator[None]:
    """Whatever a driver raises (botocore, aiohttp, ...) becomes an OSError: callers know one kind."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"result store: {error!r}") from error


def _is_s3(fs: Any) -> bool:
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _stored_at(info: dict[str, Any]) -> float:
    """Unix time of a listing entry: a number on local disks, a datetime elsewhere; no time means new."""
    stamp = info.get("mtime") or info.get("LastModified") or info.get("created") or datetime.now(UTC)
    return stamp.timestamp() if isinstance(stamp, datetime) else float(stamp)
