"""`python -m engines distill` and `gate`. Torch is imported when they run, not for `--help`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_distill_parser(commands: Commands) -> None:
    """Add `distill CONFIG`."""
    parser = commands.add_parser(
        "distill",
        help="distil a teacher into a few-step student (TDM)",
        description="Distil a teacher into a few-step student. A run that was stopped goes on where it was.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file with the run's settings")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting, for example objective.guidance_scale=3; repeatable",
    )
    parser.add_argument("--restart", action="store_true", help="delete the run's checkpoints and start over")
    parser.set_defaults(run=run_distill)


def run_distill(args: argparse.Namespace) -> int:
    """Distil; print where the student is."""
    from rich.console import Console

    from engines.distill.config import read_config
    from engines.distill.trainer import distill

    config, console = read_config(args.config, args.overrides), Console()
    if args.restart:
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
    student = distill(config, console)
    console.print(f"student written to {student}; next: python -m engines gate {student}", soft_wrap=True)
    return 0
