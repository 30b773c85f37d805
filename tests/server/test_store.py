"""The result store: whole files or none, under keys that cannot leave it."""

import os
import threading
import time
from pathlib import Path

import pytest

from server.store import ResultStore

KEY = "img_1/1-0.png"


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    return ResultStore({"file": (tmp_path / "out").as_uri(), "memory": f"memory://{tmp_path}"}[request.param])


def test_bytes_come_back_until_they_are_deleted(store: ResultStore) -> None:
    assert not store.exists(KEY)
    store.put(KEY, b"one", "image/png")
    store.put(KEY, b"two", "image/png")
    assert store.exists(KEY)
    assert store.get(KEY) == b"two"
    store.delete(KEY)
    store.delete(KEY)
    assert not store.exists(KEY)
    with pytest.raises(FileNotFoundError):
        store.get(KEY)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up", "a\0b"])
def test_key_that_leaves_the_store_is_refused(store: ResultStore, key: str) -> None:
    for use in (store.get, store.exists, store.delete, lambda key: store.put(key, b"", "image/png")):
        with pytest.raises(ValueError, match="store key"):
            use(key)


def test_sweep_removes_what_is_old_and_nothing_else(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    for key in ("img_old/1-0.png", "img_new/1-0.png"):
        store.put(key, b"x", "image/png")
    an_hour_ago = time.time() - 3600
    os.utime(tmp_path / "img_old/1-0.png", (an_hour_ago, an_hour_ago))
    assert store.sweep(older_than_s=1800) == 1
    assert store.sweep(older_than_s=1800) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["img_new"]


def test_sweep_of_a_store_that_holds_nothing_yet_is_fine(store: ResultStore) -> None:
    assert store.sweep(older_than_s=0) == 0


def test_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    versions = {bytes([fill]) * 300_000 for fill in range(20)}
    store.put(KEY, next(iter(versions)), "image/png")
    seen: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(store.get(KEY))

    reader = threading.Thread(target=read)
    reader.start()
    for data in versions:
        store.put(KEY, data, "image/png")
    done.set()
    reader.join()
    assert set(seen) <= versions
    assert [path.name for path in (tmp_path / "img_1").iterdir()] == ["1-0.png"]


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    (tmp_path / KEY).mkdir(parents=True)  # a directory where the file should go
    with pytest.raises(OSError, match=r"1-0\.png"):
        store.put(KEY, b"x", "image/png")
    assert list((tmp_path / "img_1").iterdir()) == [tmp_path / KEY]


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        ResultStore("nosuch://somewhere")


def test_listing_tells_what_lies_where(store: ResultStore) -> None:
    assert store.listing() == {}
    store.put(KEY, b"one", "image/png")
    store.put("img_2/1-0.png", b"three", "image/png")
    assert {key: found.size_bytes for key, found in store.listing().items()} == {KEY: 3, "img_2/1-0.png": 5}
    assert store.listing("img_1").keys() == {KEY}
    assert store.listing("img_3") == {}
    assert abs(store.listing()[KEY].stored_s - time.time()) < 3600
