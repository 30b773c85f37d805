"""Our server against others around the same student, measured in one run.

    python -m loadtests.bench                                          a pipeline behind a lock
    python -m loadtests.bench --peers lock litserve litserve-engine    LitServe, too
    python -m loadtests.bench --bundle DIR                             any bundle instead of the shipped one

The servers take turns (ours, the peer, ours, the peer, ...), each alone on the machine while measured and
started anew every time, so that slow drift of the machine reaches all. Of a peer's settings a trial finds the
best. Every reply is decoded. Before anything is timed, all draw the same prompts and seeds, and the pictures
are compared: a ratio means something only if all do the same work.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from loadtests import machine, prompts
from loadtests.client import BadReplyError, Latency, LoadClient, Saturation
from loadtests.contenders import PEERS, Contender, MeasuredServer, OurServer, rivals
from loadtests.process import ROOT, ServerProcess

SHIPPED_STUDENT = ROOT / "engines" / "demo" / "checkpoints" / "scenes-student"
RESULTS = ROOT / "loadtests" / "results"


def student_of(bundle: Path | None) -> tuple[Path, tuple[int, int]]:
    """Directory of the student in a bundle, or of the shipped one, and width and height of its pictures."""
    student = bundle / "checkpoint" if bundle else SHIPPED_STUDENT
    config = json.loads((student / "student.json").read_text(encoding="utf-8"))
    return student, (config["width"], config["height"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how hard to measure."""

    rounds: int
    seconds: float
    warm_up_s: float
    concurrency: int
    idle_requests: int
    compared_pictures: int
    size: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One server, started once and measured once."""

    ready_s: float
    idle: Latency
    saturated: Saturation
    cpu_ms_per_picture: dict[str, float]
    """By process, while it was saturated."""
    memory_mib: float
    """Of all its processes, shared pages counted once."""


async def measure(server: MeasuredServer, bodies: Iterator[dict[str, Any]], plan: Plan) -> Round:
    """One round against a server that is ready.

    Raises:
        BadReplyError: it answered something else than a picture.
    """
    async with LoadClient(server.base_url, size=plan.size) as client:
        await client.pictures(list(itertools.islice(bodies, 4)))  # opens connections, fills lazy state
        idle = await client.idle_latency(bodies, num_requests=plan.idle_requests)
        await client.saturate(bodies, concurrency=plan.concurrency, warm_up_s=0.0, seconds=plan.warm_up_s)
        before, began_s = server.usage(), time.monotonic()
        saturated = await client.saturate(
            bodies, concurrency=plan.concurrency, warm_up_s=0.0, seconds=plan.seconds
        )
        after, took_s = server.usage(), time.monotonic() - began_s
    return Round(
        ready_s=round(server.ready_s, 2),
        idle=idle,
        saturated=saturated,
        cpu_ms_per_picture={
            name: round(1000 * (cpu_s - before.cpu_s.get(name, 0.0)) / saturated.pictures_per_s / took_s, 2)
            for name, cpu_s in after.cpu_s.items()
        },
        memory_mib=round(after.memory_bytes / 2**20, 1),
    )


async def draw(server: ServerProcess, plan: Plan) -> list[Image.Image]:
    """The pictures of fixed prompts and seeds, for comparison."""
    bodies = list(itertools.islice(prompts.requests(seed=1), plan.compared_pictures))
    async with LoadClient(server.base_url, size=plan.size) as client:
        return await client.pictures(bodies)


def largest_difference(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> int:
    """Largest difference of any channel of any pixel, 0..255."""
    strips = [
        np.hstack([np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in side])
        for side in (ours, theirs)
    ]
    return int(np.abs(strips[0] - strips[1]).max())


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """Medians over rounds."""
    columns = {
        "ready_s": [one.ready_s for one in rounds],
        "idle_p50_ms": [one.idle.p50_ms for one in rounds],
        "idle_p95_ms": [one.idle.p95_ms for one in rounds],
        "pictures_per_s": [one.saturated.pictures_per_s for one in rounds],
        "saturated_p50_ms": [one.saturated.latency.p50_ms for one in rounds],
        "saturated_p95_ms": [one.saturated.latency.p95_ms for one in rounds],
        "cpu_ms_per_picture": [sum(one.cpu_ms_per_picture.values()) for one in rounds],
        "memory_mib": [one.memory_mib for one in rounds],
    }
    return {name: round(statistics.median(values), 2) for name, values in columns.items()}


def run(
    plan: Plan,
    *,
    bundle: Path | None,
    student: Path,
    peers: Sequence[str],
    scratch: Path,
    console: Console,
) -> dict[str, Any]:
    """Measure the servers in turns.

    Returns:
        The result as plain values: plan, machine, rounds, medians, ratio.
    Raises:
        BadReplyError: a reply was not a picture.
        RuntimeError: a server did not start.
    """
    taken_on = machine.describe()
    ours = OurServer(bundle, scratch)
    bodies = prompts.requests(seed=2)

    console.print(f"first start of {ours.name}")
    with ours.start() as server:
        first_ready_s = round(server.ready_s, 2)
        our_pictures = asyncio.run(draw(server, plan))
    console.print(f"  ready after {first_ready_s} s")
    built = bundle or ours.built_bundle()
    ours = OurServer(built, scratch)  # without a bundle it would go on to build others

    trials: dict[str, float] = {}
    difference = 0
    contenders: list[Contender] = [ours]
    for settings in rivals(peers, student=student, bundle=built, scratch=scratch).values():
        for peer in settings:
            with peer.start() as server:
                theirs = asyncio.run(draw(server, plan))
                difference = max(difference, largest_difference(our_pictures, theirs))
                trials[peer.name] = asyncio.run(measure(server, bodies, plan)).saturated.pictures_per_s
            console.print(f"{peer.name}: {trials[peer.name]} pictures/s in a trial")
        contenders.append(max(settings, key=lambda one: trials[one.name]))
    console.print(f"same prompts and seeds: pixels differ by at most {difference} of 255")

    rounds: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    for number, contender in itertools.product(range(plan.rounds), contenders):
        with contender.start() as server:
            one = asyncio.run(measure(server, bodies, plan))
        rounds[contender.name].append(one)
        console.print(
            f"round {number + 1}, {contender.name}: {one.idle.p50_ms} ms idle, "
            f"{one.saturated.pictures_per_s} pictures/s"
        )

    medians = {name: summary(taken) for name, taken in rounds.items()}
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        **taken_on,
        "plan": asdict(plan),
        "bundle": str(bundle.name) if bundle else "shipped student",
        "first_ready_s": first_ready_s,
        "peer_trials_pictures_per_s": trials,
        "largest_pixel_difference": difference,
        "rounds": {name: [asdict(one) for one in taken] for name, taken in rounds.items()},
        "medians": medians,
        "ratios_pictures_per_s": {
            other.name: round(medians[ours.name]["pictures_per_s"] / medians[other.name]["pictures_per_s"], 2)
            for other in contenders[1:]
        },
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    hardware, plan = result["hardware"], result["plan"]
    shown = Table(
        title=f"{hardware['cpu']}, {hardware['cores']} cores, commit {result['commit']}",
        caption=(
            f"medians of {plan['rounds']} alternating rounds; idle: one request at a time; "
            f"saturated: {plan['concurrency']} clients for {plan['seconds']:g} s. "
            f"{' and '.join(map(str, result['ratios_pictures_per_s'].values()))} times the pictures/s; "
            f"pixels differ by at most {result['largest_pixel_difference']} of 255."
        ),
        box=box.SIMPLE_HEAD,
    )
    shown.add_column("server", no_wrap=True)
    for heading in (
        "ready\ns",
        "idle p50\nms",
        "idle p95\nms",
        "images\nper s",
        "sat. p50\nms",
        "sat. p95\nms",
        "CPU\nms/image",
        "memory\nMiB",
    ):
        shown.add_column(heading, justify="right")
    for name, medians in result["medians"].items():
        shown.add_row(
            name, *(f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in medians.values())
        )
    return shown


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--bundle", type=Path, help="bundle to serve (default: the shipped student)")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=PEERS,
        default=["lock"],
        help="a diffusers pipeline behind a lock, LitServe around one, LitServe around our engine; it is "
        "installed for it into a folder that is thrown away (default: lock)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds for each server (default 3)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="measured window at saturation (default 20)"
    )
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds before that window (default 3)")
    parser.add_argument("--concurrency", type=int, default=32, help="clients at saturation (default 32)")
    parser.add_argument("--idle-requests", type=int, default=60, help="single requests a round (default 60)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "image-cpu.json", help="result file (default %(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, print the table."""
    arguments = parse_arguments(argv)
    console = Console()
    student, size = student_of(arguments.bundle)
    plan = Plan(
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        warm_up_s=arguments.warm_up,
        concurrency=arguments.concurrency,
        idle_requests=arguments.idle_requests,
        compared_pictures=8,
        size=size,
    )
    bundle = arguments.bundle.resolve() if arguments.bundle else None
    with tempfile.TemporaryDirectory(prefix="tdm-bench-") as scratch:
        try:
            result = run(
                plan,
                bundle=bundle,
                student=student.resolve(),
                peers=arguments.peers,
                scratch=Path(scratch),
                console=console,
            )
        except (BadReplyError, RuntimeError, aiohttp.ClientError, TimeoutError) as error:
            console.print(f"failed: {error!r}", markup=False)
            return 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(table(result))
    console.print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
