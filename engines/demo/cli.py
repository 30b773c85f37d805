"""`python -m engines demo-teacher`: the teacher, its VAE and the judge, from nothing."""

import argparse
from pathlib import Path
from typing import Any

STAGES = ("pictures", "judge", "vae", "train", "assemble")


def add_demo_parser(commands: Any) -> None:  # argparse does not name the type of its subparsers
    """Add the `demo-teacher` command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo-teacher",
        help="render captioned scenes and train the demo teacher on them",
        description="Render captioned scenes, train a judge that reads them, the VAE and the teacher, and "
        "write the teacher as a diffusers PixArtAlphaPipeline directory. Every stage continues where it was "
        "interrupted; a finished one is skipped. Two shells may run different stages at once.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="working directory (default: %(default)s)"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all")
    parser.add_argument("--threads", type=int, default=0, help="torch threads and renderers; 0: one per core")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--scenes", type=int, default=60, help="thousands of training pictures (default: %(default)s)"
    )
    parser.add_argument("--judge-steps", type=int, default=3000, help="of 96 pictures (default: %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=4000, help="of 16 pictures (default: %(default)s)")
    parser.add_argument(
        "--teacher-steps", type=int, default=6600, help="of BATCH pictures (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=128, help="of the teacher (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="of the teacher (default: %(default)s)")
    parser.add_argument(
        "--heads", type=int, default=6, help="of the teacher, 32 wide each (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from engines.demo.recipe import run_recipe

    return run_recipe(args)
