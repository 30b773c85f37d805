"""The `adopt` command: arguments here, the work imported when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from engines.arguments import falling_ints, positive_int, positive_ints, say

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


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
    say(console, f"student written to {out}")
    say(console, f"next: python -m engines gate {out} --teacher {args.base} --prompts FILE")
    return 0
