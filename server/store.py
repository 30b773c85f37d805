"""ResultStore: finished bytes in and out, in a directory or any object store that fsspec knows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from engines.files import atomic_write, sync
from server.job import begun_ms_of


@dataclass(frozen=True, slots=True)
class Stored:
    """One object in the store; `stored_s` is unix time."""

    size_bytes: int
    stored_s: float


NUM_CONNECTIONS = 8
STEP = 200
"""Files and folders that one step of `expire` looks at."""
S3_PAGE = 1000
"""As many keys S3 lists or removes with one call."""
PUT_TRIES = 5
# Both s3fs and botocore try again on their own; without these, a store that is away takes a minute to say so.
S3_OPTIONS = {
    "config_kwargs": {
        "connect_timeout": 3,
        "read_timeout": 15,
        "retries": {"mode": "standard", "total_max_attempts": 2},
    }
}


class ResultStore:
    """A set of keys with bytes behind them. Blocking; safe to use from many threads.

    Keys are `<hour>/<job id>/<file>`, so that what is old can be found without listing everything; any other
    serves as well. Its root is for results alone: `expire` removes whatever is old there. Readers see all
    bytes of a key or none. All methods raise OSError where the store does not answer.
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
                self._write(Path(path), data)
            elif _is_s3(self._fs):
                self._fs.pipe_file(path, data, ContentType=content_type)
            else:
                self._fs.pipe_file(path, data)

    def put_all(self, files: Mapping[str, bytes], content_type: str) -> None:
        """Store small files; on return all of them survive power loss. Much cheaper than one after another.

        Raises:
            OSError: not all of them are stored.
        """
        if self._is_local:
            with _os_errors():
                for key, data in files.items():
                    self._write(Path(self._path(key)), data, durable=False)
                os.sync()
            return
        with ThreadPoolExecutor(NUM_CONNECTIONS, "store") as pool:
            for _ in pool.map(lambda key: self.put(key, files[key], content_type), files):
                pass

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
        """Remove `key`, and the folders that are empty without it; nothing happens if it is not there."""
        path = self._path(key)
        with suppress(FileNotFoundError), _os_errors():
            self._fs.rm_file(path)
        if self._is_local:
            self._remove_empty(Path(path).parent)

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

    def empty_folders(self, folder: str = "") -> list[str]:
        """Folders of a directory that hold nothing at all; object stores have none."""
        top = self._path(folder) if folder else self._root
        if not self._is_local:
            return []
        return [
            Path(path).relative_to(self._root).as_posix()
            for path, folders, files in os.walk(top)
            if not folders and not files and path != self._root
        ]

    def expire(self, older_than_s: float) -> Iterator[int]:
        """Remove what was stored more than `older_than_s` ago, half-written files included, a bounded piece
        of work with each step.

        It looks only into folders whose names, hours and job ids, say that they may hold such a thing, and
        into those whose names do not tell. Several at once do no harm.

        Yields:
            How many files a step has removed.
        """
        horizon_s = time.time() - older_than_s
        if self._is_local:
            looks, removed = 0, 0
            for is_removed in _expire_directory(self._root, horizon_s):
                looks, removed = looks + 1, removed + is_removed
                if looks == STEP:
                    yield removed
                    looks, removed = 0, 0
            yield removed
            return
        for stored in self._pages(horizon_s):
            old = [path for path, stored_s in stored.items() if stored_s < horizon_s]
            self._delete_all(old)
            yield len(old)

    def _pages(self, horizon_s: float) -> Iterator[dict[str, float]]:
        """Objects that may be older than `horizon_s`: where they lie, and when they were stored."""
        with suppress(FileNotFoundError), _os_errors():
            self._fs.invalidate_cache()
            entries: list[dict[str, Any]] = self._fs.ls(self._root, detail=True)
            yield {info["name"]: _stored_at(info) for info in entries if info["type"] == "file"}
            folders = [info["name"].rstrip("/") for info in entries if info["type"] == "directory"]
            for folder in folders:
                if begun_ms_of(folder.rpartition("/")[2]) / 1000 < horizon_s:
                    yield from self._pages_of(folder)

    def _pages_of(self, folder: str) -> Iterator[dict[str, float]]:
        if not _is_s3(self._fs):
            found: dict[str, dict[str, Any]] = self._fs.find(folder, detail=True)
            listed = [(path, _stored_at(info)) for path, info in found.items()]
            for start in range(0, len(listed), STEP):
                yield dict(listed[start : start + STEP])
            return
        bucket, _, prefix = folder.partition("/")
        after = ""
        while True:
            page = self._fs.call_s3(
                "list_objects_v2", Bucket=bucket, Prefix=f"{prefix}/", MaxKeys=S3_PAGE, StartAfter=after
            )
            found_here = page.get("Contents", [])
            yield {f"{bucket}/{info['Key']}": _stored_at(info) for info in found_here}
            if not page.get("IsTruncated"):
                return
            after = found_here[-1]["Key"]

    def _delete_all(self, paths: Sequence[str]) -> None:
        """Remove objects that may be gone already."""
        if not paths:
            return
        with _os_errors():
            if _is_s3(self._fs):
                bucket = self._root.partition("/")[0]
                keys = [{"Key": path.removeprefix(f"{bucket}/")} for path in paths]
                reply = self._fs.call_s3(
                    "delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True}
                )
                if errors := reply.get("Errors"):
                    raise OSError(f"result store: {len(errors)} objects not removed: {errors[0].get('Code')}")
                return
            with ThreadPoolExecutor(NUM_CONNECTIONS, "expire") as pool:
                for _ in pool.map(self._delete_path, paths):
                    pass

    def _delete_path(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _write(self, path: Path, data: bytes, *, durable: bool = True) -> None:
        """Write a file, again where somebody removed its folder, which was still empty, meanwhile.

        An announced result survives power loss, and so does its name: folders are synced up to the root,
        whoever has made them. The file goes first: on most file systems its sync takes along all that was
        done to names before, and those of the folders find nothing left to do.
        """
        for left in reversed(range(PUT_TRIES)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, data)
                for one in (path, *self._folders_of(path)) if durable else ():
                    sync(one)
            except FileNotFoundError:
                if not left:
                    raise
            else:
                return

    def _folders_of(self, path: Path) -> Iterator[Path]:
        """From the one that a file lies in up to the root."""
        for folder in path.parents:
            yield folder
            if folder.as_posix() == self._root:
                return

    def _remove_empty(self, folder: Path) -> None:
        """Remove a folder, and those around it, as far as there is nothing in them."""
        while folder.as_posix() != self._root:
            try:
                folder.rmdir()
            except OSError:  # something is in it, or somebody was faster
                return
            folder = folder.parent

    def _path(self, key: str) -> str:
        """Where `key` lies.

        Raises:
            ValueError: the key could leave the store's root.
        """
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or ".." in parts or "\0" in key:
            raise ValueError(f"store key {key!r}: relative, without '..'")
        return f"{self._root}/{key}"


def _expire_directory(folder: str, horizon_s: float) -> Iterator[bool]:
    """Remove old files under a folder, and the folders that are empty without them.

    Yields:
        For each file and folder that was looked at, whether it was a file and is removed.
    """
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:  # somebody else removes as well
        return
    with entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    if begun_ms_of(entry.name) / 1000 < horizon_s:
                        yield from _expire_folder(entry, horizon_s)
                elif entry.stat(follow_symlinks=False).st_mtime < horizon_s:
                    Path(entry).unlink()
                    yield True
                    continue
            except FileNotFoundError:
                pass
            yield False


def _expire_folder(entry: os.DirEntry[str], horizon_s: float) -> Iterator[bool]:
    """The same for a folder in a folder; an empty one goes with its last file, or once it is old itself."""
    goes = entry.stat(follow_symlinks=False).st_mtime < horizon_s
    for is_removed in _expire_directory(entry.path, horizon_s):
        goes = goes or is_removed
        yield is_removed
    if goes:
        with suppress(OSError):  # something is in it, or somebody was faster
            Path(entry).rmdir()


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
