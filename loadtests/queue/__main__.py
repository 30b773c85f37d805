"""Our queue against others that people use on Redis, with a null engine, measured in one run.

    python -m loadtests.queue                               about five minutes; writes results/queue-cpu.json
    python -m loadtests.queue --fsync always --seconds 2

In every round each queue gets a fresh embedded Valkey, one client process and one worker process; the queues
take turns (ours, peer, peer, peer, ours, ...), so that slow drift of the machine reaches all of them. Every
result is compared with the one that its job must have, and every job must have been executed, or the
benchmark fails; executions beyond one are counted.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from loadtests import machine
from loadtests.queue.contenders import NAMES, OURS, contender
from loadtests.queue.driver import Plan
from server.supervisor.valkey import EmbeddedValkey

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT = ROOT / "loadtests" / "results" / "queue-cpu.json"
ROUND_TIMEOUT_S = 300.0
FSYNC = ("always", "everysec")


class RoundFailedError(Exception):
    """A round ended without a result; the message holds the end of its output."""


def take_round(name: str, fsync: str, plan: Plan, scratch: Path) -> dict[str, Any]:
    """One queue on a fresh server.

    Raises:
        RoundFailedError: a job was lost or had a wrong result, or a process broke.
    """
    with (
        tempfile.TemporaryDirectory(dir=scratch) as folder,
        EmbeddedValkey(folder, appendfsync=fsync) as valkey,
    ):
        command = [sys.executable, "-m", "loadtests.queue.driver", name, valkey.url, folder]
        done = subprocess.run(
            [*command, json.dumps(asdict(plan))],
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
            timeout=ROUND_TIMEOUT_S,
        )
        if done.returncode != 0:
            log = Path(folder) / "worker.log"
            worker = log.read_text(errors="replace") if log.exists() else ""
            raise RoundFailedError(f"{name}, {fsync}:\n{worker[-2000:]}\n{done.stderr[-2000:]}")
        taken: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return taken


def fsync_ms(directory: Path, count: int = 200) -> float:
    """Median time to append 4 KiB to a file of `directory` and fsync it: what `always` pays."""
    block, spent_ms = b"x" * 4096, []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(count):
            file.write(block)
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            spent_ms.append((time.perf_counter() - start) * 1000)
    return round(statistics.median(spent_ms), 3)


def summary(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds; repeated executions summed up."""

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 3)

    return {
        "enqueued_per_s": median([one["enqueued_per_s"] for one in rounds]),
        "num_repeated": sum(one["num_repeated"] for one in rounds),
        "idle_p50_ms": median([one["idle"]["p50_ms"] for one in rounds]),
        "idle_p99_ms": median([one["idle"]["p99_ms"] for one in rounds]),
        "saturated": {
            level: {
                "jobs_per_s": median([one["saturated"][level]["jobs_per_s"] for one in rounds]),
                "p50_ms": median([one["saturated"][level]["latency"]["p50_ms"] for one in rounds]),
                "p99_ms": median([one["saturated"][level]["latency"]["p99_ms"] for one in rounds]),
            }
            for level in rounds[0]["saturated"]
        },
    }


def run(
    names: Sequence[str],
    fsyncs: Sequence[str],
    num_rounds: int,
    plan: Plan,
    *,
    scratch: Path,
    console: Console,
) -> dict[str, Any]:
    """Measure all queues in turns.

    Returns:
        The result as plain values: machine, versions, plan, rounds, medians, ratios to ours.
    Raises:
        RoundFailedError: as in `take_round`.
    """
    taken_on = machine.describe()
    taken_on["hardware"]["fsync_ms"] = fsync_ms(scratch)
    contenders = {name: contender(name) for name in names}
    for subject in contenders.values():
        for distribution in subject.distributions:
            taken_on["versions"][distribution] = importlib.metadata.version(distribution)
    rounds: dict[str, dict[str, list[dict[str, Any]]]] = {
        fsync: {name: [] for name in names} for fsync in fsyncs
    }
    for number, fsync, name in itertools.product(range(num_rounds), fsyncs, names):
        one = take_round(name, fsync, plan, scratch)
        rounds[fsync][name].append(one)
        rates = ", ".join(f"{level}: {taken['jobs_per_s']:.0f}" for level, taken in one["saturated"].items())
        console.print(
            f"round {number + 1}, {fsync}, {name}: {one['idle']['p50_ms']} ms idle, jobs/s at {rates}; "
            f"{one['num_jobs']} jobs checked, {one['num_repeated']} executions more",
            highlight=False,
        )
    medians = {
        fsync: {name: summary(taken) for name, taken in by_name.items()} for fsync, by_name in rounds.items()
    }
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        **taken_on,
        "plan": {**asdict(plan), "rounds": num_rounds},
        "contenders": {
            name: {"settings": dict(one.settings), "promises": asdict(one.promises)}
            for name, one in contenders.items()
        },
        "medians": medians,
        "times_ours": {fsync: _ratios(by_name) for fsync, by_name in medians.items()},
        "rounds": rounds,
    }


def _ratios(medians: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Our jobs/s as a multiple of each peer's, by number in flight."""
    if OURS not in medians:
        return {}
    ours = medians[OURS]["saturated"]
    return {
        name: {
            level: round(ours[level]["jobs_per_s"] / taken["jobs_per_s"], 2)
            for level, taken in peer["saturated"].items()
        }
        for name, peer in medians.items()
        if name != OURS
    }


def table(result: dict[str, Any]) -> Table:
    """The medians for people."""
    hardware, plan = result["hardware"], result["plan"]
    shown = Table(
        title=f"{hardware['cpu']}, {hardware['cores']} cores, commit {result['commit']}",
        caption=(
            f"medians of {plan['rounds']} alternating rounds; one client and one worker process each, null "
            f"engine; idle: one job at a time; a fsync took {hardware['fsync_ms']} ms (median)."
        ),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("fsync", "queue"):
        shown.add_column(heading, no_wrap=True)
    for heading in (
        "in\nflight",
        "jobs\nper s",
        "p50\nms",
        "p99\nms",
        "idle\np50 ms",
        "idle\np99 ms",
        "enq.\nper s",
    ):
        shown.add_column(heading, justify="right")
    for fsync, by_name in result["medians"].items():
        for name, medians in by_name.items():
            for level, taken in medians["saturated"].items():
                shown.add_row(
                    fsync,
                    name,
                    level,
                    f"{taken['jobs_per_s']:.0f}",
                    f"{taken['p50_ms']:.1f}",
                    f"{taken['p99_ms']:.1f}",
                    f"{medians['idle_p50_ms']:.2f}",
                    f"{medians['idle_p99_ms']:.2f}",
                    f"{medians['enqueued_per_s']:.0f}",
                )
        shown.add_section()
    return shown


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.queue", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--queues", nargs="+", choices=NAMES, default=NAMES, help="which (default: all)")
    parser.add_argument(
        "--fsync", nargs="+", choices=FSYNC, default=FSYNC, help="appendfsync (default: both)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each queue and fsync (default 3)")
    parser.add_argument("--seconds", type=float, default=3.0, help="saturated window (default 3)")
    parser.add_argument("--warm-up", type=float, default=0.5, help="seconds before that window (default 0.5)")
    parser.add_argument("--idle-seconds", type=float, default=2.0, help="jobs one by one (default 2)")
    parser.add_argument(
        "--in-flight", type=int, nargs="+", default=[64], help="saturation levels (default 64)"
    )
    parser.add_argument(
        "--jobs", type=int, default=500, help="enqueued before the worker starts (default 500)"
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="result file (default %(default)s)")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "data",
        help="where the servers write, on a real disk (default %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, print the table."""
    arguments = parse_arguments(argv)
    console = Console()
    plan = Plan(
        burst=arguments.jobs,
        idle_s=arguments.idle_seconds,
        warm_up_s=arguments.warm_up,
        seconds=arguments.seconds,
        in_flight=tuple(arguments.in_flight),
    )
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="queue-bench-", dir=arguments.scratch) as scratch:
        try:
            result = run(
                arguments.queues,
                arguments.fsync,
                arguments.rounds,
                plan,
                scratch=Path(scratch),
                console=console,
            )
        except (RoundFailedError, subprocess.TimeoutExpired) as error:
            console.print(f"failed: {error}", markup=False)
            return 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(table(result))
    console.print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
