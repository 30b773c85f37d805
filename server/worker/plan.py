"""Plan: how many workers a load needs (`python -m server plan`), from the latency table of a bundle.

The table was measured on the machine that built the bundle: a plan is for workers like it. Fleets of growing
size are simulated (`simulation.py`) until one keeps the promised latency.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import Manifest, read_manifest
from engines.errors import BundleError
from server.cost import batch_cost
from server.worker.simulation import Outcome, poisson, simulate

MIN_REQUESTS = 4000
REQUESTS_PER_WORKER = 200
MAX_FACTOR = 4
"""A fleet so much larger than what the mean load needs gains nothing by being larger still."""
SEED = 1
PRECISION = 0.01
"""Of the highest rate: share of what the engines could do at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is to be served, and how fast.

    Attributes:
        rate_per_s: requests per second, at random moments; 0: as many as can be.
        num_samples: of each request.
        slo_ms: latency that `percent` of the requests must not exceed.
        beside_ms: what a request takes beside waiting and the engine.
    """

    rate_per_s: float
    num_samples: int
    slo_ms: float
    percent: float
    beside_ms: float


@dataclass(frozen=True, slots=True)
class Fleet:
    """A number of workers, the requests per second that they got, and what came of simulating it."""

    num_workers: int
    rate_per_s: float
    outcome: Outcome


class ImpossibleError(ValueError):
    """No number of workers meets the demand."""


def fleets(demand: Demand, batch_ms: Callable[[int], float], max_batch: int) -> Iterator[Fleet]:
    """Fleets of growing size, up to the first that meets the demand.

    Raises:
        ImpossibleError: none does: one request alone takes longer.
    """
    alone_ms = _alone_ms(demand, batch_ms, max_batch)
    most_per_s = _most_per_s(batch_ms, max_batch) / demand.num_samples
    least = math.floor(demand.rate_per_s / most_per_s) + 1
    for num_workers in range(least, MAX_FACTOR * least + 2):
        fleet = _simulated(demand, demand.rate_per_s, num_workers, batch_ms, max_batch)
        yield fleet
        if _is_kept(demand, fleet):
            return
    promise = f"{demand.slo_ms:.0f} ms, too close to the {alone_ms:.0f} ms of one alone"
    raise ImpossibleError(f"{num_workers} workers do not keep {promise}")


def most_for(demand: Demand, num_workers: int, batch_ms: Callable[[int], float], max_batch: int) -> Fleet:
    """The fleet of this size under the highest rate at which it keeps the promise, within 1 %.

    Raises:
        ImpossibleError: it keeps it at none: one request alone takes longer.
    """
    _alone_ms(demand, batch_ms, max_batch)
    highest = num_workers * _most_per_s(batch_ms, max_batch) / demand.num_samples
    low, high = 0.0, highest
    found: Fleet | None = None
    while high - low > PRECISION * highest:
        rate = (low + high) / 2
        fleet = _simulated(demand, rate, num_workers, batch_ms, max_batch)
        if _is_kept(demand, fleet):
            low, found = rate, fleet
        else:
            high = rate
    if found is None:
        raise ImpossibleError(f"{num_workers} workers keep {demand.slo_ms:.0f} ms at no rate to speak of")
    return found


def _simulated(
    demand: Demand, rate_per_s: float, num_workers: int, batch_ms: Callable[[int], float], max_batch: int
) -> Fleet:
    outcome = simulate(
        poisson(rate_per_s, max(MIN_REQUESTS, REQUESTS_PER_WORKER * num_workers), SEED),
        batch_ms=batch_ms,
        max_batch=max_batch,
        num_workers=num_workers,
        num_samples=demand.num_samples,
        beside_ms=demand.beside_ms,
    )
    return Fleet(num_workers, rate_per_s, outcome)


def _is_kept(demand: Demand, fleet: Fleet) -> bool:
    return fleet.outcome.percentile_ms(demand.percent) <= demand.slo_ms


def _alone_ms(demand: Demand, batch_ms: Callable[[int], float], max_batch: int) -> float:
    """What one request takes that finds everything idle.

    Raises:
        ImpossibleError: longer than is promised.
    """
    full, rest = divmod(demand.num_samples, max_batch)
    alone_ms = full * batch_ms(max_batch) + (batch_ms(rest) if rest else 0.0) + demand.beside_ms
    if alone_ms > demand.slo_ms:
        allowed = f"{demand.slo_ms:.0f} ms are allowed"
        raise ImpossibleError(f"one request alone takes {alone_ms:.0f} ms; {allowed}")
    return alone_ms


def _most_per_s(batch_ms: Callable[[int], float], max_batch: int) -> float:
    """Samples per second of a worker that always runs the batches that suit it best."""
    return max(1000 * size / batch_ms(size) for size in range(1, max_batch + 1))


def run_plan(
    bundle: Path,
    demand: Demand,
    *,
    num_workers: int | None,
    size: str,
    num_steps: int | None,
    pace: float = 1.0,
    price: float | None,
    as_json: bool,
    console: Console,
) -> int:
    """Print the smallest fleet that meets the demand, or the most that a given one does.

    Args:
        bundle: directory.
        demand: requests and promise.
        num_workers: of a given fleet; None finds one.
        size: WIDTHxHEIGHT, for videos WIDTHxHEIGHTxFRAMES; empty takes the bundle's first.
        num_steps: of each sample; None takes the bundle's default.
        pace: what batches take where they are served, over the table.
        price: of one worker's machine for an hour, in any currency.
        as_json: print an object instead of a table.
        console: where to.

    Returns:
        0, or 1 where no fleet meets it.
    Raises:
        ValueError: there is no bundle, or it does not generate such samples.
    """
    try:
        manifest = read_manifest(bundle)
    except BundleError as error:
        raise ValueError(f"{bundle}: {error}") from None
    table_ms = _batch_ms(manifest, size, num_steps or manifest.default_num_steps)

    def batch_ms(num_samples: int) -> float:
        return pace * table_ms(num_samples)

    try:
        if num_workers is None:
            tried = list(fleets(demand, batch_ms, manifest.max_batch))
        else:
            tried = [most_for(demand, num_workers, batch_ms, manifest.max_batch)]
    except ImpossibleError as error:
        console.print(f"error: {error}", markup=False)
        return 1
    _print(manifest, demand, tried, price, as_json=as_json, console=console)
    return 0


def _print(
    manifest: Manifest,
    demand: Demand,
    tried: list[Fleet],
    price: float | None,
    *,
    as_json: bool,
    console: Console,
) -> None:
    found = tried[-1]
    hours = found.num_workers / (3.6 * found.rate_per_s * demand.num_samples)  # for 1,000 samples
    if as_json:
        result = {
            "workers": found.num_workers,
            "requests_per_s": found.rate_per_s,
            "worker_hours_per_day": 24 * found.num_workers,
            "worker_hours_per_1000": hours,
            "price_per_1000": None if price is None else hours * price,
            "fleets": [_row(fleet, demand) for fleet in tried],
        }
        print(json.dumps(result, indent=2))  # noqa: T201 - the command's answer
        return
    console.print(_table(manifest, demand, tried))
    noun = "videos" if manifest.kind == "video" else "images"
    served = f"{found.num_workers} workers for {found.rate_per_s:.3g} requests/s"
    line = f"{served}: {24 * found.num_workers} worker-hours a day, {hours:.4g} for 1,000 {noun}"
    console.print(line if price is None else f"{line}, which cost {hours * price:.4g}")


def _batch_ms(manifest: Manifest, size: str, num_steps: int) -> Callable[[int], float]:
    bucket = manifest.buckets[0] if not size else _bucket_of(size)
    if bucket not in manifest.buckets:
        known = ", ".join(_size_of(one) for one in manifest.buckets)
        raise ValueError(f"--size {size}: {manifest.name} has {known}")
    if num_steps not in manifest.num_steps:
        raise ValueError(
            f"--steps {num_steps}: {manifest.name} has {', '.join(map(str, manifest.num_steps))}"
        )
    batch_ms = batch_cost(manifest, bucket, num_steps, [manifest.backend])
    if batch_ms is None:
        raise ValueError(f"{manifest.name}: nothing was measured for {_size_of(bucket)}")
    return batch_ms


def _bucket_of(size: str) -> Bucket:
    try:
        width, height, *frames = (int(part) for part in size.lower().split("x"))
        return Bucket(height, width, *frames)
    except (TypeError, ValueError):
        raise ValueError(f"--size {size}: WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES is expected") from None


def _size_of(bucket: Bucket) -> str:
    return bucket.size if bucket.frames == 1 else f"{bucket.size}x{bucket.frames}"


def _row(fleet: Fleet, demand: Demand) -> dict[str, float]:
    outcome = fleet.outcome
    return {
        "workers": fleet.num_workers,
        "busy": round(outcome.busy, 4),
        "mean_batch": round(outcome.mean_batch, 3),
        **{f"p{percent:g}_ms": round(outcome.percentile_ms(percent), 2) for percent in _percents(demand)},
    }


def _percents(demand: Demand) -> list[float]:
    return sorted({50.0, 99.0, demand.percent})


def _table(manifest: Manifest, demand: Demand, tried: list[Fleet]) -> Table:
    promise = f"{demand.percent:g} % within {demand.slo_ms / 1000:g} s"
    table = Table(
        title=f"{manifest.name} {manifest.version}: {tried[-1].rate_per_s:.3g} requests/s, {promise}"
    )
    for name in ("workers", "busy", "batch", *(f"p{percent:g}" for percent in _percents(demand)), "kept"):
        table.add_column(name, justify="right")
    for fleet in tried:
        outcome = fleet.outcome
        table.add_row(
            str(fleet.num_workers),
            f"{outcome.busy:.0%}",
            f"{outcome.mean_batch:.1f}",
            *(f"{outcome.percentile_ms(percent) / 1000:.2f} s" for percent in _percents(demand)),
            "yes" if outcome.percentile_ms(demand.percent) <= demand.slo_ms else "no",
        )
    return table
