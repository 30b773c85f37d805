"""The GPU benchmark: our bundles beside diffusers' own pipelines, at the published sizes, in one run.

Every number is written when it is measured, and what is in the result already is not measured again: a run
that was cut off goes on where it was. A result is of one machine and one set of versions.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from engines.bench.cell import Contender, Request, bundle_of
from engines.bench.flops import count_flops
from engines.bench.models import MODELS, NUM_STEPS, Model
from engines.bundle.platform import Device, available_cores, current_platform
from engines.compile.bench import current_commit
from engines.compile.settings import Precision
from engines.errors import CompileError
from engines.files import atomic_write
from engines.runtime.timing import median_ms

TERA = 1e12
LIBRARIES = ("torch", "diffusers", "transformers", "triton", "safetensors")
MATMUL_SIDE = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuBench:
    """What to measure.

    Attributes:
        models: names in `MODELS`.
        contenders: backends.
        batches: sizes; empty for each model's own.
        precision: of ours and of diffusers.
        toy: shrunk models, for a CPU or a quick check.
        out: JSON that is written, and gone on with.
        work: folder for checkpoints and bundles.
        seconds: time per number.
        minutes: no measurement is started after this long.
        static: batch sizes that get packages of their own.
        commit: of the source; by default git is asked.
    """

    models: Sequence[str]
    contenders: Sequence[Contender]
    batches: Sequence[int]
    precision: Precision
    toy: bool
    out: Path
    work: Path
    seconds: float
    minutes: float
    static: Sequence[int] = ()
    commit: str | None = None

    @property
    def device(self) -> Device:
        """A GPU, or for a check of shrunk models whatever there is."""
        return "cuda" if torch.cuda.is_available() else "cpu"


def run_gpu_bench(bench: GpuBench, console: Console) -> dict[str, Any]:
    """Measure what is missing from the result.

    Returns:
        The result as it was written.

    Raises:
        CompileError: there is no GPU and `toy` is off, or the result is of another machine or of other
            versions.
    """
    if bench.device == "cpu" and not bench.toy:
        raise CompileError("--gpu: torch sees no GPU here; --toy checks the benchmark on a CPU")
    deadline = time.monotonic() + 60 * bench.minutes
    result = open_result(bench)
    if result["matmul"] is None:
        result["matmul"] = matmul_ceiling(bench.device)
        _write(bench.out, result)
    _say(console, f"a matrix product reaches {result['matmul']['tflop_per_s']:.4g} TFLOP/s")
    for name in bench.models:
        model = MODELS[name]
        entry = result["models"].setdefault(
            name,
            {
                "title": model.title,
                "unit": model.unit,
                "bucket": model.architecture(toy=bench.toy).bucket.label,
                "num_steps": NUM_STEPS,
                "flops": count_flops(model, toy=bench.toy),
                "about": {},
                "backends": {},
                "failed": {},
                "worker_start": None,
            },
        )
        for contender in bench.contenders:
            _measure_backend(bench, model, contender, result, deadline, console)
        built = bool(entry["backends"].get("aotinductor"))
        if built and entry["worker_start"] is None and time.monotonic() < deadline:
            entry["worker_start"] = worker_start(bench, model)
            _write(bench.out, result)
    return result


def open_result(bench: GpuBench) -> dict[str, Any]:
    """The result that is there, or an empty one.

    Raises:
        CompileError: it is of something else.
    """
    described = describe(bench)
    if not bench.out.is_file():
        return {**described, "matmul": None, "models": {}}
    result: dict[str, Any] = json.loads(bench.out.read_text(encoding="utf-8"))
    for field in ("hardware", "versions", "toy", "precision"):
        if result.get(field) != described[field]:
            raise CompileError(
                f"--out {bench.out}: field {field} is {result.get(field)}, here {described[field]}; choose "
                "another file"
            )
    return result


def describe(bench: GpuBench) -> dict[str, Any]:
    """Everything needed to judge the numbers."""
    platform = current_platform(bench.device)
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "hardware": {
            "gpu": platform.gpu,
            "compute_capability": platform.compute_capability,
            "driver": platform.driver,
            "cpu": platform.cpu,
            "cores": available_cores(),
        },
        "versions": {
            **versions,
            "torch": torch.__version__,
            "cuda": platform.cuda,
            "python": platform.python,
        },
        "commit": bench.commit or current_commit(),
        "toy": bench.toy,
        "precision": bench.precision,
    }


def matmul_ceiling(device: Device) -> dict[str, Any]:
    """How fast one large product of matrices is: in bfloat16 on a GPU, in float32 on a CPU."""
    side = MATMUL_SIDE[device]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    ms = median_ms(lambda: a @ b, 1.0, device)
    return {
        "side": side,
        "dtype": str(dtype).removeprefix("torch."),
        "ms": round(ms, 4),
        "tflop_per_s": 2 * side**3 / ms * 1e3 / TERA,
    }


def _measure_backend(
    bench: GpuBench,
    model: Model,
    contender: Contender,
    result: dict[str, Any],
    deadline: float,
    console: Console,
) -> None:
    entry = result["models"][model.name]
    cells = entry["backends"].setdefault(contender, {})
    wanted = tuple(bench.batches) or model.architecture(toy=bench.toy).batches
    missing = [batch for batch in wanted if str(batch) not in cells]
    if not missing or time.monotonic() >= deadline:
        return
    request = Request(
        model=model.name,
        backend=contender,
        device=bench.device,
        toy=bench.toy,
        precision=bench.precision,
        batches=missing,
        all_batches=sorted({*wanted, *model.architecture(toy=bench.toy).batches}),
        work=str(bench.work.resolve()),
        seconds=bench.seconds,
        static=bench.static,
    )
    entry["failed"].pop(contender, None)
    _say(console, f"{model.name}, {contender}: batches {', '.join(map(str, missing))}")
    try:
        for row in _lines_of(request, deadline):
            if "about" in row:  # a bundle is built once; how long that took stays
                entry["about"][contender] = {**entry["about"].get(contender, {}), **row["about"]}
                continue
            cell = with_rates(row, entry["flops"], result["matmul"]["tflop_per_s"], bench)
            cells[str(row["batch"])] = cell
            _write(bench.out, result)
            _say(console, f"  {line(cell, entry['unit'])}")
    except CellError as error:
        entry["failed"][contender] = str(error)
        _write(bench.out, result)
        _say(console, f"  failed: {str(error).strip().splitlines()[-1]}")


class CellError(Exception):
    """A measuring process broke; the message holds the end of its output."""


def _lines_of(request: Request, deadline: float) -> Iterator[dict[str, Any]]:
    """Rows of a measuring process as they come.

    Raises:
        CellError: it broke, or the time is over.
    """
    log = Path(request.work) / f"{request.model}-{request.backend}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "engines.bench.cell", json.dumps(asdict(request))],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for text in process.stdout:
                if text.startswith("{"):
                    yield json.loads(text)
                if time.monotonic() >= deadline:
                    process.terminate()
                    raise CellError("the time is over; the next run goes on here")
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.terminate()
    if process.returncode != 0:
        raise CellError(f"exit status {process.returncode}: {log.read_text(encoding='utf-8')[-2000:]}")


def with_rates(
    row: Mapping[str, Any], flops: Mapping[str, int], ceiling: float, bench: GpuBench
) -> dict[str, Any]:
    """A measured row with what follows from its time: samples and TFLOP per second, share of the ceiling."""
    cell = {
        **row,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": bench.commit or current_commit(),
    }
    if "error" in row:
        return cell
    rate = row["batch"] / row["ms"] * 1e3
    tflop_per_s = rate * flops["sample"] / TERA
    stages = {
        stage: row["batch"] * flops[stage] / ms * 1e3 / TERA for stage, ms in row["stages_ms"].items() if ms
    }
    return {
        **cell,
        "per_second": _rounded(rate),
        "tflop_per_s": _rounded(tflop_per_s),
        "share_of_matmul": _rounded(tflop_per_s / ceiling),
        "stages_tflop_per_s": {stage: _rounded(value) for stage, value in stages.items()},
        "seconds_per_number": bench.seconds,
    }


def worker_start(bench: GpuBench, model: Model) -> dict[str, Any]:
    """Seconds from starting a process to where a worker would lease its first job."""
    request = Request(
        model=model.name,
        backend="aotinductor",
        device=bench.device,
        toy=bench.toy,
        precision=bench.precision,
        batches=(),
        all_batches=(),
        work=str(bench.work.resolve()),
        seconds=0.0,
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "engines.bench.start", str(bundle_of(request))],
        check=False,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        return {"error": done.stderr[-2000:]}
    return {"seconds": round(seconds, 2), "said": done.stdout.strip().splitlines()[-1]}


def line(cell: Mapping[str, Any], unit: str) -> str:
    """One measurement for people."""
    if "error" in cell:
        return f"batch {cell['batch']}: {cell['error']}"
    return (
        f"batch {cell['batch']}: {cell['ms']:.4g} ms, {cell['per_second']:.4g} {unit}/s, "
        f"{cell['tflop_per_s']:.3g} TFLOP/s, {cell['share_of_matmul']:.1%} of the matrix product"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def _write(path: Path, result: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(result, indent=1) + "\n")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def parse_names(text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Split `a,b` and check every name.

    Raises:
        ValueError: one is not allowed.
    """
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise ValueError(f"one of {', '.join(allowed)} is expected, not {unknown[0]!r}")
    return names
