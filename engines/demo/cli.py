"""`python -m engines demo-teacher`: the teacher, its VAE and the judge, from nothing."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.errors import ConfigError

STAGES = ("pictures", "judge", "vae", "train", "assemble")
DEFAULTS: dict[str, dict[str, Any]] = {
    "image": {
        "out": Path("runs/demo"), "scenes": 60, "judge_steps": 3000, "vae_steps": 4000,
        "teacher_steps": 6600, "batch": 128, "layers": 6, "heads": 6,
    },
    "video": {
        "out": Path("runs/demo-video"), "scenes": 24, "judge_steps": 2500, "vae_steps": 2500,
        "teacher_steps": 6500, "batch": 64, "layers": 6, "heads": 3,
    },
    "studio": {
        "out": Path("runs/demo-studio"), "scenes": 24, "judge_steps": 2500, "vae_steps": 5000,
        "teacher_steps": 20_000, "batch": 64, "layers": 6, "heads": 6,
    },
}  # fmt: skip
"""What options are that are not given, by kind of teacher."""


def add_demo_parser(commands: Any) -> None:  # argparse does not name the type of its subparsers
    """Add the `demo-teacher` command."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo-teacher",
        help="render captioned scenes and train the demo teacher on them",
        description="Render captioned scenes or clips, train a judge that reads them, the VAE and the "
        "teacher, and write the teacher as a diffusers directory: a PixArtAlphaPipeline that draws pictures "
        "(kinds image and studio), or a CogVideoXPipeline that draws clips. Every stage continues where it "
        "was interrupted; a finished one is skipped. Two shells may run different stages at once.",
    )

    def add(option: str, text: str, of: Callable[[str], Any] = int) -> None:
        image, *others = values = [DEFAULTS[kind][option.replace("-", "_")] for kind in DEFAULTS]
        default = f"{image}"
        if len(set(values)) > 1:
            default += "".join(
                f"; {kind}: {value}" for kind, value in zip([*DEFAULTS][1:], others, strict=True)
            )
        parser.add_argument(f"--{option}", type=of, default=None, help=f"{text} (default: {default})")

    parser.add_argument(
        "--kind",
        choices=tuple(DEFAULTS),
        default="image",
        help="what the teacher draws (default: %(default)s)",
    )
    add("out", "working directory", Path)
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=None, help="default: all; none if only to --keep"
    )
    parser.add_argument("--threads", type=int, default=0, help="torch threads and renderers; 0: one per core")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("scenes", "thousands of training pictures or clips")
    add("judge-steps", "of 96 pictures or clips")
    add("vae-steps", "of 16 pictures or 8 clips")
    add("teacher-steps", "of BATCH pictures or clips")
    add("batch", "of the teacher")
    add("layers", "of the teacher")
    add("heads", "of the teacher, 32 wide each; video: 48")
    parser.add_argument("--start", type=Path, help="begin with what --keep has written; studio only")
    parser.add_argument(
        "--keep",
        type=Path,
        help="write what was learnt, in float16, without the optimizer, after the stages if any; studio only",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    for option, value in DEFAULTS[args.kind].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    if args.stages is None:
        args.stages = () if args.keep else STAGES
    if args.kind != "studio" and (args.start or args.keep):
        raise ConfigError(f"--start and --keep are for --kind studio, not {args.kind}")
    if args.kind == "video":
        from engines.demo.video.recipe import run_recipe
    elif args.kind == "studio":
        from engines.demo.studio.recipe import run_recipe
    else:
        from engines.demo.recipe import run_recipe
    return run_recipe(args)
