"""Arguments of the command line, parsed; what is wrong with one is said in a line. No torch here."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from engines.bundle.bucket import Bucket
from engines.bundle.signature import read_key
from engines.bundle.stages import Backend


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


def add_key_file(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    """Add `--key-file FILE`, see `key_of`."""
    parser.add_argument("--key-file", type=Path, metavar="FILE", required=required, help=text)


def key_of(args: argparse.Namespace) -> bytes | None:
    """The key that `--key-file` names, if it was given."""
    return None if args.key_file is None else read_key(args.key_file)


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)
