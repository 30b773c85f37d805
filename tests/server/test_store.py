"""The result store: whole files or none, under keys that cannot leave it."""

import os
import threading
import time
from pathlib import Path

import pytest

from server.job import new_job_id, result_folders
from server.store import STEP, ResultStore

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


def test_many_files_are_stored_with_one_call(store: ResultStore) -> None:
    files = {f"img_{i % 7}/{i}.json": str(i).encode() for i in range(30)}
    store.put("img_1/1.json", b"before", "application/json")
    store.put_all(files, "application/json")
    assert {key: store.get(key) for key in store.listing()} == files


def test_result_and_its_name_are_on_the_disk_before_it_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []

    def note(descriptor: int) -> None:
        where = Path(f"/proc/self/fd/{descriptor}").readlink()
        there = sorted(path.name for path in where.iterdir()) if where.is_dir() else [where.read_text()]
        synced.append(f"{where.relative_to(tmp_path)}: {there}")

    monkeypatch.setattr(os, "fsync", note)
    ResultStore((tmp_path / "out").as_uri()).put("2026-11-30T01/img_1/1-0.png", b"pixels", "image/png")
    assert synced == [
        "out/2026-11-30T01/img_1/1-0.png: ['pixels']",
        "out/2026-11-30T01/img_1: ['1-0.png']",
        "out/2026-11-30T01: ['img_1']",
        "out: ['2026-11-30T01']",
    ]


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up", "a\0b"])
def test_key_that_leaves_the_store_is_refused(store: ResultStore, key: str) -> None:
    for use in (store.get, store.exists, store.delete, lambda key: store.put(key, b"", "image/png")):
        with pytest.raises(ValueError, match="store key"):
            use(key)


def test_what_is_old_goes_and_nothing_else(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    for key in ("img_old/1-0.png", "img_new/1-0.png"):
        store.put(key, b"x", "image/png")
    make_old(tmp_path / "img_old/1-0.png")
    assert sum(store.expire(older_than_s=1800)) == 1
    assert sum(store.expire(older_than_s=1800)) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["img_new"]


def test_store_that_holds_nothing_yet_has_nothing_to_expire(store: ResultStore) -> None:
    assert sum(store.expire(older_than_s=0)) == 0


def make_old(path: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(path, (an_hour_ago, an_hour_ago))


def folder_of(hours_ago: float) -> str:
    job_id = new_job_id("image", "m", round((time.time() - hours_ago * 3600) * 1000))
    return result_folders(job_id)[0]


def test_only_folders_that_may_hold_what_is_old_are_looked_into(store: ResultStore) -> None:
    (old, flat_old), (new, flat_new) = (
        (f"{folder}/1-0.png", f"{folder.partition('/')[2]}/1-0.png") for folder in map(folder_of, (5, -2))
    )
    for key in (old, flat_old, new, flat_new, "results/x.png", "x.png"):
        store.put(key, b"x", "image/png")

    assert sum(store.expire(older_than_s=3600)) == 0
    # All of them are older than in an hour, but the names of the young folders say that it cannot be.
    assert sum(store.expire(older_than_s=-3600)) == 4
    assert store.listing().keys() == {new, flat_new}
    assert store.empty_folders() == []


def test_hour_goes_bit_by_bit_in_bounded_steps(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    hour = folder_of(5).partition("/")[0]
    for index in range(3 * STEP):
        (tmp_path / hour / f"job{index}").mkdir(parents=True)
        (tmp_path / hour / f"job{index}/1-0.png").write_bytes(b"x")
        if index:
            make_old(tmp_path / hour / f"job{index}/1-0.png")
    counts = list(store.expire(older_than_s=1800))
    assert max(counts) <= STEP
    assert sum(counts) == 3 * STEP - 1
    assert [path.name for path in (tmp_path / hour).iterdir()] == ["job0"]

    make_old(tmp_path / hour / "job0/1-0.png")
    assert sum(store.expire(older_than_s=1800)) == 1
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_goes_once_it_is_old(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    make_old(tmp_path / "old")
    assert sorted(store.empty_folders()) == ["new", "old"]
    assert sum(store.expire(older_than_s=1800)) == 0
    assert store.empty_folders() == ["new"]


def test_deleted_file_takes_its_empty_folders_along_and_no_other(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    for key in ("hour/a/1.png", "hour/a/2.png", "hour/b/1.png"):
        store.put(key, b"x", "image/png")
    store.delete("hour/a/1.png")
    assert store.listing().keys() == {"hour/a/2.png", "hour/b/1.png"}
    store.delete("hour/a/2.png")
    assert [path.name for path in (tmp_path / "hour").iterdir()] == ["b"]
    store.delete("hour/b/1.png")
    assert list(tmp_path.iterdir()) == []


def test_files_come_into_folders_that_others_remove_as_empty(tmp_path: Path) -> None:
    store = ResultStore(tmp_path.as_uri())
    done = threading.Event()

    def remove() -> None:
        while not done.is_set():
            sum(store.expire(older_than_s=3600))
            store.delete("hour/job/2-0.png")

    remover = threading.Thread(target=remove)
    remover.start()
    for _ in range(200):
        store.put("hour/job/1-0.png", b"x", "image/png")
        store.delete("hour/job/1-0.png")
    done.set()
    remover.join()


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
