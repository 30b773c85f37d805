"""The load tests themselves: they pass against a good server and notice a bad one."""

import asyncio
import base64
import http.server
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from loadtests import bench, load, tracing, worker_start
from loadtests.client import MIN_MEASURED, ROUTE, BadReplyError, LoadClient, Reply
from loadtests.lib.accounts import Accounts, Notes, settle
from loadtests.lib.outcome import Outcome, judge_gauges, judge_stairs, knee
from loadtests.process import ROOT, ServerProcess
from server.api.errors import all_errors
from tests.e2e.system import System, running
from tests.ports import reserve_port
from tests.server.conftest import poll
from tests.shared import clips_bundle, compiled_bundle, tiny_bundle

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
    """The bundle of the shipped student for clips."""
    return clips_bundle(tmp_path_factory)


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
        timeout=1000,
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
    files = [ROOT / "loadtests" / name for name in ("scenarios/smoke.js", "lib/refusals.js")]
    scripts = "".join(file.read_text(encoding="utf-8") for file in files)
    asked = set(re.findall(r'"([a-z]+_[a-z_]+)"', scripts))
    client_errors = {error.code for error in all_errors() if 400 <= error.status < 500}
    assert NOT_IN_SMOKE.keys() <= client_errors
    assert client_errors - asked == NOT_IN_SMOKE.keys()


@pytest.fixture(scope="module")
def system(image_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(System(tmp_path_factory.mktemp("load") / "data", image_bundle)) as system:
        yield system


def load_command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "loadtests.load", "--short", "--capacity=20", f"--out={out}", *options]


def environment_of(system: System) -> dict[str, str]:
    return {**os.environ, "BASE_URL": system.url, "TDM_DATA_DIR": str(system.data_dir)}


def run_load(system: System, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        load_command(out, *options),
        cwd=ROOT,
        env=environment_of(system),
        check=False,
        capture_output=True,
        text=True,
        timeout=1000,
    )


def result_of(out: Path, scenario: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((out / f"{scenario}.json").read_text(encoding="utf-8"))
    return result


@pytest.mark.slow
def test_short_chaos_loses_no_job(system: System, tmp_path: Path) -> None:
    worker = system.worker()
    kill = shlex.join([sys.executable, "-c", f"import os; os.kill({worker.pid}, {signal.SIGKILL:d})"])
    done = run_load(system, tmp_path, "--scenario=chaos", "--seconds=5", f"--blow={kill}", "--blow-every=10")
    assert done.returncode == 0, done.stdout + done.stderr
    assert system.worker().pid != worker.pid
    result = result_of(tmp_path, "chaos")
    assert result["blows"] == 1
    assert result["accounts"]["accepted"] >= 40  # 8 a second
    assert result["accounts"]["ends"] == {"completed": result["accounts"]["accepted"]}
    assert result["audit"]["clean"]
    assert result["audit"]["counts"]["accepted"] == result["accounts"]["accepted"]
    assert "chaos" in (tmp_path / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_threshold_that_is_not_kept_fails_the_run(system: System, tmp_path: Path) -> None:
    done = run_load(system, tmp_path, "--scenario=image_steady", "--seconds=2", "--slo-ms=0.5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "error: image_steady: picture_ms: p(95)<0.5 is not kept: " in done.stderr
    result = result_of(tmp_path, "image_steady")
    assert len(result["problems"]) == 1  # the accounts are in order
    assert result["accounts"]["ends"] == {"completed": result["accounts"]["accepted"]}


@pytest.mark.slow
def test_ctrl_c_ends_k6_and_writes_what_there_is(system: System, tmp_path: Path) -> None:
    with subprocess.Popen(
        load_command(tmp_path, "--scenario=image_steady", "--scenario=chaos", "--seconds=300"),
        cwd=ROOT,
        env=environment_of(system),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        poll(lambda: load.num_lines(tmp_path / "image_steady.jobs") >= 5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=560) == 130
    result = result_of(tmp_path, "image_steady")
    assert result["interrupted"]
    assert result["k6_status"] == 105
    assert result["accounts"]["accepted"] >= 5
    assert result["summary"]["metrics"]["pictures"]["values"]["count"] >= 5
    assert not (tmp_path / "chaos.json").exists()


def test_load_says_in_a_line_that_no_server_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{reserve_port()}"
    monkeypatch.setenv("BASE_URL", url)
    assert load.main(["--short", f"--out={tmp_path}"]) == 2
    assert re.fullmatch(rf"error: no server is ready at {url} .*\n", capsys.readouterr().err)


def test_every_scenario_has_a_script_and_every_script_is_one() -> None:
    assert {path.stem for path in load.SCRIPTS.glob("*.js")} == set(load.SCENARIOS)


class Records(http.server.BaseHTTPRequestHandler):
    """A server that knows what its class attribute says: path -> answers, the last one for ever."""

    answers: dict[str, list[dict[str, Any] | None]]

    def do_GET(self) -> None:
        queue = self.answers[self.path]
        answer = queue.pop(0) if len(queue) > 1 else queue[0]
        body = json.dumps(answer).encode()
        self.send_response(404 if answer is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


def accounts_of(notes: Notes, answers: dict[str, list[dict[str, Any] | None]]) -> Accounts:
    handler = type("Told", (Records,), {"answers": answers})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            return asyncio.run(settle(f"http://127.0.0.1:{server.server_port}", notes, patience_s=0.5))
        finally:
            server.shutdown()
            thread.join()


def test_accounts_name_every_broken_promise(tmp_path: Path) -> None:
    done, failed = {"status": "completed"}, {"status": "failed", "error": {"code": "poison"}}
    cancelled = {"status": "failed", "error": {"code": "cancelled"}}
    noted = tmp_path / "jobs"
    noted.write_text(
        "job img_good queued k-1\njob img_good completed k-1\njob img_back - -\njob vid_good - -\n"
        "job img_lost completed -\njob img_open - -\njob img_two - -\njob img_turned completed -\n"
        "job img_late in_progress k-2\njob img_again - k-2\n"
    )
    notes = Notes.read(noted)
    accounts = accounts_of(
        notes,
        {
            "/v1/images/img_good": [done],
            "/v1/images/img_back": [cancelled],
            "/v1/videos/vid_good": [{"status": "in_progress"}, done],
            "/v1/images/img_lost": [None],
            "/v1/images/img_open": [{"status": "queued"}],
            "/v1/images/img_two": [done, failed],
            "/v1/images/img_turned": [failed],
            "/v1/images/img_late": [{"status": "queued"}, failed],
            "/v1/images/img_again": [done],
        },
    )
    assert sorted(accounts.problems) == [
        "img_lost is lost",
        "img_open is unfinished",
        "img_turned was completed, and is failed",
        "img_two has two answers: completed, then failed",
        "key k-2 led to 2 jobs: img_again, img_late",
    ]
    assert (accounts.accepted, accounts.asked) == (9, 9)
    assert accounts.ends == {"completed": 4, "failed": 2, "cancelled": 1, "lost": 1, "unfinished": 1}


def stair(offered: float, drawn: float, p95_ms: float, refused: float = 0) -> dict[str, float]:
    return {
        "percent": 10 * offered,
        "offered_per_s": offered,
        "drawn_per_s": drawn,
        "p95_ms": p95_ms,
        "refused": refused,
    }


def test_knee_is_the_last_stair_before_one_is_late_or_refused() -> None:
    late = [stair(1, 1, 100), stair(5, 5, 200), stair(9, 8, 3000), stair(10, 10, 100)]
    assert knee(late, 2000) == 5
    assert knee([stair(1, 1, 100), stair(5, 5, 200, refused=1)], 2000) == 1
    assert knee([stair(1, 1, 2001)], 2000) == 0
    queued = [stair(1, 0.8, 100), stair(5, 4.5, 200), stair(9, 7, 1500)]  # on the last one a queue grows
    assert knee(queued, 2000) == 5


def test_server_that_draws_less_when_asked_for_more_is_found_out() -> None:
    assert not list(judge_stairs([stair(5, 5, 1), stair(10, 8, 1), stair(15, 7, 1)]))
    assert list(judge_stairs([stair(5, 5, 1), stair(10, 8, 1), stair(15, 6, 1)])) == [
        "at 150 % it draws 6 pictures/s, at best 8"
    ]


def test_what_grows_without_end_is_found_out() -> None:
    # It grows while it warms up, and that is fine; one value out of line is no growth either.
    level = [1.0, 2.0, 5.0, 9.0, 10.0, 10.0, 10.0, 10.0, 11.0, 11.0, 99.0, 11.0]
    rising = [float(number) for number in range(12)]
    assert not list(judge_gauges({"url": {"process_open_fds": level, "tdm_redis_memory_bytes": rising}}))
    assert list(judge_gauges({"url": {"process_open_fds": rising}})) == [
        "process_open_fds of url has grown from 4 to 10"
    ]


def test_run_that_k6_could_not_begin_has_failed() -> None:
    outcome = Outcome("smoke", "today", k6_status=107)
    outcome.judge(num_blows=0)
    assert outcome.problems == ["k6 ended with status 107: see smoke.log"]
    assert outcome.verdict == "FAILED"


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


@pytest.mark.slow
def test_what_tracing_costs_is_measured_while_spans_arrive(image_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    plan = ["--rounds=1", "--seconds=1", "--concurrency=4", "--idle-requests=5", "--workers=1"]
    assert tracing.main(["--bundle", str(image_bundle), "--out", str(out), *plan]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"hardware", "versions", "commit", "plan", "rounds", "medians"} <= result.keys()
    assert result["medians"].keys() == {"without", "with"}
    (told,) = result["spans"]
    assert told["exported"] > 0
    assert result["ratio_pictures_per_s"] > 0


async def test_window_stays_open_until_two_replies_have_ended_in_it() -> None:
    asked: list[int] = []

    async def answer(_: web.Request) -> web.Response:
        asked.append(1)
        return web.Response(body=reply().body, content_type="application/json")

    app = web.Application()
    app.router.add_post(ROUTE, answer)
    async with TestServer(app) as slow, LoadClient(str(slow.make_url("")), size=(8, 8)) as client:
        found = await client.saturate(itertools.repeat({}), concurrency=1, warm_up_s=0.0, seconds=0.0)
    assert len(asked) == found.latency.num_requests == MIN_MEASURED
    assert found.pictures_per_s > 0


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
