"""The simulated autoscalers: Kubernetes' rules, and a day that is lived by all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from engines.bundle.manifest import write_manifest
from loadtests.scaling.__main__ import main
from loadtests.scaling.scalers import (
    BUSY,
    DRAIN_S,
    SYNC_S,
    WINDOW_S,
    Autoscaler,
    Behaviour,
    by_backlog,
    by_demand,
    by_utilisation,
)
from tests.server.manifests import make_manifest
from tests.test_kubernetes import names, of_kind

PNG = b"\x89PNG"


@dataclass
class Seen:
    """A fleet as a scaler sees it."""

    num_workers: int = 1
    backlog_ms: float = 0.0
    running: float = 0.0
    coming: float = 0.0

    def offered(self, since_ms: float, now_ms: float) -> float:
        return self.coming

    def busy(self, since_ms: float, now_ms: float) -> float:
        return self.running


def follow(scaler: Autoscaler, seen: Seen, minutes: float, *, begin_s: float = 0.0) -> list[int]:
    """Replicas at each sync, the fleet doing as it is told."""
    counts = []
    for tick in range(round(minutes * 60 / SYNC_S)):
        seen.num_workers = scaler.replicas(seen, 1000 * (begin_s + tick * SYNC_S))
        counts.append(seen.num_workers)
    return counts


def test_two_come_a_minute_until_there_are_as_many_as_are_wanted() -> None:
    counts = follow(Autoscaler(by_backlog(2.0), Behaviour()), Seen(backlog_ms=11_900), 3)
    assert counts == [3] * 4 + [5] * 4 + [6] * 4


def test_never_more_than_allowed_nor_fewer() -> None:
    behaviour = Behaviour(least=2, most=4, stabilisation_s=60, down=9)
    scaler, seen = Autoscaler(by_backlog(1.0), behaviour), Seen(num_workers=2, backlog_ms=99_000)
    assert follow(scaler, seen, 10)[-1] == 4
    seen.backlog_ms = 0
    assert follow(scaler, seen, 10, begin_s=600)[-1] == 2


def test_what_was_needed_lately_stays_and_the_rest_goes_one_by_one() -> None:
    scaler, seen = Autoscaler(by_backlog(1.0), Behaviour()), Seen(num_workers=3, backlog_ms=5000)
    assert follow(scaler, seen, 5)[-1] == 5
    seen.backlog_ms = 0
    counts = follow(scaler, seen, 20, begin_s=300)
    first_gone_s = SYNC_S * counts.index(4)
    assert first_gone_s == pytest.approx(600, abs=SYNC_S)
    assert counts.index(3) - counts.index(4) == 120 / SYNC_S


def test_small_differences_change_nothing() -> None:
    scaler = Autoscaler(by_utilisation(0.7), Behaviour(most=30))
    assert scaler.replicas(Seen(num_workers=10, running=7.6), 1000) == 10
    assert scaler.replicas(Seen(num_workers=10, running=8.0), 60_000) == 12


def test_demand_is_what_comes_in_and_what_waits() -> None:
    # Engines run all the time, with half-empty batches: they are more than are needed, and nothing waits.
    seen = Seen(num_workers=4, backlog_ms=500, running=3.9, coming=1.5)
    assert by_utilisation(0.7)(seen, 60_000) > 5
    assert by_backlog(2.0)(seen, 60_000) < 1
    assert by_demand()(seen, 60_000) == pytest.approx(1.5 / 0.75 + 0.5 / 15)


def test_simulated_autoscaler_is_the_one_of_the_overlay() -> None:
    """Its bounds and paces, and what it asks for, are those that KEDA is told for images."""
    (scaler,) = [
        one["spec"] for one in of_kind("keda", "ScaledObject") if names([one]) == {"tdm-worker-scenes"}
    ]
    behaviour = scaler["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
    (up,), (down,) = behaviour["scaleUp"]["policies"], behaviour["scaleDown"]["policies"]
    assert {up["type"], down["type"]} == {"Pods"}
    assert Behaviour() == Behaviour(
        least=scaler["minReplicaCount"],
        most=scaler["maxReplicaCount"],
        up=up["value"],
        up_period_s=up["periodSeconds"],
        down=down["value"],
        down_period_s=down["periodSeconds"],
        stabilisation_s=behaviour["scaleDown"]["stabilizationWindowSeconds"],
    )
    (trigger,) = scaler["triggers"]
    offered = f'sum(rate(tdm_accepted_work_seconds_total{{class="scenes"}}[{WINDOW_S / 60:g}m])) / {BUSY:g}'
    backlog = f'max(tdm_queue_backlog_seconds{{class="scenes"}}) / {DRAIN_S:g}'
    assert trigger["metadata"]["query"] == f"({offered} or vector(0)) + {backlog}"


def test_day_is_simulated_drawn_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    manifest = make_manifest("scenes")
    slow = [row.model_copy(update={"ms": 40 * row.ms}) for row in manifest.latency]
    write_manifest(bundle, manifest.model_copy(update={"latency": slow}))
    out = tmp_path / "scaling.json"
    arguments = ["--peak", "1.2", "--slo", "80", "--begin-hour", "14", "--hours", "2", "--out", str(out)]

    assert main([str(bundle), *arguments]) == 0

    written = json.loads(out.read_text())
    results = {one["name"]: one for one in written["results"]}
    assert list(results) == [
        "fixed, for the peak",
        "fixed, for the mean",
        "utilisation 70 %",
        "backlog alone",
        "demand",
    ]
    peak, mean = results["fixed, for the peak"], results["fixed, for the mean"]
    assert peak["missed"] <= mean["missed"]
    assert peak["worker_hours"] == pytest.approx(2 * peak["most_workers"])
    demand = results["demand"]
    assert demand["missed"] < mean["missed"]
    for other in ("utilisation 70 %", "backlog alone"):
        assert demand["worker_hours"] < results[other]["worker_hours"]
    assert {len(one["workers"]) for one in results.values()} == {24}
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    assert "worker-hours" in capsys.readouterr().out
