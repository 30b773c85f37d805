"""The supervisor's parts: sockets, bundles, what it tells the operator. The whole is in tests/e2e."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.bundle.manifest import write_manifest
from server.job import JobKind
from server.settings import Settings
from server.supervisor.bundles import (
    count_workers,
    deal,
    deal_gpus,
    find_bundles,
    plan_posts,
    shipped_bundles,
    shipped_student,
)
from server.supervisor.ready import describe_ready, url_of
from server.supervisor.report import LaunchError, say
from server.supervisor.supervisor import (
    _keep_alive,
    check_metrics_port,
    hire,
    listen,
)
from server.supervisor.valkey import EmbeddedValkey
from tests.server.conftest import poll_async
from tests.server.manifests import make_manifest


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def make_bundle(directory: Path, name: str = "scenes", **changes: Any) -> Path:
    directory.mkdir(parents=True)
    write_manifest(directory, make_manifest(name, **changes))
    return directory


def run_server(*args: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{f"TDM_{name.upper()}": value for name, value in settings.items()}}
    return subprocess.run(
        [sys.executable, "-m", "server", *args],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_port_zero_takes_a_free_one() -> None:
    with listen("127.0.0.1", 0, "TDM_PORT") as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_page_of_a_server_on_all_addresses_is_found_on_this_one() -> None:
    with listen("0.0.0.0", 0, "TDM_PORT") as listener:  # noqa: S104 (that is the case at hand)
        assert url_of(listener).startswith("http://127.0.0.1:")


def test_busy_metrics_port_is_named_before_anything_starts(busy_port: int) -> None:
    with pytest.raises(LaunchError, match="TDM_METRICS_PORT"):
        check_metrics_port(Settings(metrics_port=busy_port))


def test_no_metrics_port_is_never_busy() -> None:
    check_metrics_port(Settings(metrics_port=0))


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(LaunchError, match="TDM_HOST"):
        listen("192.0.2.1", 0, "TDM_PORT")


def test_busy_port_is_one_clear_line_and_status_2(busy_port: int, tmp_path: Path) -> None:
    ended = run_server("up", port=str(busy_port), data_dir=str(tmp_path))

    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        f"error: cannot listen on 127.0.0.1:{busy_port}: Address already in use (TDM_HOST, TDM_PORT)"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("role", "settings", "message"),
    [
        ("up", {"port": "eighty"}, "error: TDM_PORT: "),
        ("up", {"workers": "-1"}, "error: TDM_WORKERS: "),
        ("up", {"port": "0", "metrics_port": "0", "bundles": "/nowhere"}, "error: no bundle"),
        ("api", {}, "error: TDM_REDIS_URL is empty"),
        ("worker", {"bundles": "/nowhere"}, "error: TDM_REDIS_URL is empty"),
        ("worker", {"redis_url": "redis://localhost"}, "error: TDM_BUNDLES must name one bundle"),
    ],
)
def test_settings_that_cannot_work_are_one_clear_line_and_status_2(
    role: str, settings: dict[str, str], message: str, tmp_path: Path
) -> None:
    ended = run_server(role, **{"data_dir": str(tmp_path), **settings})

    assert ended.returncode == 2
    assert ended.stderr.startswith(message)
    assert len(ended.stderr.splitlines()) == 1


def test_bundles_are_found_in_place_and_one_level_below(tmp_path: Path) -> None:
    alone = make_bundle(tmp_path / "alone")
    shelf = tmp_path / "shelf"
    first, second = make_bundle(shelf / "a"), make_bundle(shelf / "b")

    assert find_bundles([alone, shelf]) == [alone, first, second]


def test_directory_without_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"manifest\.json"):
        find_bundles([tmp_path])


def test_damaged_manifest_is_refused_by_its_field(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"pixart"', "7"))

    with pytest.raises(LaunchError, match="family"):
        plan_posts(Settings(), [bundle])


def test_damaged_bundle_keeps_no_other_from_being_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = make_bundle(tmp_path / "good", "good"), make_bundle(tmp_path / "bad", "bad")
    (bad / "manifest.json").write_text("{")

    assert list(plan_posts(Settings(), [bad, good])) == ["good"]

    assert f"error: {bad}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "gone"), OSError(28, "disk full"), ValueError("closed")]
)
def test_that_nobody_reads_what_is_said_is_no_error(error: Exception) -> None:
    class Unread(io.StringIO):
        def flush(self) -> None:
            raise error

    say("ready", file=Unread())


async def test_valkey_is_started_again_until_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    valkey = EmbeddedValkey(tmp_path)
    await valkey.start_beside()
    watching = asyncio.create_task(_keep_alive(valkey))
    try:
        (manifest,) = (tmp_path / "valkey" / "appendonlydir").glob("*.manifest")
        manifest.rename(tmp_path / "aside")
        manifest.write_text("nonsense\n")
        assert valkey.pid is not None
        os.kill(valkey.pid, signal.SIGKILL)
        said = ""

        async def gave_up_twice() -> bool:
            nonlocal said
            said += capsys.readouterr().out
            return said.count("does not start") == 2

        await poll_async(gave_up_twice)
        (tmp_path / "aside").rename(manifest)

        async def is_back() -> bool:
            return await asyncio.to_thread(valkey.alive)

        await poll_async(is_back)
    finally:
        watching.cancel()
        valkey.stop()


def test_every_bundle_gets_a_worker(tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / name, name) for name in ("a", "b", "c")]

    posts = plan_posts(Settings(workers=1), bundles)

    assert {name: post.bundles for name, post in posts.items()} == {
        bundle.name: [bundle] for bundle in bundles
    }


@pytest.mark.parametrize(("num_workers", "expected"), [(1, "a b"), (2, "a b"), (3, "aa b"), (5, "aaa bb")])
def test_model_that_comes_later_has_its_share_kept_for_it(
    tmp_path: Path, num_workers: int, expected: str
) -> None:
    first, second = make_bundle(tmp_path / "a", "a"), make_bundle(tmp_path / "b", "b")
    both = {first: JobKind.IMAGE, second: JobKind.VIDEO}
    settings = Settings(workers=num_workers)

    posts = [plan_posts(settings, [bundle], both) for bundle in (first, second)]

    dealt = [bundle.name for post in posts for name in post for bundle in post[name].bundles]
    assert dealt == list(expected.replace(" ", ""))


def test_shipped_students_are_served_only_where_nothing_else_is_set(tmp_path: Path) -> None:
    shipped = shipped_bundles(Settings(data_dir=tmp_path))
    assert {bundle.name: kind for bundle, kind in shipped.items()} == {"scenes": "image", "clips": "video"}
    assert all((shipped_student(bundle.name) / "student.json").is_file() for bundle in shipped)
    assert shipped_bundles(Settings(bundles=str(tmp_path))) == {}


@pytest.mark.parametrize(
    ("kinds", "num_workers", "num_cores", "expected"),
    [
        ({"a": "image"}, 0, 2, "aa"),
        ({"a": "video"}, 0, 2, "aa"),
        ({"a": "image", "b": "image", "c": "image"}, 0, 2, "abc"),
        ({"v": "video", "a": "image"}, 0, 2, "aav"),  # clips stand in no picture's way
        ({"v": "video", "a": "image", "b": "image", "w": "video"}, 0, 4, "ababvw"),
        ({"v": "video", "a": "image"}, 3, 64, "ava"),
        ({"v": "video", "a": "image"}, 1, 64, "av"),
    ],
)
def test_workers_are_dealt_out(
    kinds: dict[str, str], num_workers: int, num_cores: int, expected: str
) -> None:
    dealt = deal({Path(name): JobKind(kind) for name, kind in kinds.items()}, num_workers, num_cores)
    assert "".join(map(str, dealt)) == expected


@pytest.mark.parametrize(
    ("kinds", "num_workers", "gpus", "expected"),
    [
        ({"a": "image"}, 0, ["0"], "a0"),
        ({"a": "image"}, 0, ["0", "1", "2"], "a0 a1 a2"),
        ({"v": "video", "a": "image"}, 0, ["0", "1"], "a0 v1"),
        ({"v": "video", "a": "image"}, 0, ["0"], "a0 v0"),  # each bundle has one at least
        ({"a": "image"}, 3, ["0", "1"], "a0 a1 a0"),
        ({}, 0, [], ""),
    ],
)
def test_workers_are_dealt_out_over_gpus(
    kinds: dict[str, str], num_workers: int, gpus: list[str], expected: str
) -> None:
    dealt = deal_gpus({Path(name): JobKind(kind) for name, kind in kinds.items()}, num_workers, gpus)
    assert " ".join(f"{bundle}{gpu}" for bundle, gpu in dealt) == expected


def test_each_worker_on_a_gpu_sees_that_one_alone(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "gpu", "gpu", device="cuda")
    plain = make_bundle(tmp_path / "cpu", "cpu")
    settings = Settings(CUDA_VISIBLE_DEVICES="GPU-a, GPU-b")

    posts = plan_posts(settings, [bundle, plain])

    assert (posts["gpu"].bundles, posts["gpu"].gpus) == ([bundle, bundle], ["GPU-a", "GPU-b"])
    assert set(posts["cpu"].bundles) == {plain}
    assert set(posts["cpu"].gpus) == {""}
    worker = hire(settings, "unix:///nowhere", bundle, 1, "GPU-b")
    assert (worker._env["TDM_BUNDLES"], worker._env["CUDA_VISIBLE_DEVICES"]) == (str(bundle), "GPU-b")


def test_bundle_for_a_gpu_is_served_by_the_cpu_where_none_may_be_used(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "gpu", "gpu", device="cuda")

    posts = plan_posts(Settings(CUDA_VISIBLE_DEVICES="", workers=1), [bundle])

    assert (posts["gpu"].bundles, posts["gpu"].gpus) == ([bundle], [""])


def test_number_of_workers_may_be_left_open_by_name() -> None:
    assert Settings(workers="auto").workers == 0


@pytest.mark.parametrize(("num_cores", "expected"), [(1, 1), (2, 2), (4, 4), (64, 4)])
def test_one_worker_per_core_up_to_four(num_cores: int, expected: int) -> None:
    assert count_workers(num_cores) == expected


def test_ready_line_names_address_model_workers_and_backend() -> None:
    one = {"scenes": {"workers": 2, "backends": ["aotinductor"]}}
    two = {**one, "more": {"workers": 1, "backends": ["eager"]}}

    assert describe_ready("http://127.0.0.1:8000", one) == (
        "ready: http://127.0.0.1:8000 (model scenes, 2 workers, aotinductor)"
    )
    assert describe_ready("http://127.0.0.1:8000", two) == (
        "ready: http://127.0.0.1:8000 (models more, scenes, 3 workers, aotinductor, eager)"
    )
