"""A day of requests at fleets that are scaled in different ways, simulated.

    python -m loadtests.scaling BUNDLE                  writes results/scaling.json and results/scaling.png
    python -m loadtests.scaling BUNDLE --peak 20 --slo 5 --start-s 90

Workers follow the server's batch policy and take what the bundle's latency table says
(server/worker/simulation.py); scalers follow Kubernetes' rules (scalers.py). What is compared: as many
workers all day as the peak needs; as the mean needs; utilisation, which is what scaling by CPU or GPU load
comes to; the backlog alone; and demand, which is the query of deploy/k8s/overlays/keda.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engines.bundle.manifest import Manifest, read_manifest
from loadtests import machine
from loadtests.process import ROOT
from loadtests.scaling.scalers import (
    SYNC_S,
    Autoscaler,
    Behaviour,
    by_backlog,
    by_demand,
    by_utilisation,
)
from server.cost import batch_cost
from server.worker.plan import Demand, fleets
from server.worker.simulation import Fleet, SimulatedJob

RESULT = ROOT / "loadtests" / "results" / "scaling.json"
HOUR_MS = 3_600_000.0
SLICE_S = 300.0
"""Of the curves in the picture."""
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """What is asked for.

    Attributes:
        peak_per_s: requests per second at the busiest hour.
        begin_hour: of the day, at which the trace begins.
        hours: length of the trace.
        slo_s: latency that is promised.
        start_s: from the decision to start a worker until it serves.
    """

    peak_per_s: float
    begin_hour: float
    hours: float
    slo_s: float
    start_s: float

    def rate_per_s(self, now_ms: float) -> float:
        """Little at night, most in the afternoon, and for ten minutes every four hours twice as much."""
        hour = self.begin_hour + now_ms / HOUR_MS
        daily = 0.15 + 0.85 * math.sin(math.pi * ((hour - 3) % 24) / 24) ** 2
        in_burst = (hour % 4) * 60 >= 230
        return self.peak_per_s * min(1.0, daily) * (2.0 if in_burst else 1.0) / 2

    def arrivals_ms(self) -> Iterator[float]:
        """A Poisson process of that rate, thinned from one of the greatest."""
        rng, now_ms = random.Random(SEED), 0.0
        while True:
            now_ms += rng.expovariate(self.peak_per_s / 1000)
            if now_ms >= self.hours * HOUR_MS:
                return
            if rng.random() < self.rate_per_s(now_ms) / self.peak_per_s:
                yield now_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One way of scaling over the day."""

    name: str
    worker_hours: float
    missed: float
    p50_s: float
    p95_s: float
    most_workers: int
    workers: tuple[float, ...]
    """Mean number of workers in each slice."""
    slice_p95_s: tuple[float, ...]


def live(day: Day, manifest: Manifest, name: str) -> Result:
    """Run the day once, scaled in one of the `ways`."""
    scaler = ways(day, manifest)[name]
    batch_ms = batch_cost(manifest, manifest.buckets[0], manifest.default_num_steps, [manifest.backend])
    assert batch_ms is not None, "a bundle without measurements"
    fleet = Fleet(batch_ms, manifest.max_batch, scaler if isinstance(scaler, int) else scaler.behaviour.least)
    counts: list[tuple[float, int]] = [(0.0, fleet.num_workers)]

    def control(now_ms: float) -> None:
        if isinstance(scaler, int):
            return
        wanted = scaler.replicas(fleet, now_ms)
        for _ in range(wanted - fleet.num_workers):
            fleet.add(now_ms + 1000 * day.start_s)
        for _ in range(fleet.num_workers - wanted):
            fleet.remove()
        counts.append((now_ms, fleet.num_workers))

    jobs = [SimulatedJob(came_ms, 1) for came_ms in day.arrivals_ms()]
    ends = fleet.serve(jobs, control, SYNC_S * 1000)
    took_s = [(ends[job] - job.came_ms) / 1000 for job in jobs]
    slices: list[list[float]] = [[] for _ in range(math.ceil(day.hours * 3600 / SLICE_S))]
    for job, seconds in zip(jobs, took_s, strict=True):
        slices[int(job.came_ms / 1000 / SLICE_S)].append(seconds)
    workers = _mean_counts(counts, len(slices))
    return Result(
        name=name,
        worker_hours=sum(workers) * SLICE_S / 3600,
        missed=sum(seconds > day.slo_s for seconds in took_s) / len(took_s),
        p50_s=_percentile(took_s, 50),
        p95_s=_percentile(took_s, 95),
        most_workers=max(count for _, count in counts),
        workers=tuple(workers),
        slice_p95_s=tuple(_percentile(one, 95) if one else 0.0 for one in slices),
    )


def ways(day: Day, manifest: Manifest) -> dict[str, Autoscaler | int]:
    """What is compared, by name; a number is a fixed fleet."""
    batch_ms = batch_cost(manifest, manifest.buckets[0], manifest.default_num_steps, [manifest.backend])
    assert batch_ms is not None, "a bundle without measurements"

    def needed(rate_per_s: float) -> int:
        demand = Demand(
            rate_per_s=rate_per_s, num_samples=1, slo_ms=1000 * day.slo_s, percent=95, beside_ms=0
        )
        return [*fleets(demand, batch_ms, manifest.max_batch)][-1].num_workers

    minutes = [day.rate_per_s(60_000 * minute) for minute in range(round(day.hours * 60))]
    peak, mean = needed(max(minutes)), needed(sum(minutes) / len(minutes))
    behaviour = Behaviour(most=2 * peak)
    return {
        "fixed, for the peak": peak,
        "fixed, for the mean": mean,
        "utilisation 70 %": Autoscaler(by_utilisation(0.7), behaviour),
        "backlog alone": Autoscaler(by_backlog(2.0), behaviour),
        "demand": Autoscaler(by_demand(), behaviour),
    }


def _mean_counts(counts: Sequence[tuple[float, int]], num_slices: int) -> list[float]:
    """Mean of a step function (ms, value) in each slice."""
    means, index = [], 0
    for number in range(num_slices):
        start, end, area = 1000 * SLICE_S * number, 1000 * SLICE_S * (number + 1), 0.0
        while True:
            until = counts[index + 1][0] if index + 1 < len(counts) else math.inf
            area += counts[index][1] * (min(until, end) - max(counts[index][0], start))
            if until > end:
                break
            index += 1
        means.append(area / (end - start))
    return means


def _percentile(values: Sequence[float], percent: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * percent / 100))]


def draw(day: Day, results: Sequence[Result], path: Path) -> None:
    """Requests, workers and latency over the day."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    rate, workers, latency = figure.subplots(3, sharex=True)
    hours = [(number + 0.5) * SLICE_S / 3600 for number in range(len(results[0].workers))]
    rate.plot(hours, [day.rate_per_s(hour * HOUR_MS) for hour in hours], color="black")
    rate.set_ylabel("requests/s")
    for result in results:
        label = (
            f"{result.name}: {result.worker_hours:.0f} worker-hours, {result.missed:.1%} over {day.slo_s:g} s"
        )
        workers.step(hours, result.workers, where="mid", label=label)
        latency.plot(hours, result.slice_p95_s)
    workers.set_ylabel("workers")
    workers.legend(loc="upper left", fontsize="small")
    latency.set_ylabel("p95 of five minutes, s")
    latency.set_yscale("log")
    latency.axhline(day.slo_s, color="grey", linestyle=":")
    latency.set_xlabel("hour")
    figure.savefig(path, dpi=110)


def table(day: Day, results: Sequence[Result]) -> Table:
    """One row a way."""
    shown = Table(
        title=f"{day.hours:g} hours, {day.peak_per_s:g} requests/s at most, promised: {day.slo_s:g} s"
    )
    for name in ("scaled by", "worker-hours", "late", "p50", "p95", "most workers"):
        shown.add_column(name, justify="left" if name == "scaled by" else "right")
    for one in results:
        shown.add_row(
            one.name,
            f"{one.worker_hours:.1f}",
            f"{one.missed:.2%}",
            f"{one.p50_s:.2f} s",
            f"{one.p95_s:.2f} s",
            str(one.most_workers),
        )
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, print, draw and write."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.scaling", description=__doc__)
    parser.add_argument("bundle", type=Path, help="whose latency table counts")
    parser.add_argument("--peak", type=float, default=30.0, help="requests per second at most (30)")
    parser.add_argument("--slo", type=float, default=5.0, help="seconds that are promised (5)")
    parser.add_argument("--hours", type=float, default=24.0, help="length of the trace (24)")
    parser.add_argument("--begin-hour", type=float, default=0.0, help="of the day (0)")
    parser.add_argument("--start-s", type=float, default=60.0, help="until a new worker serves (60)")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file; the picture lies beside it")
    args = parser.parse_args(argv)
    manifest = read_manifest(args.bundle)
    day = Day(
        peak_per_s=args.peak,
        begin_hour=args.begin_hour,
        hours=args.hours,
        slo_s=args.slo,
        start_s=args.start_s,
    )
    console, results = Console(), []
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for result in pool.map(partial(live, day, manifest), ways(day, manifest)):
            results.append(result)
            console.print(f"{result.name}: {result.worker_hours:.1f} worker-hours")
    console.print(table(day, results))
    draw(day, results, args.out.with_suffix(".png"))
    written: dict[str, Any] = {
        "machine": machine.describe(),
        "bundle": {"name": manifest.name, "version": manifest.version, "backend": manifest.backend},
        "latency_of": manifest.platform.cpu if manifest.device == "cpu" else manifest.platform.gpu,
        "day": asdict(day),
        "results": [asdict(one) for one in results],
    }
    args.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
