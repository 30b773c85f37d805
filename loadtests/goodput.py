"""Goodput: how many pictures come in time while requests come at random moments, server beside server.

    python -m loadtests.goodput --peers lock litserve litserve-engine
    python -m loadtests.goodput --rates 20 60 100 --seconds 10 --slo 0.5

An open loop: nobody waits for an answer before the next one asks, as visitors do not. Each server meets each
rate alone on the machine and freshly started, so that what one rate has left undone burdens no other. Beyond
its capacity a server that takes everything answers everybody late; one that refuses what it could not draw in
time goes on to serve the others. Ours is told the promise as its deadline (TDM_JOB_DEADLINE_S).
"""

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from loadtests import machine, prompts
from loadtests.bench import RESULTS, student_of
from loadtests.client import LoadClient, Reply
from loadtests.contenders import PEERS, Contender, MeasuredServer, OurServer, rivals

REFUSALS = (429, 503)
HOPELESS = 0.05
"""A server that answers a smaller share of its requests in time meets no higher rate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every server meets.

    Attributes:
        rates: requests per second, rising.
        seconds: of each rate.
        warm_up_s: of a closed loop before it.
        slo_s: a picture is in time within so much.
        patience_s: for the last answers.
        size: width and height of the pictures.
        seed: of moments and prompts.
    """

    rates: Sequence[float]
    seconds: float
    warm_up_s: float
    slo_s: float
    patience_s: float
    size: tuple[int, int]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One server at one rate; shares are of all requests.

    Attributes:
        goodput_per_s: pictures in time.
        late: answered with a picture, but not in time, or not at all.
        refused: told at once to come back later.
        failed: answered with anything else.
        p50_ms, p99_ms: of the pictures; None where there was none.
    """

    rate_per_s: float
    goodput_per_s: float
    late: float
    refused: float
    failed: float
    p50_ms: float | None
    p99_ms: float | None
    cpu_ms_per_picture: float | None
    memory_mib: float


def judge(replies: Sequence[Reply], plan: Plan, rate_per_s: float, cpu_s: float, memory_bytes: int) -> Step:
    """What came of one rate.

    Args:
        replies: to at least one request.
        cpu_s: what the server has used for them.
        memory_bytes: what it holds in the end.

    Raises:
        BadReplyError: an answer that says it is a picture is none.
    """
    drawn = [reply for reply in replies if reply.status == 200]
    for reply in drawn:
        reply.picture(plan.size)
    latencies = sorted(reply.latency_ms for reply in drawn)
    in_time = sum(latency <= 1000 * plan.slo_s for latency in latencies)
    refused = sum(reply.status in REFUSALS for reply in replies)
    unanswered = sum(reply.status == 0 for reply in replies)

    def percentile(percent: int) -> float | None:
        return round(latencies[len(latencies) * percent // 100], 1) if latencies else None

    return Step(
        rate_per_s=rate_per_s,
        goodput_per_s=round(in_time / plan.seconds, 2),
        late=round((len(drawn) - in_time + unanswered) / len(replies), 4),
        refused=round(refused / len(replies), 4),
        failed=round((len(replies) - len(drawn) - refused - unanswered) / len(replies), 4),
        p50_ms=percentile(50),
        p99_ms=percentile(99),
        cpu_ms_per_picture=round(1000 * cpu_s / len(drawn), 2) if drawn else None,
        memory_mib=round(memory_bytes / 2**20, 1),
    )


async def meet(
    server: MeasuredServer, rate_per_s: float, bodies: Iterator[dict[str, Any]], plan: Plan
) -> Step:
    """One rate at a server that is ready."""
    async with LoadClient(server.base_url, size=plan.size) as client:
        await client.saturate(bodies, concurrency=16, warm_up_s=0.0, seconds=plan.warm_up_s)
        before = server.usage()
        replies = await client.offer(
            bodies,
            rate_per_s=rate_per_s,
            seconds=plan.seconds,
            patience_s=plan.patience_s,
            seed=plan.seed,
        )
        after = server.usage()
    return judge(
        replies,
        plan,
        rate_per_s,
        sum(after.cpu_s.values()) - sum(before.cpu_s.values()),
        after.memory_bytes,
    )


async def capacity(server: MeasuredServer, bodies: Iterator[dict[str, Any]], plan: Plan) -> float:
    """Pictures/s of 32 clients in a closed loop: what settings are chosen by."""
    async with LoadClient(server.base_url, size=plan.size) as client:
        await client.saturate(bodies, concurrency=32, warm_up_s=0.0, seconds=plan.warm_up_s)
        found = await client.saturate(bodies, concurrency=32, warm_up_s=0.0, seconds=plan.seconds / 2)
    return found.pictures_per_s


def run(
    plan: Plan, contenders: Sequence[Sequence[Contender]], console: Console
) -> dict[str, list[dict[str, Any]]]:
    """The steps of each contender, by its name; of several settings those of the fastest.

    Raises:
        BadReplyError: an answer that says it is a picture is none.
        RuntimeError: a server did not start.
    """
    bodies = prompts.requests(plan.seed)
    chosen: list[Contender] = []
    for settings in contenders:
        found: list[float] = []
        for contender in settings if len(settings) > 1 else ():
            with contender.start() as server:
                found.append(asyncio.run(capacity(server, bodies, plan)))
            console.print(f"{contender.name}: {found[-1]} pictures/s in a trial")
        chosen.append(settings[found.index(max(found))] if found else settings[0])

    steps: dict[str, list[Step]] = {contender.name: [] for contender in chosen}
    for rate_per_s, contender in itertools.product(plan.rates, chosen):
        done = steps[contender.name]
        if done and done[-1].goodput_per_s < HOPELESS * done[-1].rate_per_s:
            continue
        with contender.start() as server:
            done.append(asyncio.run(meet(server, rate_per_s, bodies, plan)))
        console.print(f"{rate_per_s:g}/s, {contender.name}: {done[-1].goodput_per_s} in time")
    return {name: [asdict(step) for step in done] for name, done in steps.items()}


def draw(result: dict[str, Any], path: Path) -> None:
    """Goodput and latency over the rate."""
    from matplotlib.figure import Figure

    slo_ms = 1000 * result["plan"]["slo_s"]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    goodput, latency = figure.subplots(1, 2)
    rates = result["plan"]["rates"]
    goodput.plot(rates, rates, color="grey", linestyle=":", label="all that is asked for")
    for name, steps in result["steps"].items():
        asked = [step["rate_per_s"] for step in steps]
        goodput.plot(asked, [step["goodput_per_s"] for step in steps], marker="o", label=name)
        latency.plot(asked, [step["p99_ms"] for step in steps], marker="o")
    goodput.set_ylabel(f"pictures/s within {slo_ms:g} ms")
    goodput.legend(fontsize="small")
    latency.set_ylabel("p99 of the pictures, ms")
    latency.set_yscale("log")
    latency.axhline(slo_ms, color="grey", linestyle=":")
    for axes in (goodput, latency):
        axes.set_xlabel("requests/s, at random moments")
    figure.savefig(path, dpi=110)


def table(result: dict[str, Any]) -> Table:
    """One row a server and rate."""
    hardware, plan = result["hardware"], result["plan"]
    shown = Table(
        title=f"{hardware['cpu']}, {hardware['cores']} cores, commit {result['commit']}",
        caption=f"{plan['seconds']:g} s of each rate; in time: within {plan['slo_s']:g} s",
        box=box.SIMPLE_HEAD,
    )
    shown.add_column("server", min_width=10)
    for heading in (
        "asked\n/s",
        "in time\n/s",
        "late\n%",
        "refused\n%",
        "p50\nms",
        "p99\nms",
        "CPU\nms/image",
        "memory\nMiB",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, steps in result["steps"].items():
        for step in steps:
            values = (step["p50_ms"], step["p99_ms"], step["cpu_ms_per_picture"])
            shown.add_row(
                name,
                f"{step['rate_per_s']:g}",
                f"{step['goodput_per_s']:.1f}",
                *(f"{100 * share:.1f}" for share in (step["late"] + step["failed"], step["refused"])),
                *("-" if value is None else f"{value:.0f}" for value in values),
                f"{step['memory_mib']:.0f}",
            )
    return shown


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    first_line = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m loadtests.goodput", description=first_line)
    add = parser.add_argument
    add("--bundle", type=Path, help="bundle to serve (default: the shipped student)")
    add("--peers", nargs="*", choices=PEERS, default=["lock"], help="as of loadtests.bench (lock)")
    add(
        "--rates",
        nargs="+",
        type=float,
        default=[20, 40, 60, 80, 100, 120, 140],
        help="requests/s (20 to 140)",
    )
    add("--seconds", type=float, default=15.0, help="of each rate (15)")
    add("--warm-up", type=float, default=3.0, help="seconds of a closed loop before it (3)")
    add("--slo", type=float, default=1.0, help="seconds within which a picture is in time (1)")
    add("--seed", type=int, default=4, help="of moments and prompts (4)")
    add("--out", type=Path, default=RESULTS / "goodput-cpu.json", help="JSON; the picture lies beside it")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, draw and write."""
    arguments = parse_arguments(argv)
    console = Console()
    student, size = student_of(arguments.bundle)
    plan = Plan(
        rates=sorted(arguments.rates),
        seconds=arguments.seconds,
        warm_up_s=arguments.warm_up,
        slo_s=arguments.slo,
        patience_s=5 * arguments.slo,
        size=size,
        seed=arguments.seed,
    )
    taken_on, began_s = machine.describe(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tdm-goodput-") as folder:
        scratch = Path(folder)
        bundle = arguments.bundle.resolve() if arguments.bundle else None
        if bundle is None:
            first = OurServer(None, scratch)
            with first.start():
                bundle = first.built_bundle()
        ours = OurServer(bundle, scratch, job_deadline_s=plan.slo_s)
        others = rivals(arguments.peers, student=student.resolve(), bundle=bundle, scratch=scratch)
        steps = run(plan, [[ours], *others.values()], console)
    result = {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        **taken_on,
        "took_s": round(time.monotonic() - began_s, 1),
        "plan": asdict(plan),
        "steps": steps,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw(result, arguments.out.with_suffix(".png"))
    console.print(table(result))
    console.print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
