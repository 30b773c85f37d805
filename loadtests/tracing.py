"""What tracing costs: the same server without and with it, in turns, in one run.

    python -m loadtests.tracing                      the shipped student
    python -m loadtests.tracing --bundle DIR         any bundle

With it means: every trace is recorded and sent to a collector on this machine, which reads what comes and
does nothing with it. It must have got spans, and the server must have dropped none, or there is no result.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import httpx
from rich.console import Console

from loadtests import machine, prompts
from loadtests.bench import RESULTS, Plan, Round, measure, student_of, summary
from loadtests.client import BadReplyError
from loadtests.contenders import OurServer
from loadtests.process import ROOT, free_port

OFF, ON = "without", "with"


class Sink(BaseHTTPRequestHandler):
    """Takes whatever is sent to it."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Read the body and answer that all is well; an empty message of OTLP is no bytes."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def serve_sink(port: int) -> None:
    """Be the collector; a process of its own, so that it takes no time from who measures."""
    ThreadingHTTPServer(("127.0.0.1", port), Sink).serve_forever()


@contextmanager
def sink() -> Iterator[str]:
    """A collector that runs meanwhile; its address."""
    port = free_port()
    command = [sys.executable, "-m", "loadtests.tracing", f"--sink={port}"]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def spans(metrics_port: int, num_workers: int) -> dict[str, float]:
    """Spans that the api and all workers have counted, by outcome."""
    counted: dict[str, float] = {}
    for port in range(metrics_port, metrics_port + 1 + num_workers):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=10.0).text
        for outcome, value in re.findall(
            r'^tdm_trace_spans_total{outcome="(\w+)"} (\S+)$', text, re.MULTILINE
        ):
            counted[outcome] = counted.get(outcome, 0.0) + float(value)
    return counted


def run(
    plan: Plan, *, bundle: Path | None, num_workers: int, scratch: Path, console: Console
) -> dict[str, Any]:
    """Measure in turns.

    Returns:
        The result as plain values: plan, machine, rounds, medians, what is left of the pictures per second.
    Raises:
        BadReplyError: a reply was not a picture.
        RuntimeError: a server did not start, or a span was dropped, or none came.
    """
    taken_on, bodies, metrics_port = machine.describe(), prompts.requests(seed=2), free_port()
    rounds: dict[str, list[Round]] = {OFF: [], ON: []}
    told: list[dict[str, float]] = []
    with sink() as collector:
        endpoints = {OFF: "", ON: collector}
        for number in range(plan.rounds):
            for name in (OFF, ON) if number % 2 == 0 else (ON, OFF):
                ours = OurServer(
                    bundle,
                    scratch,
                    workers=num_workers,
                    metrics_port=metrics_port,
                    otlp_endpoint=endpoints[name],
                )
                with ours.start() as server:
                    one = asyncio.run(measure(server, bodies, plan))
                    counted = spans(metrics_port, num_workers)
                rounds[name].append(one)
                if name == ON:
                    told.append(counted)
                per_s = one.saturated.pictures_per_s
                console.print(
                    f"round {number + 1}, {name}: {one.idle.p50_ms} ms idle, {per_s} pictures/s, {counted}"
                )
    if any(one.get("dropped") or not one.get("exported") for one in told):
        raise RuntimeError(f"the collector did not get all spans: {told}")
    medians = {name: summary(taken) for name, taken in rounds.items()}
    pairs = zip(rounds[ON], rounds[OFF], strict=True)
    ratios = [on.saturated.pictures_per_s / off.saturated.pictures_per_s for on, off in pairs]
    return {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        **taken_on,
        "plan": asdict(plan),
        "workers": num_workers,
        "spans": told,
        "rounds": {name: [asdict(one) for one in taken] for name, taken in rounds.items()},
        "medians": medians,
        "ratios_pictures_per_s": [round(ratio, 3) for ratio in ratios],
        "ratio_pictures_per_s": round(statistics.median(ratios), 3),
        "idle_p50_more_ms": round(medians[ON]["idle_p50_ms"] - medians[OFF]["idle_p50_ms"], 2),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result, print what it comes to."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.tracing", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--bundle", type=Path, help="bundle to serve (default: the shipped student)")
    add("--workers", type=int, default=2, help="worker processes (2)")
    add("--rounds", type=int, default=4, help="rounds of each (4)")
    add("--seconds", type=float, default=15.0, help="measured window at saturation (15)")
    add("--concurrency", type=int, default=32, help="clients at saturation (32)")
    add("--idle-requests", type=int, default=60, help="single requests a round (60)")
    add("--out", type=Path, default=RESULTS / "tracing-cpu.json", help="result file (default %(default)s)")
    add("--sink", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.sink is not None:
        serve_sink(arguments.sink)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    _, size = student_of(arguments.bundle)
    plan = Plan(
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        warm_up_s=min(3.0, arguments.seconds),
        concurrency=arguments.concurrency,
        idle_requests=arguments.idle_requests,
        compared_pictures=0,
        size=size,
    )
    bundle = arguments.bundle.resolve() if arguments.bundle else None
    with tempfile.TemporaryDirectory(prefix="tdm-tracing-") as scratch:
        try:
            result = run(
                plan, bundle=bundle, num_workers=arguments.workers, scratch=Path(scratch), console=console
            )
        except (BadReplyError, RuntimeError, aiohttp.ClientError, httpx.HTTPError, TimeoutError) as error:
            console.print(f"failed: {error!r}")
            return 1
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"with tracing {result['ratio_pictures_per_s']:g} times the pictures/s, medians {result['medians']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
