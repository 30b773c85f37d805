"""`python -m engines`: teacher -> student -> bundle, from the command line.

Subcommands import their modules when they run, so `--help` stays fast and free of torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from engines.compile.adopt_cli import add_adopt_parser
from engines.compile.cli import add_bench_parser, add_build_parser, add_inspect_parser
from engines.compile.verify_cli import add_sign_parser, add_verify_parser
from engines.demo.cli import add_demo_parser
from engines.distill.cli import add_ablate_parser, add_distill_parser
from engines.errors import EngineError
from engines.gate.cli import add_gate_parser

EXIT_ERROR = 2


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; every subcommand sets `run(args) -> exit status`."""
    parser = argparse.ArgumentParser(
        prog="python -m engines",
        description="Distil a diffusion teacher, gate the student, compile it into a bundle, measure it.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_demo_parser(commands)
    add_distill_parser(commands)
    add_gate_parser(commands)
    add_ablate_parser(commands)
    add_adopt_parser(commands)
    add_build_parser(commands)
    add_verify_parser(commands)
    add_sign_parser(commands)
    add_inspect_parser(commands)
    add_bench_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        The subcommand's exit status; 2 with one line on stderr for an `EngineError`.
    """
    args = make_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except EngineError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
