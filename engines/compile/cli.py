"""The `build`, `verify`, `inspect` and `bench` commands: arguments here, the work imported when they run."""

from __future__ import annotations

import argparse
import signal
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from engines.bundle import read_manifest
from engines.compile.tables import (
    bench_tables,
    engines_table,
    latency_table,
    parity_table,
    summary_table,
)
from engines.platform import available_cores

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


def backend_names(text: str) -> tuple[str, ...]:
    """Parse `aotinductor`, `eager` or both."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    unknown = [name for name in names if name not in ("aotinductor", "eager")]
    if unknown:
        raise argparse.ArgumentTypeError(f"backends are aotinductor and eager, not {unknown[0]!r}")
    return names


def add_build_parser(commands: Commands) -> None:
    """Add `build` to the command line."""
    parser = commands.add_parser("build", help="compile a student into an engine bundle")
    parser.add_argument(
        "student", type=Path, help="student directory: PixArtAlphaPipeline layout and student.json"
    )
    parser.add_argument("--out", type=Path, required=True, help="bundle directory to write")
    parser.add_argument(
        "--batches", type=positive_ints, default=DEFAULT_BATCH_SIZES, help="batch sizes (default 1,2,4,8,16)"
    )
    parser.add_argument(
        "--backends",
        type=backend_names,
        default=("aotinductor",),
        help="aotinductor (default), or eager: no compiling",
    )
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="threads that the worker will use; measured with it"
    )
    parser.add_argument(
        "--jobs", type=positive_int, help="stages compiled side by side (default: one per core)"
    )
    parser.add_argument(
        "--decode-dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="what compiled decode computes in (default auto: bfloat16 where faster and close enough)",
    )
    parser.add_argument("--force", action="store_true", help="build a student that failed its gate; recorded")
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="return at once where DIR already fits this student and machine",
    )
    parser.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    """Build, or with --if-needed find out first whether there is anything to do."""
    from engines.compile.needed import reason_to_build

    console = Console()
    if args.if_needed:
        reason = reason_to_build(
            args.student,
            args.out,
            batch_sizes=args.batches,
            backends=args.backends,
            num_threads=args.threads,
            decode_dtype=args.decode_dtype,
        )
        if reason is None:
            _say(console, f"build: {args.out} is up to date")
            return 0
        _say(console, f"build: {reason}; building {args.out} from {args.student}")
    with warnings.catch_warnings():
        # tracing and exporting warn about the libraries' own code; what matters is checked by parity
        warnings.simplefilter("ignore")
        _build(args, console)
    return 0


def _build(args: argparse.Namespace, console: Console) -> None:
    from engines.compile.build import BuildSettings, build_bundle, num_pieces
    from engines.compile.progress import BuildProgress

    settings = BuildSettings(
        student=args.student,
        out=args.out,
        batch_sizes=args.batches,
        backends=args.backends,
        num_threads=args.threads,
        num_jobs=args.jobs or available_cores(),
        decode_dtype=args.decode_dtype,
        force=args.force,
        allow_eager=args.if_needed,
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


def add_verify_parser(commands: Commands) -> None:
    """Add `verify` to the command line."""
    parser = commands.add_parser("verify", help="check a bundle: hashes, platform, agreement with eager")
    parser.add_argument("bundle", type=Path)
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """Verify; exit status 0 if everything is well, 1 if only eager can serve the bundle here."""
    from engines.compile.verify import verify_bundle

    console = Console()
    verdict = verify_bundle(args.bundle)
    manifest = verdict.manifest
    _say(console, f"hashes: {len(manifest.files)} files are as they were built ({manifest.version})")
    for mismatch in verdict.mismatches:
        _say(console, f"platform: {mismatch}")
    if verdict.mismatches:
        _say(console, "compiled code does not fit this machine; eager can serve, or build again")
        return EXIT_DOES_NOT_FIT
    if not manifest.engines:
        _say(console, f"no compiled code: {manifest.eager_only}; eager serves")
        return 0
    _say(console, "platform: compiled code fits this machine")
    console.print(parity_table(verdict.parity))
    _say(console, "parity: compiled code agrees with eager")
    return 0


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
    if manifest.engines:
        console.print(engines_table(manifest))
        console.print(parity_table(manifest.parity))
    console.print(latency_table(manifest.latency))
    return 0


def add_bench_parser(commands: Commands) -> None:
    """Add `bench` to the command line."""
    parser = commands.add_parser("bench", help="time a bundle's stages, eager and compiled side by side")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument(
        "--threads", type=positive_int, help="of torch (default: what the bundle was built for)"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each number (default 1)")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Measure, print, and write JSON if asked to."""
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
