"""The `build`, `verify`, `inspect` and `bench` commands: arguments here, the work imported when they run."""

from __future__ import annotations

import argparse
import shutil
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import MANIFEST, read_manifest
from engines.bundle.platform import Device, available_cores, list_gpus, torch_cuda_version
from engines.bundle.signature import check_signature, read_key, sign_bundle
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

EXIT_DOES_NOT_FIT = 1


def positive_int(text: str) -> int:
    """Parse one positive integer."""
    (number,) = positive_ints(text) if "," not in text else (0,)
    if number < 1:
        raise argparse.ArgumentTypeError(f"one whole number is expected, not {text!r}")
    return number


def positive_ints(text: str) -> tuple[int, ...]:
    """Parse `1,2,4` into sorted distinct positive integers."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"whole numbers separated by commas are expected, not {text!r}"
        ) from None
    if numbers[0] < 1:
        raise argparse.ArgumentTypeError(f"numbers must be at least 1, not {numbers[0]}")
    return tuple(numbers)


def ints_or_none(text: str) -> tuple[int, ...]:
    """Parse `1,2,4`, or `none` into nothing."""
    return () if text == "none" else positive_ints(text)


def bucket_list(text: str) -> tuple[Bucket, ...]:
    """Parse `512x512,1024x1024`."""
    try:
        return tuple(Bucket.parse(label.strip()) for label in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def falling_ints(text: str) -> list[int]:
    """Parse `999,749,499,249`; order and range are checked against the checkpoint."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"whole numbers separated by commas are expected, not {text!r}"
        ) from None


def backend_names(text: str) -> tuple[Backend, ...]:
    """Parse `tensorrt,aotinductor`, in the order in which they are to be tried; or `eager`."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in tuple(Backend)]
    if unknown:
        raise argparse.ArgumentTypeError(f"backends are {', '.join(Backend)}, not {unknown[0]!r}")
    return tuple(Backend(name) for name in names)


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
    parser.add_argument(
        "--force", action="store_true", help="build a student that failed its gate or never had one; recorded"
    )
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="return at once where DIR already fits this student and machine",
    )
    _add_key_file(parser, "sign the bundle, and rebuild only one that this key has signed")
    parser.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    """Build, or with --if-needed find out first whether there is anything to do."""
    from engines.compile.needed import reason_to_build

    console = Console()
    key = _key(args)
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
            _say(console, f"build: {args.out} is up to date")
            return 0
        _say(console, f"build: {reason}; building {args.out} from {args.student}")
    with warnings.catch_warnings():
        # tracing and exporting warn about the libraries' own code; what matters is checked by parity
        warnings.simplefilter("ignore")
        _build(args, console)
    if key is not None:
        _say(console, f"signed with key {sign_bundle(args.out, key).key}")
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
    _say(console, f"bundle written to {args.out}: {manifest.name} {manifest.version}, {manifest.backend}")


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def add_adopt_parser(commands: Commands) -> None:
    """Add `adopt` to the command line."""
    parser = commands.add_parser(
        "adopt",
        help="make a student of few-step weights that somebody released",
        description="Make a student of a base checkpoint and a LoRA, or of a checkpoint that was distilled "
        "whole. Gate it, then build it.",
    )
    parser.add_argument("base", type=Path, help="diffusers directory of a known family")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="student directory to write")
    parser.add_argument("--name", required=True, help="of the model")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="safetensors to merge into the network")
    parser.add_argument(
        "--lora-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="of the LoRA, beside its own alpha and rank; what the model card says (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=positive_ints, default=(), metavar="K,K", help="of the student, evenly spaced"
    )
    parser.add_argument(
        "--timesteps",
        type=falling_ints,
        action="append",
        default=[],
        metavar="T,T,..",
        help="that the student visits, as it was trained: 999,856,665,399; once for each number of steps",
    )
    parser.add_argument("--default-steps", type=positive_int, metavar="K", help="default: the most")
    for side in ("height", "width", "frames"):
        parser.add_argument(f"--{side}", type=positive_int, metavar="N", help="default: the base's own")
    parser.add_argument("--fps", type=positive_int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-text-tokens", type=positive_int, metavar="N", help="default: the base's own")
    parser.add_argument(
        "--example", action="append", default=[], metavar="PROMPT", help="that shows what it can draw"
    )
    parser.set_defaults(run=run_adopt)


def run_adopt(args: argparse.Namespace) -> int:
    """Make the student; say how to go on."""
    from engines.compile.adopt import Adoption, adopt

    out = adopt(
        Adoption(
            base=args.base,
            out=args.out,
            name=args.name,
            lora=args.lora,
            lora_scale=args.lora_scale,
            timesteps={len(visited): visited for visited in args.timesteps},
            num_steps=args.steps,
            default_num_steps=args.default_steps,
            height=args.height,
            width=args.width,
            frames=args.frames,
            fps=args.fps,
            max_text_tokens=args.max_text_tokens,
            examples=args.example,
        )
    )
    console = Console()
    _say(console, f"student written to {out}")
    _say(console, f"next: python -m engines gate {out} --teacher {args.base} --prompts FILE")
    return 0


def add_verify_parser(commands: Commands) -> None:
    """Add `verify` to the command line."""
    parser = commands.add_parser("verify", help="check a bundle: hashes, platform, agreement with eager")
    parser.add_argument("bundle", type=Path)
    _add_key_file(parser, "check that this key has signed it, too")
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Verify; exit status 0 if everything is well, 1 if only eager can serve the bundle here."""
    from engines.compile.verify import verify_bundle

    console = Console()
    key = _key(args)
    if key is not None:
        check_signature(args.bundle, key)
        _say(console, "signature: made with this key")
    verdict = verify_bundle(args.bundle)
    manifest = verdict.manifest
    _say(console, f"hashes: {len(manifest.files)} files are as they were built ({manifest.version})")
    for mismatch in verdict.mismatches:
        _say(console, f"platform: {mismatch}")
    if not manifest.engines:
        _say(console, f"no compiled code: {manifest.eager_only}; eager serves")
        return 0
    if not verdict.fitting:
        _say(console, "compiled code does not fit this machine; eager can serve, or build again")
        return EXIT_DOES_NOT_FIT
    which = f" ({', '.join(verdict.fitting)})" if verdict.mismatches else ""
    _say(console, f"platform: compiled code fits this machine{which}")
    console.print(parity_table(verdict.parity))
    _say(console, "parity: compiled code agrees with eager")
    return 0


def add_sign_parser(commands: Commands) -> None:
    """Add `sign` to the command line."""
    parser = commands.add_parser("sign", help="sign a bundle, for workers that take only signed ones")
    parser.add_argument("bundle", type=Path)
    _add_key_file(parser, "key: at least 32 bytes (openssl rand -hex 32)", required=True)
    parser.set_defaults(run=run_sign)


def run_sign(args: argparse.Namespace) -> int:
    """Sign a bundle that is whole."""
    signed = sign_bundle(args.bundle, read_key(args.key_file))
    _say(Console(), f"{args.bundle} signed with key {signed.key}")
    return 0


def _add_key_file(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument("--key-file", type=Path, metavar="FILE", required=required, help=text)


def _key(args: argparse.Namespace) -> bytes | None:
    return None if args.key_file is None else read_key(args.key_file)


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

        _say(console, f"GPU memory\n{plan_memory(args.bundle, manifest).as_text()}")
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
        _say(console, f"written to {args.out}")
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
    _say(console, where(result))
    for table in tables(result):
        console.print(table)
    plot = args.plot or out.with_suffix(".png")
    chart(result, plot)
    _say(console, f"written to {out} and {plot}")
    failed = [name for name, entry in result["models"].items() if entry["failed"]]
    return 1 if failed else 0
