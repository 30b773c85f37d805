"""ResultStore: finished bytes in and out, in a directory or any object store that fsspec knows."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


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
            ValueError: fsspec does not know the scheme.
            ImportError: its driver is not installed; the message names the package.
        """
        self._fs: Any
        self._fs, root = fsspec.url_to_fs(url)
        self._root = root.rstrip("/")
        self._is_local = isinstance(self._fs, LocalFileSystem)

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store `data` under `key`, replacing what was there."""
        path = self._path(key)
        with _os_errors():
            if self._is_local:
                _write_atomically(Path(path), data)
            elif "s3" in _protocols(self._fs):
                self._fs.pipe_file(path, data, ContentType=content_type)
            else:
                self._fs.pipe_file(path, data)

    def get(self, key: str) -> bytes:
        """The bytes of `key`.

        Raises:
            FileNotFoundError: there is no such key (any longer).
        """
        path = self._path(key)
        with _os_errors():
            data: bytes = self._fs.cat_file(path)
        return data

    def exists(self, key: str) -> bool:
        """True if `key` has bytes."""
        path = self._path(key)
        with _os_errors():
            return bool(self._fs.exists(path))

    def delete(self, key: str) -> None:
        """Remove `key`; nothing happens if it is not there."""
        path = self._path(key)
        with suppress(FileNotFoundError), _os_errors():
            self._fs.rm_file(path)

    def sweep(self, older_than_s: float) -> int:
        """Remove what was stored more than `older_than_s` ago, half-written files included. Returns how many.

        An object store's own lifecycle rule does the same without listing; use that where there is one.
        """
        horizon = time.time() - older_than_s
        removed = 0
        with _os_errors():
            found: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
            for path, info in found.items():
                if _stored_at(info) < horizon:
                    self._fs.rm_file(path)
                    removed += 1
                    if self._is_local:
                        with suppress(OSError):  # other files are in it
                            Path(path).parent.rmdir()
        return removed

    def _path(self, key: str) -> str:
        """Where `key` lies.

        Raises:
            ValueError: the key could leave the store's root.
        """
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\0" in key:
            raise ValueError(f"store key {key!r}: relative, without '..'")
        return f"{self._root}/{key}"


def _write_atomically(path: Path, data: bytes) -> None:
    """Write to a neighbour, rename it; synced first, so that an announced result survives power loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def _os_errors() -> Iterator[None]:
    """Whatever a driver raises (botocore, aiohttp, ...) becomes an OSError: callers know one kind."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"result store: {error!r}") from error


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _stored_at(info: dict[str, Any]) -> float:
    """Unix time of a listing entry: a number on local disks, a datetime elsewhere; no time means new."""
    stamp = info.get("mtime") or info.get("LastModified") or info.get("created") or datetime.now(UTC)
    return stamp.timestamp() if isinstance(stamp, datetime) else float(stamp)
