"""`python -m engines distill` and `ablate`. Torch is imported when they run, not for `--help`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_INTERRUPTED = 130


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
    from engines.distill.distributed import joined
    from engines.distill.trainer import distill

    config = read_config(args.config, args.overrides)
    with joined(config.device) as world:
        console = Console(quiet=not world.is_main)
        if args.restart:
            world.main_only(lambda: _delete_progress(config.out))
        try:
            student = distill(config, console)
        except KeyboardInterrupt:
            if world.is_main:
                raise
            return EXIT_INTERRUPTED
        console.print(f"student written to {student}; next: python -m engines gate {student}", soft_wrap=True)
    return 0


def _delete_progress(out: Path) -> None:
    for name in ("checkpoints", "best", "samples"):
        shutil.rmtree(out / name, ignore_errors=True)


def add_ablate_parser(commands: Commands) -> None:
    """Add `ablate CONFIG`."""
    parser = commands.add_parser(
        "ablate",
        help="distil and measure with one thing changed at a time",
        description="Distil and measure every variant of an ablation; write ablation.json and ablation.md. "
        "What was stopped goes on where it was.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file with base config and variants")
    parser.add_argument(
        "--processes", type=_positive, default=1, metavar="N", help="runs side by side (default: %(default)s)"
    )
    parser.set_defaults(run=run_ablate)


def run_ablate(args: argparse.Namespace) -> int:
    """Ablate; print the table."""
    from rich.console import Console
    from rich.markdown import Markdown

    from engines.distill.ablation import read_ablation, run_ablation

    config, console = read_ablation(args.config), Console()
    console.print(Markdown(run_ablation(config, console, num_processes=args.processes)))
    console.print(f"table in {config.out}", soft_wrap=True)
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a positive number is expected, got {text}")
    return value
