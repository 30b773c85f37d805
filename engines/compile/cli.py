"""The `build`, `verify`, `inspect` and `bench` commands: arguments here, the work imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_BATCH_SIZES = (1, 2, 4, 8, 16)


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
        "--threads", type=int, default=1, help="threads that the worker will use; measured with it"
    )
    parser.add_argument(
        "--jobs", type=int, default=0, help="stages compiled side by side (default: one per core)"
    )
    parser.add_argument("--force", action="store_true", help="build a student that failed its gate; recorded")
    parser.add_argument(
        "--if-needed",
        action="store_true",
        help="return at once where DIR already fits this student and machine",
    )
    parser.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    """`python -m engines build`."""
    raise NotImplementedError


def add_verify_parser(commands: Commands) -> None:
    """Add `verify` to the command line."""
    parser = commands.add_parser("verify", help="check a bundle: hashes, platform, agreement with eager")
    parser.add_argument("bundle", type=Path)
    parser.set_defaults(run=run_verify)


def run_verify(args: argparse.Namespace) -> int:
    """`python -m engines verify`."""
    raise NotImplementedError


def add_inspect_parser(commands: Commands) -> None:
    """Add `inspect` to the command line."""
    parser = commands.add_parser("inspect", help="show what a bundle holds")
    parser.add_argument("bundle", type=Path)
    parser.set_defaults(run=run_inspect)


def run_inspect(args: argparse.Namespace) -> int:
    """`python -m engines inspect`."""
    raise NotImplementedError


def add_bench_parser(commands: Commands) -> None:
    """Add `bench` to the command line."""
    parser = commands.add_parser("bench", help="time a bundle's stages, eager and compiled side by side")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """`python -m engines bench`."""
    raise NotImplementedError
