"""Batch policies at the same requests, simulated: ours, fixed delays, and none.

    python -m loadtests.batching BUNDLE [BUNDLE ...]     writes results/batching.json and .png

Engines take what a bundle's latency table says. Two that nobody has measured are beside them, as the ends
between which engines lie: one whose batches are free, and one whose batches save nothing. Requests come at
random moments, one sample each; or eight at a moment; or mixed, one in five of eight samples. The load is the
share of what the engine could do at all with its best batches.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engines.bundle.manifest import read_manifest
from loadtests import machine
from loadtests.batching.policies import OURS, POLICIES
from loadtests.process import ROOT
from server.cost import batch_cost
from server.worker.simulation import Fleet, SimulatedJob

RESULT = ROOT / "loadtests" / "results" / "batching.json"
LOADS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
MIXES = ("single", "bursts", "mixed")
BURST = 8
LARGE = 8
SHARE_OF_LARGE = 0.2
ALONE_MS = 30.0
"""Of one sample at the engines that nobody has measured."""
IDEAL_BATCH = 16
SEED = 11
TIE = 1.05
"""What differs by less is equal: so much do two seeds differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What batches take."""

    name: str
    batch_ms: Callable[[int], float]
    max_batch: int

    @property
    def most_per_ms(self) -> float:
        """Samples, in its best batches."""
        return max(size / self.batch_ms(size) for size in range(1, self.max_batch + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One policy at one load."""

    engine: str
    mix: str
    load: float
    policy: str
    p50_ms: float
    p99_ms: float
    mean_ms: float
    mean_batch: float


IDEAL = (
    Engine(name="batches are free", batch_ms=lambda _: ALONE_MS, max_batch=IDEAL_BATCH),
    Engine(name="batches save nothing", batch_ms=lambda size: ALONE_MS * size, max_batch=IDEAL_BATCH),
)


def engine_of(bundle: Path) -> Engine:
    """By the latency table of a bundle's first size and usual number of steps.

    Raises:
        ValueError: nothing was measured.
    """
    manifest = read_manifest(bundle)
    bucket, num_steps = manifest.buckets[0], manifest.default_num_steps
    batch_ms = batch_cost(manifest, bucket, num_steps, [manifest.backend])
    if batch_ms is None:
        raise ValueError(f"{bundle}: nothing was measured")
    return Engine(name=f"{manifest.name}, {manifest.device}", batch_ms=batch_ms, max_batch=manifest.max_batch)


def requests(mix: str, samples_per_ms: float, num_requests: int) -> Iterator[SimulatedJob]:
    """As many as are asked for, at a mean rate of samples."""
    rng, now_ms = random.Random(SEED), 0.0
    per_moment = {"single": 1.0, "bursts": float(BURST), "mixed": 1 + SHARE_OF_LARGE * (LARGE - 1)}[mix]
    came = 0
    while came < num_requests:
        now_ms += rng.expovariate(samples_per_ms / per_moment)
        for _ in range(BURST if mix == "bursts" else 1):
            is_large = mix == "mixed" and rng.random() < SHARE_OF_LARGE
            yield SimulatedJob(now_ms, LARGE if is_large else 1)
            came += 1


def compare(engine: Engine, mix: str, load: float, num_requests: int, num_workers: int) -> list[Row]:
    """Every policy at the same requests."""
    rows = []
    for name, policy in POLICIES.items():
        rate = load * num_workers * engine.most_per_ms
        jobs = list(requests(mix, rate, num_requests))
        fleet = Fleet(engine.batch_ms, engine.max_batch, num_workers, policy)
        ends = fleet.serve(jobs)
        took = sorted(ends[job] - job.came_ms for job in jobs[len(jobs) // 10 :])
        rows.append(
            Row(
                engine=engine.name,
                mix=mix,
                load=load,
                policy=name,
                p50_ms=round(took[len(took) // 2], 2),
                p99_ms=round(took[int(0.99 * len(took))], 2),
                mean_ms=round(sum(took) / len(took), 2),
                mean_batch=round(sum(size for *_, size in fleet.runs) / len(fleet.runs), 2),
            )
        )
    return rows


def verdicts(rows: Sequence[Row]) -> list[dict[str, object]]:
    """For each engine, mix and load, our mean and p99 over the best of each that another has.

    The best of all others at once, at each load another: no server has them all.
    """
    found: list[dict[str, object]] = []
    places = dict.fromkeys((row.engine, row.mix, row.load) for row in rows)
    for engine, mix, load in places:
        here = [row for row in rows if (row.engine, row.mix, row.load) == (engine, mix, load)]
        ours = next(row for row in here if row.policy == OURS)
        others = [row for row in here if row.policy != OURS]
        found.append(
            {
                "engine": engine,
                "mix": mix,
                "load": load,
                "mean_over_best": round(ours.mean_ms / min(row.mean_ms for row in others), 3),
                "p99_over_best": round(ours.p99_ms / min(row.p99_ms for row in others), 3),
            }
        )
    return found


def draw(rows: Sequence[Row], path: Path) -> None:
    """Mean and p99 over load: a row of panels for each engine, two columns for each mix."""
    from matplotlib.figure import Figure

    engines = list(dict.fromkeys(row.engine for row in rows))
    figure = Figure(figsize=(4 * len(MIXES), 3.2 * len(engines)), layout="constrained")
    panels = figure.subplots(len(engines), len(MIXES), squeeze=False)
    for line, engine in zip(panels, engines, strict=True):
        for axes, mix in zip(line, MIXES, strict=True):
            here = [row for row in rows if (row.engine, row.mix) == (engine, mix)]
            for number, policy in enumerate(POLICIES):
                mine = [row for row in here if row.policy == policy]
                loads = [row.load for row in mine]
                width = 2.4 if policy == OURS else 1.2
                colour = "black" if policy == OURS else f"C{number}"
                axes.plot(loads, [row.mean_ms for row in mine], color=colour, linewidth=width, label=policy)
                axes.plot(loads, [row.p99_ms for row in mine], color=colour, linewidth=width, linestyle=":")
            best = min(row.mean_ms for row in here)
            axes.set_yscale("log")
            axes.set_ylim(0.8 * best, 60 * best)
            axes.set_title(f"{engine}; {mix}", fontsize=9)
    panels[0][0].legend(fontsize="x-small", loc="upper left", title="mean; dotted: p99", title_fontsize=7)
    figure.supxlabel("load")
    figure.supylabel("ms")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, write result and picture, print where others are better."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.batching", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("bundles", type=Path, nargs="*", help="whose latency tables count")
    add("--requests", type=int, default=4000, help="of each simulation (4000)")
    add("--workers", type=int, default=1, help="that serve (1)")
    add("--out", type=Path, default=RESULT, help="result file; the picture lies beside (default %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    rows: list[Row] = []
    for engine in (*map(engine_of, arguments.bundles), *IDEAL):
        for mix in MIXES:
            for load in LOADS:
                rows += compare(engine, mix, load, arguments.requests, arguments.workers)
            console.print(f"{engine.name}: {mix}")
    judged = verdicts(rows)
    result = {
        **machine.describe(),
        "requests": arguments.requests,
        "workers": arguments.workers,
        "rows": [asdict(row) for row in rows],
        "verdicts": judged,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(rows, arguments.out.with_suffix(".png"))
    table = Table(title="our mean and p99, over the best of every other policy at that load")
    for name in ("engine", "mix", "load", "mean", "p99"):
        table.add_column(name)
    for one in judged:
        ratios = [f"{one[name]:.2f}" for name in ("mean_over_best", "p99_over_best")]
        table.add_row(str(one["engine"]), str(one["mix"]), str(one["load"]), *ratios)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
