"""`python -m engines gate`. Torch is imported when it runs, not for `--help`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_gate_parser(commands: Commands) -> None:
    """Add `gate STUDENT`."""
    parser = commands.add_parser(
        "gate",
        help="measure a student against its teacher and real pictures",
        description="Measure a student against its teacher and real renders; write report.json, report.md, "
        "contact_sheet.png and, of clips, contact_sheet.webp, which moves. A gate that was stopped goes on "
        "where it was. Exit status 1: not passed.",
    )
    parser.add_argument("student", type=Path, metavar="STUDENT", help="directory written by distill")
    parser.add_argument(
        "--teacher", type=Path, metavar="DIR", help="default: the one that student.json names"
    )
    parser.add_argument(
        "--domain",
        metavar="NAME",
        help="whose prompts, real pictures and judge: demo, demo-video, or module:NAME of your own (default: "
        "the demo's of the student's kind)",
    )
    parser.add_argument(
        "--judge",
        type=Path,
        metavar="FILE",
        help="weights of the judge (default: the domain's own)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="of the report (default: STUDENT/report)")
    parser.add_argument("--seeds", type=_positive, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--prompts",
        type=_count_or_path,
        default=1000,
        metavar="N|FILE",
        help="how many of the demo's per seed (default: %(default)s), or, for a model of your own, a file of "
        "prompts: its student is compared with the teacher's pictures of most guided steps",
    )
    parser.add_argument(
        "--num-prompts",
        type=_positive,
        metavar="N",
        help="of the file per seed (default: as many as it has, at most 1000)",
    )
    parser.add_argument(
        "--reference",
        type=_positive,
        metavar="N",
        help="real renders (default: 4000), or with a file the teacher's pictures (default: 1000)",
    )
    _add_measuring(parser)
    parser.set_defaults(run=run_gate_command)


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    """How it is measured, not what."""
    parser.add_argument(
        "--features",
        default="pixels",
        metavar="SPACE",
        help="with a file of prompts: where Fréchet distances are taken: pixels, vae, or a directory of CLIP "
        "or DINOv2 or another image network of transformers in safetensors (default: %(default)s)",
    )
    parser.add_argument(
        "--clip", type=Path, metavar="DIR", help="with a file of prompts: score with this CLIPModel"
    )
    parser.add_argument(
        "--hps", type=Path, metavar="DIR", help="with a file of prompts: score with HPSv2 as a CLIPModel"
    )
    parser.add_argument(
        "--steps", type=_counts, metavar="K,K", help="of the student (default: all that it was made for)"
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
        "--processes",
        type=_positive,
        metavar="N",
        help="that measure side by side, each with its own copy of the networks "
        "(default: one per core; on a GPU, and with a file of prompts, one)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        metavar="N",
        help="of torch in each process (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="default: %(default)s")


def run_gate_command(args: argparse.Namespace) -> int:
    """Gate; print the table. 0 if the student passed, 1 if not."""
    from rich.console import Console
    from rich.markdown import Markdown

    from engines.captions import read_captions
    from engines.domains import default_domain
    from engines.families.checkpoint import read_json
    from engines.families.student import read_student
    from engines.gate.evaluator import GateConfig
    from engines.gate.gate import Gate
    from engines.gate.report import markdown

    student = read_student(args.student)
    teacher = read_json(args.student / "student.json").get("teacher", {})
    file = args.prompts if isinstance(args.prompts, Path) else None
    num_prompts = args.prompts
    if file is not None:
        num_prompts = args.num_prompts or len(read_captions(file, 1000))
    config = GateConfig(
        student=args.student,
        teacher=args.teacher or Path(teacher.get("path", "")),
        domain=args.domain,
        judge=None if file else args.judge or _default_judge(args.domain or default_domain(student.kind)),
        prompts=file,
        features=args.features,
        clip=args.clip,
        hps=args.hps,
        out=args.out or args.student / "report",
        seeds=args.seeds,
        num_prompts=num_prompts,
        num_reference=args.reference or (1000 if file else 4000),
        steps=args.steps or tuple(sorted(student.num_steps, reverse=True)),
        teacher_steps=args.teacher_steps,
        guidance_scale=args.guidance_scale or float(teacher.get("guidance_scale", 1.0)),
        batch=args.batch,
        autocast=args.bf16,
        num_processes=args.processes or (1 if file else _default_processes(args.device, args.threads)),
        num_threads=args.threads,
        device=args.device,
    )
    console = Console()
    report = Gate(config, console).run()
    console.print(Markdown(markdown(report)))
    console.print(f"report in {config.out}", soft_wrap=True)
    return 0 if report["passed"] else 1


def _default_judge(domain: str) -> Path:
    from engines.domains import load_domain

    shipped = load_domain(domain).judge_file
    return shipped if shipped.is_file() else Path("runs/demo") / shipped.name


def _default_processes(device: str, num_threads: int) -> int:
    from engines.bundle.platform import available_cores

    return max(1, available_cores() // num_threads) if device == "cpu" else 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a positive number is expected, got {text}")
    return value


def _count_or_path(text: str) -> int | Path:
    return _positive(text) if text.lstrip("-").isdigit() else Path(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))
