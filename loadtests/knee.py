"""What `python -m server plan` promises against what a server does: the knee of k6's `image_ramp`.

    python -m loadtests.knee BUNDLE                  one worker; the rest of the machine is the api's and k6's

The plan says at which rate that many workers keep the promise. The ramp's stairs are percentages of that
rate, so its knee, the last stair on which everybody gets a picture in time, tells how far off it is. Before
each ramp 32 clients in a closed loop keep the server busy: how much of the time its engines ran, what an
output took them, and at which pace, says why; at that pace it is planned once more.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from rich.console import Console

from loadtests import machine, prompts
from loadtests.bench import RESULTS
from loadtests.client import LoadClient
from loadtests.contenders import OurServer
from loadtests.lib.outcome import knee
from loadtests.process import ROOT, ServerProcess, free_port

CLIENTS = 32
SATURATED_S = 10.0
ENGINE = (
    "tdm_gpu_busy_seconds_total",
    "tdm_output_engine_seconds_count",
    "tdm_batch_size_count",
    "tdm_engine_pace_ratio",
)
ETA_WITHIN = (0.8, 1.2)
"""Edges of `tdm_eta_ratio` between which a prediction counts as kept."""


def planned(
    bundle: Path, num_workers: int, slo_s: float, beside_ms: float, pace: float = 1.0
) -> dict[str, Any]:
    """What the plan says of so many workers: an object, `python -m server plan --json`."""
    command = [
        sys.executable,
        "-m",
        "server",
        "plan",
        str(bundle),
        f"--workers={num_workers}",
        f"--slo={slo_s}",
    ]
    command += [f"--beside-ms={beside_ms}", f"--pace={pace}", "--json"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def counted(metrics_port: int, num_workers: int) -> list[float]:
    """Sums over all workers of what `ENGINE` names."""
    sums = [0.0] * len(ENGINE)
    for port in range(metrics_port + 1, metrics_port + 1 + num_workers):
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False, timeout=10.0).text
        for place, name in enumerate(ENGINE):
            values = re.findall(rf"^{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
            sums[place] += sum(map(float, values))
    return sums


def predictions(metrics_port: int) -> tuple[float, float]:
    """Requests so far whose time was within `ETA_WITHIN` of what was predicted, and all of them."""
    text = httpx.get(f"http://127.0.0.1:{metrics_port}/metrics", trust_env=False, timeout=10.0).text

    def below(edge: str) -> float:
        values = re.findall(rf'^tdm_eta_ratio_bucket{{[^}}]*le="{edge}"[^}}]*}} (\S+)$', text, re.MULTILINE)
        return sum(map(float, values))

    early, late = (below(re.escape(str(edge))) for edge in ETA_WITHIN)
    return late - early, below(re.escape("+Inf"))


async def saturated(server: ServerProcess, size: tuple[int, int], metrics_port: int, num_workers: int) -> Any:
    """What a closed loop gets, and what the engines do meanwhile."""
    bodies = prompts.requests(seed=5)
    async with LoadClient(server.base_url, size=size) as client:
        await client.saturate(bodies, concurrency=CLIENTS, warm_up_s=1.0, seconds=2.0)
        before = await asyncio.to_thread(counted, metrics_port, num_workers)
        kept_before, asked_before = await asyncio.to_thread(predictions, metrics_port)
        found = await client.saturate(bodies, concurrency=CLIENTS, warm_up_s=0.0, seconds=SATURATED_S)
        after = await asyncio.to_thread(counted, metrics_port, num_workers)
        kept, asked = await asyncio.to_thread(predictions, metrics_port)
    busy_s, outputs, batches, _ = (late - early for early, late in zip(before, after, strict=True))
    return {
        "pictures_per_s": found.pictures_per_s,
        "busy": round(busy_s / found.seconds / num_workers, 3),
        "engine_ms_per_picture": round(1000 * busy_s / outputs, 3),
        "mean_batch": round(outputs / batches, 2),
        "pace": round(after[-1] / num_workers, 3),
        "eta_within_20_percent": round((kept - kept_before) / (asked - asked_before), 3),
    }


def ramp(server: ServerProcess, rate_per_s: float, seconds: float, slo_s: float, out: Path) -> dict[str, Any]:
    """k6's `image_ramp` in percent of a rate: its stairs and what was wrong."""
    command = [sys.executable, "-m", "loadtests.load", "--scenario=image_ramp", f"--capacity={rate_per_s}"]
    command += [f"--seconds={seconds}", f"--slo-ms={1000 * slo_s}", f"--out={out}"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "BASE_URL": server.base_url}, check=False)
    told: dict[str, Any] = json.loads((out / "image_ramp.json").read_text(encoding="utf-8"))
    return {"stairs": told["stairs"], "problems": told["problems"]}


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, measure, write the result, print what it comes to."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.knee", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("bundle", type=Path, help="what is served, and whose latency table counts")
    add("--workers", type=int, default=1, help="worker processes (1)")
    add("--slo", type=float, default=2.0, help="seconds within which 95 of 100 are to have a picture (2)")
    add("--beside-ms", type=float, default=10.0, help="as of `server plan` (10)")
    add("--seconds", type=float, default=240.0, help="length of a ramp of twelve stairs (240)")
    add("--rounds", type=int, default=3, help="ramps (3)")
    add("--out", type=Path, default=RESULTS / "plan-cpu.json", help="result file (default %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    bundle = arguments.bundle.resolve()
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    height, width = (int(part) for part in manifest["buckets"][0].split("x"))
    taken_on, metrics_port = machine.describe(), free_port()
    plan = planned(bundle, arguments.workers, arguments.slo, arguments.beside_ms)
    rate_per_s = plan["requests_per_s"]
    console.print(f"planned: {rate_per_s:.1f} requests/s, {plan['fleets'][-1]}")
    rounds = []
    with tempfile.TemporaryDirectory(prefix="tdm-knee-") as scratch:
        for number in range(arguments.rounds):
            ours = OurServer(bundle, Path(scratch), workers=arguments.workers, metrics_port=metrics_port)
            with ours.start() as server:
                busiest = asyncio.run(saturated(server, (width, height), metrics_port, arguments.workers))
                found = ramp(server, rate_per_s, arguments.seconds, arguments.slo, Path(scratch) / "load")
            at = knee(found["stairs"], 1000 * arguments.slo)
            best = max(one["drawn_per_s"] for one in found["stairs"])
            rounds.append({"saturated": busiest, **found, "knee_per_s": at, "best_per_s": best})
            console.print(f"round {number + 1}: {busiest}; knee {at:g}, best {best:g} pictures/s")
    knee_per_s = median(one["knee_per_s"] for one in rounds)
    pace = median(one["saturated"]["pace"] for one in rounds)
    paced = planned(bundle, arguments.workers, arguments.slo, arguments.beside_ms, pace)
    result = {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        **taken_on,
        "bundle": {"name": manifest["name"], "version": manifest["version"]},
        "workers": arguments.workers,
        "slo_s": arguments.slo,
        "seconds": arguments.seconds,
        "beside_ms": arguments.beside_ms,
        "plan": plan,
        "pace": pace,
        "plan_at_pace": paced,
        "rounds": rounds,
        "knee_per_s": knee_per_s,
        "plan_of_knee": round(rate_per_s / knee_per_s, 3) if knee_per_s else None,
        "plan_at_pace_of_knee": round(paced["requests_per_s"] / knee_per_s, 3) if knee_per_s else None,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"planned {rate_per_s:.1f}/s, at pace {pace:g} {paced['requests_per_s']:.1f}/s; "
        f"median knee {knee_per_s:g}/s: {result['plan_of_knee']}, {result['plan_at_pace_of_knee']}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
