"""The result store on S3, against a real server process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import s3fs

from server.job import new_job_id, result_folders
from server.store import ResultStore
from tests.ports import reserve_port
from tests.s3_server import BUCKET, environment_of, files_of, running_s3

KEY = "img_1/1-0.png"


@pytest.fixture(scope="module")
def server_port() -> Iterator[int]:
    port = reserve_port()
    with running_s3(port):
        yield port


@pytest.fixture
def lead_to(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Have the environment lead to a port, and fsspec know no other."""

    def lead_to(port: int) -> None:
        for name, value in environment_of(port).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # it would hand out the one for another endpoint

    yield lead_to
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def s3_port(server_port: int, lead_to: Callable[[int], None]) -> int:
    lead_to(server_port)
    behind = files_of(server_port)
    if left := behind.find(BUCKET):
        behind.rm(left)
    return server_port


@pytest.fixture
def store(s3_port: int) -> ResultStore:
    return ResultStore(f"s3://{BUCKET}/some/prefix")


def test_bytes_come_back_until_they_are_deleted(store: ResultStore) -> None:
    store.check()
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


def test_objects_lie_under_the_prefix_with_their_type(store: ResultStore, s3_port: int) -> None:
    store.put(KEY, b"x", "image/webp")

    behind = files_of(s3_port)
    assert behind.find(BUCKET) == [f"{BUCKET}/some/prefix/{KEY}"]
    assert behind.info(f"{BUCKET}/some/prefix/{KEY}")["ContentType"] == "image/webp"


def test_many_objects_are_stored_with_one_call(store: ResultStore) -> None:
    files = {f"img_{i % 7}/{i}.json": str(i).encode() for i in range(30)}
    store.put_all(files, "application/json")
    assert {key: store.get(key) for key in files} == files


def test_another_process_s_changes_are_seen_at_once(store: ResultStore, s3_port: int) -> None:
    store.put(KEY, b"x", "image/png")
    assert list(store.listing()) == [KEY]
    behind = files_of(s3_port)
    behind.rm(f"{BUCKET}/some/prefix/{KEY}")

    assert not store.exists(KEY)
    behind.pipe_file(f"{BUCKET}/some/prefix/img_2/1-0.png", b"y")
    assert list(store.listing()) == ["img_2/1-0.png"]
    assert store.exists("img_2/1-0.png")


def test_what_is_old_goes_and_nothing_beside_the_prefix(
    store: ResultStore, s3_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.S3_PAGE", 3)
    now_ms = round(time.time() * 1000)
    old, new = (new_job_id("image", "m", now_ms - hours * 3_600_000) for hours in (5, -2))
    folder = result_folders(old)[0]
    for index in range(7):
        store.put(f"{folder}/1-{index}.png", b"x", "image/png")
    for key in (f"{old}/1-0.png", "img_1/1-0.png", "1-0.png", f"{result_folders(new)[0]}/1-0.png"):
        store.put(key, b"x", "image/png")
    files_of(s3_port).pipe_file(f"{BUCKET}/some/other.png", b"not ours")

    assert sum(store.expire(older_than_s=3600)) == 0
    # All of them are older than in an hour, but the name of the young one's folder says that it cannot be.
    removed = list(store.expire(older_than_s=-3600))
    assert (sum(removed), max(removed)) == (10, 3)
    assert list(store.listing()) == [f"{result_folders(new)[0]}/1-0.png"]
    assert f"{BUCKET}/some/other.png" in files_of(s3_port).find(BUCKET)


def test_many_threads_share_one_store(store: ResultStore) -> None:
    def round_trip(index: int) -> bool:
        key, data = f"img_{index}/1-0.png", bytes([index]) * 100_000
        store.put(key, data, "image/png")
        return store.exists(key) and store.get(key) == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(round_trip, range(32)))


def test_store_that_is_down_is_an_oserror_for_every_verb(lead_to: Callable[[int], None]) -> None:
    lead_to(reserve_port())
    store = ResultStore(f"s3://{BUCKET}/some/prefix")
    verbs: list[Callable[[], object]] = [
        store.check,
        lambda: store.put(KEY, b"x", "image/png"),
        lambda: store.get(KEY),
        lambda: store.exists(KEY),
        lambda: store.delete(KEY),
        store.listing,
        lambda: sum(store.expire(0)),
    ]
    for verb in verbs:
        with pytest.raises(OSError, match="result store") as caught:
            verb()
        assert not isinstance(caught.value, FileNotFoundError)


def test_bucket_that_is_not_there_is_no_expired_result(store: ResultStore) -> None:
    elsewhere = ResultStore("s3://no-such-bucket/prefix")

    with pytest.raises(FileNotFoundError):
        elsewhere.check()
    with pytest.raises(OSError, match="no such bucket") as caught:
        elsewhere.get(KEY)
    assert not isinstance(caught.value, FileNotFoundError)
    with pytest.raises(OSError, match="bucket"):
        elsewhere.put(KEY, b"x", "image/png")
