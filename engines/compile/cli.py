"""The `build`, `inspect` and `bench` commands: arguments here, the work imported when they run."""

from __future__ import annotations

import argparse
import shutil
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from engines.arguments import (
    add_key_file,
    backend_names,
    bucket_list,
    ints_or_none,
    key_of,
    positive_int,
    positive_ints,
    say,
)
from engines.bundle.manifest import MANIFEST, read_manifest
from engines.bundle.platform import Device, available_cores, list_gpus, torch_cuda_version
from engines.bundle.signature import check_signature, sign_bundle
from engines.bundle.stages import Backend
from engines.compile.tables import (
    bench_tables,
    engines_table,
    gate_table,
    latency_table,
    parity_table,
    summary_table,
)
from engines.errors import ConfigError

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_BATCH_SIZES = (1, 2, 4, 8, 16)


def add_build_parser(commands: Commands) -> None:
    """Add `build` to the command line."""
    parser = commands.add_parser("build", help="compile a student into an engine bundle")
    parser.add_argument(
        "student",
        type=Path,
        help="student directory: a diffusers pipeline of a known family and student.json",
    )
    parser.add_argument("--out", type=Path, required=True, help="bundle directory to write")
    parser.add_argument(
        "--buckets",
        type=bucket_list,
        default=(),
        metavar="HxW,HxW",
        help="picture sizes, HEIGHTxWIDTH or for videos HEIGHTxWIDTHxFRAMES, the default first (default: the "
        "student's own)",
    )
    parser.add_argument(
        "--batches", type=positive_ints, default=DEFAULT_BATCH_SIZES, help="batch sizes (default 1,2,4,8,16)"
    )
    parser.add_argument(
        "--backends",
        type=backend_names,
        default=(Backend.AOTINDUCTOR,),
        metavar="NAME,NAME",
        help="aotinductor (default), tensorrt (a GPU and the extra tensorrt), or both: the first that fits a "
        "machine serves there; eager alone: no compiling",
    )
    _add_compiling(parser)
    parser.add_argument(
        "--force", action="store_true", help="build a student that failed its gate; the manifest says so"
    )
    parser.add_argument(
        "--ungated", action="store_true", help="build a student that no gate measured; the manifest says so"
    )
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="return at once where DIR already fits this student and machine",
    )
    add_key_file(parser, "sign the bundle, and rebuild only one that this key has signed")
    parser.set_defaults(run=run_build)


def _add_compiling(parser: argparse.ArgumentParser) -> None:
    """How it is compiled, not what."""
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="threads that the worker will use; measured with it"
    )
    parser.add_argument(
        "--jobs",
        type=positive_int,
        help="stages compiled side by side (default: one per core; for a GPU one, because kernels are timed)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="what to build for (default: cuda where there is a GPU)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp16", "fp8"),
        help="what compiled code computes in (default: bf16 on a GPU; on a CPU fp32, and decode as below); "
        "fp8 is the denoiser's large matrix products, the rest bf16",
    )
    parser.add_argument(
        "--static-batches",
        type=ints_or_none,
        metavar="B,B",
        help="sizes among --batches that get packages of their own for denoise and decode, beside those for "
        "all sizes, or none (default: on a GPU all of --batches, on a CPU none)",
    )
    parser.add_argument(
        "--optimization-level",
        type=int,
        choices=range(6),
        default=5,
        help="of TensorRT's builder: how many kernels it tries (default %(default)s; 2 or 3 build faster)",
    )
    parser.add_argument(
        "--workspace-mib",
        type=positive_int,
        metavar="N",
        help="scratch memory that TensorRT may choose a kernel by (default: all there is)",
    )
    parser.add_argument(
        "--decode-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what compiled decode computes in (default auto: bfloat16 where faster and close enough)",
    )


def run_build(args: argparse.Namespace) -> int:
    """Build, or with --if-needed find out first whether there is anything to do."""
    from engines.compile.needed import reason_to_build

    console = Console()
    key = key_of(args)
    args.device = args.device or default_device()
    if args.static_batches is None:
        args.static_batches = args.batches if args.device == "cuda" else ()
    if key is not None:
        if (args.out / MANIFEST).exists():
            check_signature(args.out, key)
        else:  # nobody has vouched for what an unfinished build left
            shutil.rmtree(args.out / "engines", ignore_errors=True)
    if args.if_needed:
        reason = reason_to_build(
            args.student,
            args.out,
            buckets=args.buckets,
            batch_sizes=args.batches,
            backends=args.backends,
            num_threads=args.threads,
            decode_dtype=args.decode_dtype,
            device=args.device,
            precision=args.precision,
            static_batches=args.static_batches,
        )
        if reason is None:
            say(console, f"build: {args.out} is up to date")
            return 0
        say(console, f"build: {reason}; building {args.out} from {args.student}")
    with warnings.catch_warnings():
        # tracing and exporting warn about the libraries' own code; what matters is checked by parity
        warnings.simplefilter("ignore")
        _build(args, console)
    if key is not None:
        say(console, f"signed with key {sign_bundle(args.out, key).key}")
    return 0


def default_device() -> Device:
    """A GPU where torch sees one. Torch, which takes seconds to import, is asked only where a driver is."""
    if not (list_gpus() and torch_cuda_version()):
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _build(args: argparse.Namespace, console: Console) -> None:
    from engines.compile.build import build_bundle, num_pieces
    from engines.compile.progress import BuildProgress
    from engines.compile.settings import BuildSettings

    settings = BuildSettings(
        student=args.student,
        out=args.out,
        buckets=args.buckets,
        batch_sizes=args.batches,
        backends=args.backends,
        num_threads=args.threads,
        num_jobs=args.jobs or (1 if args.device == "cuda" else available_cores()),
        decode_dtype=args.decode_dtype,
        force=args.force,
        ungated=args.ungated,
        allow_eager=args.if_needed,
        device=args.device,
        precision=args.precision,
        static_batches=args.static_batches,
        optimization_level=args.optimization_level,
        workspace_bytes=None if args.workspace_mib is None else args.workspace_mib << 20,
    )
    # like Ctrl-C: stop the compiler processes, clean up, exit
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with BuildProgress(console, num_pieces(settings)) as progress:
            manifest = build_bundle(settings, progress)
    finally:
        signal.signal(signal.SIGTERM, previous)
    console.print(latency_table(manifest.latency))
    say(console, f"bundle written to {args.out}: {manifest.name} {manifest.version}, {manifest.backend}")


def add_inspect_parser(commands: Commands) -> None:
    """Add `inspect` to the command line."""
    parser = commands.add_parser("inspect", help="show what a bundle holds")
    parser.add_argument("bundle", type=Path)
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """Print a bundle's manifest as tables; nothing is loaded or verified."""
    manifest = read_manifest(args.bundle)
    console = Console()
    console.print(summary_table(manifest))
    if manifest.gate.criteria:
        console.print(gate_table(manifest.gate))
    if manifest.engines:
        console.print(engines_table(manifest))
        console.print(parity_table(manifest.parity))
    console.print(latency_table(manifest.latency))
    if manifest.device == "cuda":
        from engines.runtime.memory import plan_memory

        say(console, f"GPU memory\n{plan_memory(args.bundle, manifest).as_text()}")
    return 0


def add_bench_parser(commands: Commands) -> None:
    """Add `bench` to the command line."""
    parser = commands.add_parser(
        "bench",
        help="time a bundle's stages, eager and compiled side by side; or with --gpu the published models",
        description="Time a bundle. With --gpu, and without a bundle: time the published sizes of every "
        "family with random weights beside diffusers' own pipelines. What the result has already is not "
        "measured again.",
    )
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument(
        "--out", type=Path, help="write the result as JSON (with --gpu default: loadtests/results/gpu.json)"
    )
    parser.add_argument(
        "--threads", type=positive_int, help="of torch (default: what the bundle was built for)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each number (default 1)")
    gpu = parser.add_argument_group("with --gpu")
    gpu.add_argument("--gpu", action="store_true", help="measure the published models on this GPU")
    gpu.add_argument("--toy", action="store_true", help="shrunk models, also on a CPU: a check, no measure")
    gpu.add_argument("--models", metavar="NAME,NAME", help="default: all")
    gpu.add_argument(
        "--contenders",
        metavar="NAME,NAME",
        help="aotinductor, eager, diffusers, diffusers-compiled (default: all)",
    )
    gpu.add_argument("--batches", type=positive_ints, default=(), help="default: each model's own")
    gpu.add_argument("--static-batches", type=positive_ints, default=(), metavar="B,B", help="as of build")
    gpu.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16", "fp8"), help="default: bf16; --toy: fp32"
    )
    gpu.add_argument("--minutes", type=float, default=1e6, help="start no measurement after this long")
    gpu.add_argument(
        "--work",
        type=Path,
        default=Path("runs/gpu-bench"),
        help="checkpoints and bundles (default %(default)s)",
    )
    gpu.add_argument("--commit", help="of the source, where it is no repository")
    gpu.add_argument("--plot", type=Path, help="PNG (default: beside the JSON)")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Measure, print, and write JSON if asked to."""
    if args.gpu:
        return _run_gpu_bench(args)
    if args.bundle is None:
        raise ConfigError("bench: a bundle is expected, or --gpu")
    from engines.compile.bench import bench_bundle, write_result

    manifest = read_manifest(args.bundle)
    num_threads = args.threads or manifest.num_threads
    rows = bench_bundle(args.bundle, num_threads=num_threads, budget_s=args.seconds)
    console = Console()
    for table in bench_tables(rows):
        console.print(table)
    if args.out:
        write_result(args.out, manifest, rows, num_threads=num_threads)
        say(console, f"written to {args.out}")
    return 0


def _run_gpu_bench(args: argparse.Namespace) -> int:
    from engines.bench.cell import CONTENDERS
    from engines.bench.gpu import GpuBench, parse_names, run_gpu_bench
    from engines.bench.models import MODELS
    from engines.bench.report import chart, tables, where

    try:
        models = parse_names(args.models, tuple(MODELS)) if args.models else tuple(MODELS)
        contenders = parse_names(args.contenders, CONTENDERS) if args.contenders else CONTENDERS
    except ValueError as error:
        raise ConfigError(f"bench: {error}") from None
    out = args.out or Path("loadtests/results/gpu.json")
    console = Console()
    result = run_gpu_bench(
        GpuBench(
            models=models,
            contenders=contenders,  # type: ignore[arg-type]
            batches=args.batches,
            precision=args.precision or ("fp32" if args.toy else "bf16"),
            toy=args.toy,
            out=out,
            work=args.work / ("toy" if args.toy else "full"),
            seconds=args.seconds,
            minutes=args.minutes,
            static=args.static_batches,
            commit=args.commit,
        ),
        console,
    )
    say(console, where(result))
    for table in tables(result):
        console.print(table)
    plot = args.plot or out.with_suffix(".png")
    chart(result, plot)
    say(console, f"written to {out} and {plot}")
    failed = [name for name, entry in result["models"].items() if entry["failed"]]
    return 1 if failed else 0
