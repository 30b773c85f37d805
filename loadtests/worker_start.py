"""How long a worker takes from the start of its process to the first job that it has leased.

    python -m loadtests.worker_start                  shipped student; writes results/worker-start-cpu.json
    python -m loadtests.worker_start --bundle DIR     any bundle

`python -m server up` runs one worker. In each round the worker is killed and a job handed in, which waits in
the queue until the next worker process takes it. Every worker logs how old its process was when its imports
were done, its bundle loaded, every batch size run once, and its first job started, and how much CPU time it
had spent by then; those lines are read here.
The files are in the page cache: the first worker of the run, which is not counted, has read them.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from rich import box
from rich.console import Console
from rich.table import Table

from loadtests import machine
from loadtests.process import ROOT, ServerProcess, free_port

RESULT = ROOT / "loadtests" / "results" / "worker-start-cpu.json"
PHASES = {
    "imports": "Python, torch and the server imported",
    "load": "bundle checked and loaded",
    "warm_up": "every batch size run once",
    "first_job": "first waiting job leased and started",
}
KINDS = ("start_s", "cpu_s")
TIMEOUT_S = 300.0


class NoStartError(Exception):
    """A worker did not come, or did not finish its job."""


def read_log(log: Path) -> list[dict[str, Any]]:
    """The JSON lines among all that the server has written."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


Start = dict[str, dict[str, float]]
"""Age (`start_s`) and CPU time (`cpu_s`) of one worker process at the end of each phase, s."""


def starts(lines: Sequence[dict[str, Any]]) -> list[tuple[int, Start]]:
    """Process id and start of every worker that has come as far as its first job.

    Only one runs at a time, so its lines follow each other.
    """
    found: list[tuple[int, Start]] = []
    loaded: Start = {}
    pid = 0
    for line in lines:
        match line["message"]:
            case "loaded":
                loaded = {kind: line[kind] for kind in KINDS}
            case message if message.startswith("ready on "):
                pid = int(line["worker"].rsplit("-", 2)[1])
            case "first job":
                found.append((pid, {kind: {**loaded[kind], **line[kind]} for kind in KINDS}))
    return found


def wait_for_starts(log: Path, count: int) -> list[tuple[int, Start]]:
    """The starts, once there are `count`.

    Raises:
        NoStartError: there are not within TIMEOUT_S.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while len(found := starts(read_log(log))) < count:
        if time.monotonic() > deadline:
            raise NoStartError(f"{len(found)} of {count} workers have started a job; see {log}")
        time.sleep(0.05)
    return found


def hand_in(http: httpx.Client) -> str:
    """Have a job accepted that nobody waits for; its id."""
    answer = http.post("/v1/images", json={"prompt": "a large red sphere", "wait_s": 0})
    answer.raise_for_status()
    return str(answer.json()["id"])


def kill(pid: int) -> None:
    """SIGKILL, and wait for the end: a process that is only about to end may still be given a job.

    Raises:
        NoStartError: it does not end within TIMEOUT_S.
    """
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + TIMEOUT_S
    while Path(f"/proc/{pid}").exists():  # until its parent has noticed, which starts the next one
        if time.monotonic() > deadline:
            raise NoStartError(f"process {pid} does not end")
        time.sleep(0.01)


def check_drawn(http: httpx.Client, job_id: str) -> None:
    """Return when the job is completed.

    Raises:
        NoStartError: it failed, or was not within TIMEOUT_S.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while (status := http.get(f"/v1/images/{job_id}").json()["status"]) != "completed":
        if status == "failed" or time.monotonic() > deadline:
            raise NoStartError(f"job {job_id} is {status}")
        time.sleep(0.05)


def measure(bundle: Path | None, rounds: int, scratch: Path) -> list[Start]:
    """How `rounds` worker processes started.

    Raises:
        NoStartError: a worker did not come, or did not finish its job.
    """
    port, log = free_port(), scratch / "server.log"
    environment = {
        "TDM_HOST": "127.0.0.1",
        "TDM_PORT": str(port),
        "TDM_METRICS_PORT": "0",
        "TDM_DATA_DIR": str(scratch / "data"),
        "TDM_BUNDLES": str(bundle or ""),
        "TDM_REDIS_URL": "",
        "TDM_WORKERS": "1",
        "TDM_LOG_LEVEL": "info",
    }
    with ExitStack() as stack:
        server = stack.enter_context(
            ServerProcess(["server", "up"], port=port, log=log, environment=environment)
        )
        http = stack.enter_context(httpx.Client(base_url=server.base_url, trust_env=False, timeout=30.0))
        check_drawn(http, hand_in(http))
        for number in range(1, rounds + 1):
            pid, _ = wait_for_starts(log, number)[-1]
            kill(pid)
            job_id = hand_in(http)
            wait_for_starts(log, number + 1)
            check_drawn(http, job_id)
        return [start for _, start in starts(read_log(log))[1:]]


def print_table(found: Sequence[Start]) -> None:
    """Medians and extremes of every phase."""
    table = Table("a worker process, s after its start", "median", "least", "most", "CPU s", box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for phase, what in PHASES.items():
        ages = [one["start_s"][phase] for one in found]
        cpu_s = statistics.median(one["cpu_s"][phase] for one in found)
        table.add_row(what, *(f"{x:.2f}" for x in (statistics.median(ages), min(ages), max(ages), cpu_s)))
    Console(highlight=False).print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Returns:
        0, or 1 if a worker did not start.
    """
    parser = argparse.ArgumentParser(prog="python -m loadtests.worker_start", description=__doc__)
    parser.add_argument("--bundle", type=Path, help="a bundle; by default the shipped student's, built first")
    parser.add_argument("--rounds", type=int, default=5, help="worker processes to measure (default 5)")
    parser.add_argument("--scratch", type=Path, help="where the bundle is built and kept; by default nowhere")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    arguments = parser.parse_args(argv)
    about = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), **machine.describe()}
    with tempfile.TemporaryDirectory() as folder:
        scratch = arguments.scratch or Path(folder)
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "server.log").unlink(missing_ok=True)
        try:
            found = measure(arguments.bundle, arguments.rounds, scratch)
        except (NoStartError, httpx.HTTPError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    print_table(found)
    medians = {
        kind: {phase: round(statistics.median(one[kind][phase] for one in found), 2) for phase in PHASES}
        for kind in KINDS
    }
    told = {"unit": "s since the process started", "phases": PHASES, "median": medians, "rounds": found}
    arguments.out.write_text(json.dumps({**about, **told}, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
