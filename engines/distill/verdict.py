"""From measurements to a verdict: what a student must reach, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engines.distill.report import Spread
from engines.distill.student import write_json
from engines.families.checkpoint import read_json
from engines.families.student import STUDENT, Student

MAX_LOSS_POINTS = 2.0
"""How far the student's one-object accuracy may lie below that of the teacher's many guided steps."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sampler of the table.

    Attributes:
        key: stable name, for example "teacher-50-cfg".
        label: what the table calls it.
        source: "real" or "vae" (of real renders), "teacher" or "student".
        num_steps, guidance_scale: how teacher and student sample.
    """

    key: str
    label: str
    source: Literal["real", "vae", "teacher", "student"]
    num_steps: int = 0
    guidance_scale: float = 1.0

    @property
    def nfe(self) -> int:
        return self.num_steps * (1 if self.guidance_scale == 1.0 else 2)

    @property
    def cost(self) -> int:
        """Rough work per picture, in transformer evaluations; decoding and reading it cost about four."""
        return self.nfe + 4


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row at one seed.

    Attributes:
        accuracy: percent of pictures read exactly as asked, per kind of prompt and over "all".
        frechet: Fréchet distance to real renders, in percent of their variance.
    """

    accuracy: dict[str, float]
    frechet: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One row over all seeds."""

    row: Row
    accuracy: dict[str, Spread]
    frechet: Spread

    @classmethod
    def of(cls, row: Row, measurements: Sequence[Measurement]) -> Summary:
        return cls(
            row,
            {
                group: Spread.of([one.accuracy[group] for one in measurements])
                for group in measurements[0].accuracy
            },
            Spread.of([one.frechet for one in measurements]),
        )


@dataclass(frozen=True, slots=True)
class Criterion:
    """One condition of passing."""

    text: str
    passed: bool


def check(summaries: Mapping[str, Summary], num_steps: int, teacher_steps: int) -> list[Criterion]:
    """Compare the student at `num_steps` with its teacher.

    It may lose at most `MAX_LOSS_POINTS` of one-object accuracy to the teacher's `teacher_steps` guided
    steps, and it has to beat the teacher at the same number of evaluations: as many steps without guidance,
    and, for an even number, half as many with it, in accuracy over all prompts and in Fréchet distance.

    Returns:
        Criteria with the numbers that decided them; one that needs a row which was not measured fails.
    """
    name = f"student, {num_steps} steps,"
    rivals = [f"teacher-{num_steps}"] + ([f"teacher-{num_steps // 2}-cfg"] if num_steps % 2 == 0 else [])
    needed = [f"student-{num_steps}", f"teacher-{teacher_steps}-cfg", *rivals]
    missing = [key for key in needed if key not in summaries]
    if missing:
        return [Criterion(f"{name} not measured: {', '.join(missing)}", passed=False)]
    student, best = summaries[needed[0]], summaries[needed[1]]
    ours, theirs = student.accuracy["one_object"].mean, best.accuracy["one_object"].mean
    criteria = [
        Criterion(
            f"{name} loses at most {MAX_LOSS_POINTS:g} points of one-object accuracy to {best.row.label}: "
            f"{ours:.1f} against {theirs:.1f} %",
            ours >= theirs - MAX_LOSS_POINTS,
        )
    ]
    for rival in (summaries[key] for key in rivals):
        ours, theirs = student.accuracy["all"].mean, rival.accuracy["all"].mean
        numbers = f"{ours:.1f} against {theirs:.1f} %"
        text = f"{name} is read right more often than {rival.row.label}: {numbers} of all prompts"
        criteria.append(Criterion(text, ours > theirs))
        ours, theirs = student.frechet.mean, rival.frechet.mean
        numbers = f"Fréchet distance {ours:.2f} against {theirs:.2f} %"
        criteria.append(
            Criterion(f"{name} is closer to real renders than {rival.row.label}: {numbers}", ours < theirs)
        )
    return criteria


def make_report(
    student: Student,
    setup: Mapping[str, Any],
    measured: Sequence[tuple[Row, Sequence[Measurement]]],
    teacher_steps: int,
) -> dict[str, Any]:
    """Put measurements and verdict together, ready for JSON.

    Args:
        setup: how it was measured.
        measured: rows in the table's order, with one measurement per seed.
        teacher_steps: the teacher's step count that the student is held to.
    """
    summaries = {row.key: Summary.of(row, measurements) for row, measurements in measured}
    criteria = check(summaries, student.default_num_steps, teacher_steps)
    return {
        "schema_version": 1,
        "name": student.name,
        "passed": all(criterion.passed for criterion in criteria),
        "criteria": [asdict(criterion) for criterion in criteria],
        "highlight": f"student-{student.default_num_steps}",
        "setup": dict(setup),
        "rows": [
            {
                "key": row.key,
                "label": row.label,
                "num_steps": row.num_steps,
                "nfe": row.nfe,
                "accuracy": {group: asdict(spread) for group, spread in summaries[row.key].accuracy.items()},
                "frechet": asdict(summaries[row.key].frechet),
                "seeds": [asdict(measurement) for measurement in measurements],
            }
            for row, measurements in measured
        ],
    }


def record_verdict(student: Path, report: dict[str, Any]) -> None:
    """Write the verdict and the table's means into `student.json`, where bundles and servers find it."""
    description = read_json(student / STUDENT)
    description["gate"] = {
        "passed": report["passed"],
        "criteria": report["criteria"],
        "setup": report["setup"],
        "rows": [
            {
                "key": row["key"],
                "nfe": row["nfe"],
                "accuracy": {group: round(spread["mean"], 2) for group, spread in row["accuracy"].items()},
                "frechet": round(row["frechet"]["mean"], 3),
            }
            for row in report["rows"]
        ],
    }
    write_json(student / STUDENT, description)
