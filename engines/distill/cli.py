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


def add_gate_parser(commands: Commands) -> None:
    """Add `gate STUDENT`."""
    parser = commands.add_parser(
        "gate",
        help="measure a student against its teacher and real pictures",
        description="Measure a student against its teacher and real renders; write report.json, report.md "
        "and contact_sheet.png. A gate that was stopped goes on where it was. Exit status 1: not passed.",
    )
    parser.add_argument("student", type=Path, metavar="STUDENT", help="directory written by distill")
    parser.add_argument(
        "--teacher", type=Path, metavar="DIR", help="default: the one that student.json names"
    )
    parser.add_argument(
        "--judge", type=Path, metavar="FILE", help="reader of scenes (default: the shipped one)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the report (default: STUDENT/report)")
    parser.add_argument("--seeds", type=_positive, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--prompts", type=_positive, default=1000, metavar="N", help="per seed (default: %(default)s)"
    )
    parser.add_argument(
        "--reference", type=_positive, default=4000, metavar="N", help="real renders (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=_counts, default=(4, 2, 1), metavar="K,K", help="of the student (default: 4,2,1)"
    )
    parser.add_argument(
        "--teacher-steps", type=_counts, default=(50, 8, 4, 2), metavar="K,K", help="default: 50,8,4,2"
    )
    parser.add_argument(
        "--guidance-scale", type=float, help="of the teacher (default: the one it was distilled with)"
    )
    parser.add_argument("--batch", type=_positive, default=250, metavar="N", help="default: %(default)s")
    parser.add_argument("--bf16", action="store_true", help="run the networks under bfloat16 autocast")
    parser.add_argument(
        "--threads", type=_positive, default=1, metavar="N", help="of torch (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.set_defaults(run=run_gate_command)


def run_gate_command(args: argparse.Namespace) -> int:
    """Gate; print the table. 0 if the student passed, 1 if not."""
    from rich.console import Console
    from rich.markdown import Markdown

    from engines.distill.gate import Gate, GateConfig
    from engines.distill.report import markdown
    from engines.families.checkpoint import read_json
    from engines.families.student import read_student

    read_student(args.student)
    teacher = read_json(args.student / "student.json").get("teacher", {})
    config = GateConfig(
        student=args.student,
        teacher=args.teacher or Path(teacher.get("path", "")),
        judge=args.judge or _default_judge(),
        out=args.out or args.student / "report",
        seeds=args.seeds,
        num_prompts=args.prompts,
        num_reference=args.reference,
        steps=args.steps,
        teacher_steps=args.teacher_steps,
        guidance_scale=args.guidance_scale or float(teacher.get("guidance_scale", 1.0)),
        batch=args.batch,
        autocast=args.bf16,
        num_threads=args.threads,
        device=args.device,
    )
    console = Console()
    report = Gate(config, console).run()
    console.print(Markdown(markdown(report)))
    console.print(f"report in {config.out}", soft_wrap=True)
    return 0 if report["passed"] else 1


def _default_judge() -> Path:
    shipped = Path(__file__).parents[1] / "demo" / "checkpoints" / "judge.safetensors"
    return shipped if shipped.is_file() else Path("runs/demo/judge.safetensors")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a positive number is expected, got {text}")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))
