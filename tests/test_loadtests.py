"""The load tests themselves: they pass against a good server and notice a bad one."""

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from loadtests import bench, worker_start
from loadtests.client import BadReplyError, Reply
from loadtests.process import ROOT, ServerProcess
from server.api.errors import all_errors
from tests.ports import reserve_port
from tests.server.conftest import poll
from tests.shared import compiled_bundle, compiled_video_bundle, tiny_bundle

# Client errors that one client alone cannot bring about; the server's own tests do.
NOT_IN_SMOKE = {
    "queue_full": "needs hundreds of waiting jobs",
    "tenant_full": "needs hundreds of waiting jobs",
    "request_timeout": "needs a body that stalls for seconds",
    "result_not_ready": "a race with the worker",
    "result_expired": "needs a day, or a hand in the store",
    "cancelled": "a race with the worker",
    "not_served": "needs a bundle that is taken away",
    "variant_not_found": "needs a video from an earlier version's worker",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the tiny random student."""
    return tiny_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def image_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, compiled."""
    return compiled_bundle(tmp_path_factory)


@pytest.fixture(scope="module")
def video_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of one that draws clips."""
    return compiled_video_bundle(tmp_path_factory)


@pytest.fixture
def server(image_bundle: Path, video_bundle: Path, tmp_path: Path) -> Iterator[ServerProcess]:
    port = reserve_port()
    environment = {
        "TDM_PORT": str(port),
        "TDM_METRICS_PORT": "0",
        "TDM_DATA_DIR": str(tmp_path / "data"),
        "TDM_BUNDLES": f"{image_bundle},{video_bundle}",
        "TDM_WORKERS": "1",
    }
    with ServerProcess(["server", "up"], port=port, log=tmp_path / "log", environment=environment) as running:
        poll(lambda: len(models_of(running.base_url)) == 2)  # it is ready as soon as one of them is
        yield running


def models_of(base_url: str) -> list[str]:
    """Models that workers have announced."""
    return [model["id"] for model in httpx.get(f"{base_url}/v1/models").json()["data"]]


def run_smoke(base_url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).parent / "k6", "run", "--quiet", f"--env=BASE_URL={base_url}", "smoke.js"],
        cwd=ROOT / "loadtests" / "scenarios",
        check=False,
        capture_output=True,
        text=True,
        timeout=500,
    )


def reply(status: int = 200, size: tuple[int, int] = (8, 8), image_format: str = "PNG") -> Reply:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, format=image_format)
    body = {"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}
    return Reply(started_s=0.0, ended_s=0.1, status=status, body=json.dumps(body).encode())


def test_smoke_passes_against_a_real_server(server: ServerProcess) -> None:
    done = run_smoke(server.base_url)
    assert done.returncode == 0, done.stdout + done.stderr


def test_smoke_fails_where_no_server_answers() -> None:
    assert run_smoke(f"http://127.0.0.1:{reserve_port()}").returncode != 0


def test_smoke_asks_for_every_client_error() -> None:
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "loadtests").rglob("*.js"))
    asked = set(re.findall(r'"([a-z]+_[a-z_]+)"', scripts))
    client_errors = {error.code for error in all_errors() if 400 <= error.status < 500}
    assert NOT_IN_SMOKE.keys() <= client_errors
    assert client_errors - asked == NOT_IN_SMOKE.keys()


@pytest.mark.slow
def test_benchmark_measures_both_servers_on_the_same_pictures(image_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    plan = ["--rounds=1", "--seconds=2", "--warm-up=0.5", "--concurrency=4", "--idle-requests=5"]
    assert bench.main(["--bundle", str(image_bundle), "--out", str(out), *plan]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"hardware", "versions", "commit", "plan", "rounds", "medians"} <= result.keys()
    assert len(result["medians"]) == 2
    assert all(medians["pictures_per_s"] > 0 for medians in result["medians"].values())
    # Compiled code against diffusers: the same arithmetic up to the order of additions.
    assert result["largest_pixel_difference"] <= 2


def test_whole_picture_of_the_right_size_is_accepted() -> None:
    assert reply().picture((8, 8)).size == (8, 8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (reply(status=202), "status 202"),
        (reply(size=(8, 9)), r"\(8, 9\)"),
        (reply(image_format="JPEG"), "no PNG"),
        (Reply(0.0, 0.1, 200, b'{"data": []}'), "no PNG"),
        (Reply(0.0, 0.1, 200, reply().body.replace(b'"b64_json": "', b'"b64_json": "AAAA')), "no PNG"),
    ],
)
def test_reply_without_the_picture_asked_for_is_refused(bad: Reply, message: str) -> None:
    with pytest.raises(BadReplyError, match=message):
        bad.picture((8, 8))


def test_largest_difference_finds_one_channel_of_one_pixel() -> None:
    ours, theirs = [Image.new("RGB", (4, 4)) for _ in range(2)], [Image.new("RGB", (4, 4)) for _ in range(2)]
    assert bench.largest_difference(ours, theirs) == 0
    theirs[1].putpixel((2, 3), (0, 7, 0))
    assert bench.largest_difference(ours, theirs) == 7


def test_start_of_a_worker_is_read_from_what_workers_log(image_bundle: Path, tmp_path: Path) -> None:
    found = worker_start.measure(image_bundle, 2, tmp_path)
    assert len(found) == 2
    for ages in (one[kind] for one in found for kind in worker_start.KINDS):
        assert list(ages) == list(worker_start.PHASES)
        assert sorted(ages.values()) == list(ages.values())
        assert min(ages.values()) > 0


def test_workers_that_did_not_come_as_far_as_a_job_do_not_count() -> None:
    def line(message: str, **fields: object) -> dict[str, object]:
        return {"message": message, **fields}

    lines = [
        line("loaded", start_s={"imports": 1.0}, cpu_s={"imports": 0.9}),
        line("loaded", start_s={"imports": 1.5}, cpu_s={"imports": 0.8}),
        line("ready on eager", worker="a-host-17-abcd"),
        line("request"),
        line("first job", start_s={"first_job": 4.0}, cpu_s={"first_job": 2.0}),
        line("ready on eager", worker="a-host-18-abcd"),
    ]
    start = {"start_s": {"imports": 1.5, "first_job": 4.0}, "cpu_s": {"imports": 0.8, "first_job": 2.0}}
    assert worker_start.starts(lines) == [(17, start)]
