"""Every panel of the dashboard shows something: a real Prometheus watches real processes in trouble."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engines.bundle.manifest import Manifest, read_manifest
from server.api.app import create_app
from server.api.series import begin_model
from server.job import JobKind
from server.metrics import Metrics
from server.settings import Settings
from server.supervisor.valkey import find_server
from server.worker.series import begin_series
from tests.failures.conftest import build_eager
from tests.failures.deployment import MODEL, Deployment
from tests.failures.engine import LETHAL
from tests.failures.processes import PATIENCE_S, ROOT, Api, RedisServer, Worker
from tests.prometheus import PERIOD_S, Prometheus, running_prometheus
from tests.server.conftest import poll
from tests.shared import make_tiny_cogvideox, once_per_run

VIDEO_MODEL = "tiny-cogvideox"
VIDEOS_DRAWN = 'tdm_job_e2e_seconds_count{kind="video",outcome="done"}'
MAX_QUEUE = 200
"""More than the clients that k6 has at `CAPACITY`: they wait, and k6 runs out of them."""
CAPACITY = 20
COUNTED = "tdm_.*(_total|_count)"

Series = dict[str, Any]


@pytest.fixture(scope="module")
def video_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eager bundle of a tiny student for videos."""

    def build(folder: Path) -> None:
        build_eager(make_tiny_cogvideox(folder / "student"), folder / "bundle", batch_sizes=(1, 2))

    return once_per_run(tmp_path_factory, "dashboard", build) / "bundle"


@pytest.fixture
def deployment(bundle: Path, tmp_path: Path) -> Iterator[Deployment]:
    """One on a Valkey that has a memory limit."""
    redis = RedisServer(find_server(), tmp_path).start()
    deployment = Deployment(tmp_path, bundle, redis)
    deployment.client.config_set("maxmemory", "1gb")
    yield deployment
    deployment.close()
    redis.kill()


@contextmanager
def k6_under_way(api: Api, prometheus: Prometheus, out: Path) -> Iterator[None]:
    """While k6 asks for pictures at an even pace, and writes what it sees to Prometheus."""
    command = [
        *(sys.executable, "-m", "loadtests.load", "--scenario=image_steady", "--seconds=20"),
        *(f"--capacity={CAPACITY}", f"--out={out}", f"--prometheus={prometheus.url}/api/v1/write"),
    ]
    environment = {**os.environ, "BASE_URL": api.url, "K6_PROMETHEUS_RW_PUSH_INTERVAL": f"{PERIOD_S}s"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)  # it ends k6 in order


def ask_for_a_video(api: Api, prompt: str) -> str:
    """Have a video accepted; its id."""
    answer = api.http.post("/v1/videos", json={"prompt": prompt})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def end_of_video(api: Api, job_id: str) -> dict[str, Any] | None:
    """The video, once it has its final answer."""
    job: dict[str, Any] = api.http.get(f"/v1/videos/{job_id}").json()
    return job if job["status"] in ("completed", "failed") else None


def draw_videos(api: Api, worker: Worker, prometheus: Prometheus) -> None:
    """Ask for one that takes the worker with it, until it is given up; then for two that are drawn."""
    job_id = ask_for_a_video(api, LETHAL)

    def revived() -> dict[str, Any] | None:
        if not worker.alive:
            worker.start()
        return end_of_video(api, job_id)

    given_up = poll(revived, timeout_s=PATIENCE_S)
    assert given_up is not None
    assert given_up["error"]["code"] == "poison", given_up
    # Prometheus may not have looked at the worker's last life before its first video: it sees the second one.
    draw_a_video(api)
    poll(lambda: prometheus.series(VIDEOS_DRAWN))
    draw_a_video(api)


def draw_a_video(api: Api) -> None:
    """Have a video drawn."""
    job_id = ask_for_a_video(api, "a red cube")
    drawn = poll(lambda: end_of_video(api, job_id), timeout_s=PATIENCE_S)
    assert drawn is not None
    assert drawn["status"] == "completed", drawn


def cancel_one(api: Api) -> None:
    """Take back a job that waits."""
    job_id = api.accept("taken back")
    assert api.http.delete(f"/v1/images/{job_id}").is_success
    assert api.ended(job_id)["error"]["code"] == "cancelled"


def fill_the_queue(api: Api) -> None:
    """Hand in jobs until one is refused."""
    codes = [api.post(f"filler {number}", wait_s=0).status_code for number in range(MAX_QUEUE + 1)]
    assert set(codes) == {202, 429}


def lose_a_lease(deployment: Deployment, frozen: Worker, other: Worker) -> None:
    """Wake a frozen worker while another one draws its jobs, and let both go on."""
    other.brake()
    deployment.started(other)
    poll(lambda: other.batches, timeout_s=PATIENCE_S)
    frozen.send(signal.SIGCONT)
    poll(lambda: frozen.metric("heartbeat_lost_total"), timeout_s=PATIENCE_S)
    frozen.release()
    other.release()


def deliver_twice(deployment: Deployment, api: Api, *workers: Worker) -> None:
    """Put a job that is done into its stream once more."""
    poll(lambda: api.ready() and api.post("once", key="once").status_code == 200)  # the queue is still full
    job_id = api.post("once", key="once").json()["id"]
    deployment.client.xadd(deployment.lane, {"id": job_id})
    poll(lambda: sum(one.metric("job_duplicates_total", cause="start") for one in workers))


def freeze_redis(deployment: Deployment, api: Api) -> None:
    """Let Redis not answer until somebody has noticed."""
    deployment.redis.send(signal.SIGSTOP)
    try:
        assert api.post("in vain").status_code == 503
    finally:
        deployment.redis.send(signal.SIGCONT)


@contextmanager
def bad_time(deployment: Deployment, video_bundle: Path, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that has seen all of it, and still sees what is left."""
    api = deployment.api(max_queue=MAX_QUEUE)
    frozen, other = deployment.worker("frozen").brake(), deployment.worker("other")
    clips = deployment.worker("clips", bundles=video_bundle)
    targets = {"tdm-api": [api.scraped], "tdm-worker": [one.scraped for one in (frozen, other, clips)]}
    with running_prometheus(folder / "prometheus", targets) as prometheus:
        clips.start()
        other.wait_at_the_door()
        deployment.started(frozen)
        poll(lambda: len(api.http.get("/v1/models").json()["data"]) == 2)
        deaths = deployment.background.submit(draw_videos, api, clips, prometheus)
        with k6_under_way(api, prometheus, folder / "load"):
            poll(lambda: frozen.batches)
            frozen.send(signal.SIGSTOP)
            cancel_one(api)
            poll(lambda: prometheus.series("k6_dropped_iterations_total"), timeout_s=PATIENCE_S)
            fill_the_queue(api)
            lose_a_lease(deployment, frozen, other)
            deliver_twice(deployment, api, frozen, other)
        freeze_redis(deployment, api)
        deaths.result(PATIENCE_S)
        yield prometheus


def test_every_panel_and_every_rule_has_something_to_show(
    deployment: Deployment, bundle: Path, video_bundle: Path, tmp_path: Path
) -> None:
    queries = dashboard_queries()
    shown: dict[tuple[str, str], list[Series]] = {}
    with bad_time(deployment, video_bundle, tmp_path) as prometheus:

        def missing() -> list[tuple[str, str]]:
            for name in queries.keys() - shown.keys():
                if series := [one for one in prometheus.series(queries[name]) if finite(one)]:
                    shown[name] = series
            return sorted(queries.keys() - shown.keys())

        with suppress(AssertionError):  # the next line says more
            poll(lambda: not missing(), timeout_s=60)
        left = missing()
        assert left == [], f"nothing to show: {left}"
        assert_begun(prometheus, [read_manifest(bundle), read_manifest(video_bundle)])
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        models = prometheus.get("label/class/values", **{"match[]": "tdm_workers_live"})
        drawing()["main"](prometheus.url, 1.0, tmp_path / "dashboard.png")
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    assert models == [MODEL, VIDEO_MODEL]
    with Image.open(tmp_path / "dashboard.png") as picture:
        picture.verify()
    for (title, legend), series in shown.items():
        named = set(re.findall(r"{{(\w+)}}", legend))
        assert all(named <= one["metric"].keys() for one in series), f"{title}: {legend} of {series}"
        assert all(min(finite(one)) > -1e-9 for one in series), title


def assert_begun(prometheus: Prometheus, manifests: Sequence[Manifest]) -> None:
    """All that was ever counted is among what processes begin at 0, but for what nobody can know by then."""
    api, worker = Metrics(), Metrics()
    create_app(Settings(redis_url="redis://nobody"), metrics=api)
    for manifest in manifests:
        begin_model(api, manifest.name, JobKind(manifest.kind))
        begin_series(worker, manifest, "cpu")
    for job, metrics in (("tdm-api", api), ("tdm-worker", worker)):
        begun = {
            frozenset({"__name__": sample.name, **sample.labels}.items())
            for family in metrics.registry.collect()
            for sample in family.samples
        }
        seen = prometheus.get("series", **{"match[]": f'{{__name__=~"{COUNTED}",job="{job}"}}'})
        assert seen
        labels = [{name: one[name] for name in one.keys() - {"job", "instance"}} for one in seen]
        late = [one for one in labels if frozenset(one.items()) not in begun and not is_news(one)]
        assert late == [], f"{job} began late"


def is_news(labels: dict[str, str]) -> bool:
    """Whether nobody can know of a series before it comes: of a request to nowhere, or of how a job ends."""
    return "unmatched" in labels.values() or (
        labels["__name__"] == "tdm_job_e2e_seconds_count" and labels["outcome"] != "done"
    )


def dashboard_queries() -> dict[tuple[str, str], str]:
    """(panel, legend) -> query of all panels, and of what is drawn across them."""
    dashboard = json.loads((ROOT / "deploy/grafana/tdm.json").read_text(encoding="utf-8"))
    filled = drawing()["filled"]
    return {
        (panel["title"], target["legendFormat"]): filled(target["expr"], PERIOD_S)
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    } | {
        (one["name"], one["titleFormat"]): filled(one["expr"], PERIOD_S)
        for one in dashboard["annotations"]["list"]
    }


def drawing() -> dict[str, Any]:
    """What `deploy/grafana/draw.py` defines."""
    return runpy.run_path(str(ROOT / "deploy/grafana/draw.py"))


def finite(series: Series) -> list[float]:
    """Values of a series that can be drawn."""
    return [float(value) for _, value in series["values"] if math.isfinite(float(value))]
