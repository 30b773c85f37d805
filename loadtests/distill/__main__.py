"""One training iteration of TDM for each full-size backbone: seconds, TFLOP/s, peak memory, projected hours.

    python -m loadtests.distill                       on CUDA the published sizes, on the CPU shrunk ones
    python -m loadtests.distill --only pixart-1024    one backbone; others in the result file stay

Weights and prompts are random; trainer, roles and configs are the product's. Beside it, in the same run, peak
memory of a naive implementation with three float32 networks, of our trainer with three networks, and with
adapters on one. Every measurement is a process of its own. Where a batch does not fit the GPU it is halved.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from engines.distill.config import DistillConfig, read_config
from loadtests import machine
from loadtests.distill import report
from loadtests.distill.backbones import BACKBONES, Backbone
from loadtests.distill.flops import TERA
from loadtests.distill.measure import VARIANTS, Request, Variant, count, ready_variant

RESULTS = machine.ROOT / "loadtests" / "results"


class MeasurementError(Exception):
    """A measuring process broke; the message holds the end of its output."""


def take(request: Request) -> dict[str, Any]:
    """Measure in a process of its own.

    Raises:
        MeasurementError: it broke.
    """
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.distill.measure", json.dumps(asdict(request))],
        cwd=machine.ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise MeasurementError(
            f"{request.backbone}, {request.variant}, batch {request.batch_size}: exit status "
            f"{done.returncode}\n{done.stderr[-2000:]}"
        )
    taken: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return taken


def take_until_it_fits(request: Request) -> Iterator[dict[str, Any]]:
    """Measure; where memory does not suffice, again with half the batch, until it does."""
    while True:
        run = take(request)
        yield run
        if run["fits"] or run["batch_size"] == 1:
            return
        request = replace(request, batch_size=run["batch_size"] // 2)


def measure_backbone(
    backbone: Backbone, request: Request, variants: Sequence[Variant], commit: str, console: Console
) -> dict[str, Any]:
    """All measurements of one backbone.

    Args:
        request: of its own config; the other variants take one iteration after one of warm-up.

    Raises:
        MeasurementError: the measuring process of its own config broke; errors of others are in `failed`.
    """
    load_before = machine.hardware()["load_before"]
    ready = request.variant
    batch_size = _config_batch_size(request)
    runs: list[dict[str, Any]] = []
    failed: dict[str, str] = {}

    def keep(taken: Iterator[dict[str, Any]]) -> None:
        for run in taken:
            console.print(_line(run), highlight=False)
            runs.append(run)

    def compare(variant: Variant, taken: Iterator[dict[str, Any]]) -> None:
        try:
            keep(taken)
        except MeasurementError as error:
            console.print(f"failed: {error}", markup=False)
            failed[variant] = str(error)

    keep(take_until_it_fits(request))
    iteration = runs[-1]
    short = replace(request, warm_up=min(1, request.warm_up), iterations=1)
    for variant in variants:
        if variant != ready:
            compare(variant, take_until_it_fits(replace(short, variant=variant)))
    fitting = {run["variant"]: run["batch_size"] for run in runs if run["fits"]}
    common = min(fitting.values(), default=1)
    for variant, fits in fitting.items():
        if fits > common:
            compare(variant, take_until_it_fits(replace(short, variant=variant, batch_size=common)))
    return {
        "title": backbone.title,
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "load_before": load_before,
        "ready_variant": ready,
        "config_batch_size": batch_size,
        "common_batch_size": common,
        "iteration": iteration,
        **_rates(iteration, request),
        "projected": None if request.toy else _projected(backbone, iteration, batch_size),
        "memory": runs,
        "failed": failed,
        "full_size": _full_size(backbone, ready),
    }


def _config_batch_size(request: Request) -> int:
    backbone = BACKBONES[request.backbone]
    return read_config(backbone.config, backbone.size(toy=request.toy).settings).batch_size


def _line(run: Mapping[str, Any]) -> str:
    what = f"{run['backbone']}, {run['variant']}, batch {run['batch_size']}"
    if not run["fits"]:
        return f"{what}: does not fit ({run['error']})"
    return (
        f"{what}: {run['seconds']['median']:.3g} s per iteration (median of {run['seconds']['count']}), peak "
        f"{run['memory']['peak_gib']:.3g} GiB"
    )


def _rates(iteration: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """TFLOP of the iterations that were timed, on average, and per second."""
    if not iteration["fits"]:
        return {"tflop_per_iteration": None, "tflop_per_s": None, "tflop_per_s_with_recomputation": None}
    row, _, _ = count(request.backbone, request.variant, toy=request.toy)
    flops = [row.iteration(rows) for rows in iteration["rows"]]
    again = [row.recomputed * (rows["student"] + rows["fake_score"]) for rows in iteration["rows"]]
    seconds = iteration["seconds"]["mean"] * len(flops)
    return {
        "tflop_per_iteration": _rounded(sum(flops) / len(flops) / TERA),
        "tflop_per_s": _rounded(sum(flops) / seconds / TERA),
        "tflop_per_s_with_recomputation": _rounded((sum(flops) + sum(again)) / seconds / TERA),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _projected(backbone: Backbone, iteration: Mapping[str, Any], batch_size: int) -> dict[str, Any] | None:
    """Hours for all iterations; none for another batch than the config's."""
    if not iteration["fits"] or iteration["batch_size"] != batch_size:
        return None
    iterations = backbone.paper_iterations or read_config(backbone.config).iterations
    return {
        "hours": round(iteration["seconds"]["mean"] * iterations / 3600, 3),
        "iterations": iterations,
        "source": "the config's" if backbone.paper_iterations is None else "the paper's",
    }


def _full_size(backbone: Backbone, variant: Variant) -> dict[str, Any]:
    """Counted, not measured: the published size with the shipped config."""
    row, config, bucket = count(backbone.name, variant, toy=False)
    rows = expected_rows(config)
    return {
        "parameters_m": round(row.parameters / 1e6, 2),
        "trained_m": round(row.trained / 1e6, 2),
        "bucket": bucket.label,
        "batch_size": config.batch_size,
        "forward_tflop": _rounded(row.learner / TERA),
        "iteration_tflop": _rounded(row.iteration(rows) / TERA),
        "recomputed_tflop": _rounded(row.recomputed * (rows["student"] + rows["fake_score"]) / TERA),
    }


def expected_rows(config: DistillConfig) -> dict[str, float]:
    """Mean number of rows that each part of an iteration computes, see `flops.RowFlops.iteration`."""
    weight = sum(config.num_steps.values())
    rolled_out = sum(share * (steps - 1) / 2 for steps, share in config.num_steps.items()) / weight
    guided = config.objective.guidance_scale != 1.0
    per_row = {
        "rollout": rolled_out,
        "student": 1.0,
        "fake_score": float(config.fake_updates),
        "fake_query": 1.0,
        "teacher": 1.0 + guided + config.fake_updates * (config.objective.fake_anchor > 0.0),
    }
    return {part: rows * config.batch_size for part, rows in per_row.items()}


def kept_from(path: Path, taken_on: Mapping[str, Any]) -> dict[str, Any]:
    """Backbones of an earlier result of the same hardware and versions."""
    if not path.is_file():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    same = all(earlier["hardware"][key] == taken_on["hardware"][key] for key in ("cpu", "gpus"))
    backbones: dict[str, Any] = earlier["backbones"]
    return backbones if same and earlier["versions"] == taken_on["versions"] else {}


def write(result: dict[str, Any], out: Path) -> None:
    """Write JSON, and beside it the tables and the chart."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(report.markdown(result), encoding="utf-8")
    report.draw_chart(result, out.with_suffix(".png"))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.distill", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda: published sizes; cpu: shrunk networks of the same classes (default here %(default)s)",
    )
    parser.add_argument("--only", nargs="+", choices=tuple(BACKBONES), help="which backbones (default: all)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="to compare with (default: all)"
    )
    parser.add_argument("--batch-size", type=int, help="instead of the config's; no hours are projected")
    parser.add_argument("--warm-up", type=int, default=2, help="iterations before measuring (default 2)")
    parser.add_argument("--iterations", type=int, default=5, help="measured ones at most (default 5)")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="no further iteration is started after this (default 90)"
    )
    parser.add_argument("--commit", help="what to record where there is no git (default: asks git)")
    parser.add_argument(
        "--out", type=Path, help="result file (default loadtests/results/distill-DEVICE.json)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write after every backbone, print the tables."""
    arguments = parse_arguments(argv)
    console = Console()
    toy = arguments.device == "cpu"
    out = arguments.out or RESULTS / f"distill-{arguments.device}.json"
    taken_on = machine.describe()
    commit = arguments.commit or taken_on["commit"]
    del taken_on["commit"]  # each backbone has its own
    measured = kept_from(out, taken_on)
    if toy:
        console.print("CPU: shrunk networks of the same classes; their numbers say nothing of the full sizes")
    broken = False
    for name in arguments.only or BACKBONES:
        request = Request(
            backbone=name,
            variant=ready_variant(name),
            device=arguments.device,
            toy=toy,
            batch_size=arguments.batch_size,
            warm_up=arguments.warm_up,
            iterations=arguments.iterations,
            time_limit_s=arguments.seconds,
        )
        try:
            measured[name] = measure_backbone(BACKBONES[name], request, arguments.variants, commit, console)
        except MeasurementError as error:
            console.print(f"failed: {error}", markup=False)
            broken = True
            continue
        broken = broken or bool(measured[name]["failed"])
        result = {
            **taken_on,
            "device": arguments.device,
            "toy": toy,
            "backbones": {key: measured[key] for key in BACKBONES if key in measured},
        }
        write(result, out)
    if out.is_file():
        console.print(out.with_suffix(".md").read_text(encoding="utf-8"), markup=False, soft_wrap=True)
        console.print(f"written to {out}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
