"""From measurements to a verdict: what a student must reach, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.families.checkpoint import read_json
from engines.families.student import STUDENT, Student
from engines.files import write_json
from engines.gate.measurement import Cost, Difference, Measured, Measurement, Summary, difference
from engines.gate.report import SCORES, Spread

MAX_LOSS_POINTS = 2.0
"""How far the student's accuracy may lie below that of the teacher's guided steps."""
MAX_RENDERS_POINTS = 1.0
"""How much farther from real renders it may be than they are."""
MAX_FRECHET_POINTS = 5.0
"""Without a judge: how much farther from the teacher's pictures than other such pictures."""
MAX_SCORE_POINTS = 0.5
"""Without a judge: how far a score, 100 times a cosine, may lie below that of many guided steps."""


@dataclass(frozen=True, slots=True)
class Criterion:
    """One condition of passing."""

    text: str
    passed: bool


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows that decide.

    Attributes:
        student: at its default number of steps.
        models: the teacher's guided rows that it is held to: of most steps, and of as many as its own.
        rivals: the teacher's rows of as many evaluations, which it must beat.
    """

    student: Summary
    models: tuple[Summary, ...]
    rivals: tuple[Summary, ...]


def _decisive(summaries: Mapping[str, Summary], num_steps: int, teacher_steps: int) -> _Rows | Criterion:
    models = dict.fromkeys([f"teacher-{teacher_steps}-cfg", f"teacher-{num_steps}-cfg"])
    rivals = [f"teacher-{num_steps}"] + ([f"teacher-{num_steps // 2}-cfg"] if num_steps % 2 == 0 else [])
    missing = [key for key in [f"student-{num_steps}", *models, *rivals] if key not in summaries]
    if missing:
        return Criterion(f"student, {num_steps} steps, not measured: {', '.join(missing)}", passed=False)
    return _Rows(
        summaries[f"student-{num_steps}"],
        tuple(summaries[key] for key in models),
        tuple(summaries[key] for key in rivals),
    )


def _frechet(ours: Summary, theirs: Summary) -> tuple[str, Difference]:
    """The numbers in words, and the difference."""
    difference = Difference.of(
        [one.frechet for one in ours.measurements], [one.frechet for one in theirs.measurements]
    )
    return f"{ours.frechet.mean:.2f} against {theirs.frechet.mean:.2f} %, difference {difference}", difference


def _accuracy(ours: Summary, theirs: Summary, group: str) -> tuple[str, Difference]:
    difference = Difference.of(
        [one.accuracy[group] for one in ours.measurements],
        [one.accuracy[group] for one in theirs.measurements],
    )
    means = f"{ours.accuracy[group].mean:.1f} against {theirs.accuracy[group].mean:.1f} %"
    return f"{means}, difference {difference}", difference


def _score(ours: Summary, theirs: Summary, name: str) -> tuple[str, Difference]:
    difference = Difference.of(
        [one.scores[name] for one in ours.measurements], [one.scores[name] for one in theirs.measurements]
    )
    means = f"{ours.scores[name].mean:.2f} against {theirs.scores[name].mean:.2f}"
    return f"{means}, difference {difference}", difference


def check_own(summaries: Mapping[str, Summary], num_steps: int, teacher_steps: int) -> list[Criterion]:
    """Compare the student of a model that somebody brought, at `num_steps`, with its teacher.

    Its distance to the teacher's pictures of `teacher_steps` guided steps may be at most `MAX_FRECHET_POINTS`
    larger than that of other such pictures, which sampling alone causes, and than that of the teacher's of as
    many guided steps as its own; its scores may be at most `MAX_SCORE_POINTS` lower than theirs; and it has
    to be closer than the teacher at the same number of evaluations. What decides is the end of an interval,
    see `Difference`.

    Returns:
        As `check`.
    """
    rows = _decisive(summaries, num_steps, teacher_steps)
    if isinstance(rows, Criterion):
        return [rows]
    student, name = rows.student, f"student, {num_steps} steps,"
    best = rows.models[0].row.label
    criteria = []
    for model in rows.models:
        numbers, apart = _frechet(student, model)
        criteria.append(
            Criterion(
                f"{name} is at most {MAX_FRECHET_POINTS:g} points of Fréchet distance farther from pictures "
                f"of {best}, than others of {model.row.label} are: {numbers}",
                apart.highest <= MAX_FRECHET_POINTS,
            )
        )
        for score in student.scores:
            numbers, apart = _score(student, model, score)
            criteria.append(
                Criterion(
                    f"{name} loses at most {MAX_SCORE_POINTS:g} points of {SCORES[score]} to "
                    f"{model.row.label}: {numbers}",
                    apart.lowest >= -MAX_SCORE_POINTS,
                )
            )
    for rival in rows.rivals:
        numbers, apart = _frechet(student, rival)
        text = f"{name} is closer to them than {rival.row.label}: Fréchet distance {numbers}"
        criteria.append(Criterion(text, apart.highest < 0.0))
    return criteria


def check(
    summaries: Mapping[str, Summary], num_steps: int, teacher_steps: int, group: tuple[str, str]
) -> list[Criterion]:
    """Compare the student at `num_steps` with its teacher.

    It may lose at most `MAX_LOSS_POINTS` of accuracy, of the first kind of prompts and over all, and
    `MAX_RENDERS_POINTS` of Fréchet distance, to the teacher's `teacher_steps` guided steps and to the
    teacher's `num_steps` guided steps; and it has to beat the teacher at the same number of evaluations: as
    many steps without guidance, and, for an even number, half as many with it, in accuracy over all prompts
    and in Fréchet distance. What decides is the end of an interval, see `Difference`.

    Args:
        group: the first kind of prompts, and what it is called.
    Returns:
        Criteria with the numbers that decided them; one that needs a row which was not measured fails.
    """
    rows = _decisive(summaries, num_steps, teacher_steps)
    if isinstance(rows, Criterion):
        return [rows]
    student, name = rows.student, f"student, {num_steps} steps,"
    criteria = []
    for model in rows.models:
        for key, called in (group, ("all", "all prompts")):
            numbers, more = _accuracy(student, model, key)
            text = f"{name} loses at most {MAX_LOSS_POINTS:g} points of accuracy ({called}) to "
            text += f"{model.row.label}: {numbers}"
            criteria.append(Criterion(text, more.lowest >= -MAX_LOSS_POINTS))
        numbers, apart = _frechet(student, model)
        text = f"{name} is at most {MAX_RENDERS_POINTS:.1f} points of Fréchet distance farther from real "
        text += f"renders than {model.row.label}: {numbers}"
        criteria.append(Criterion(text, apart.highest <= MAX_RENDERS_POINTS))
    for rival in rows.rivals:
        numbers, more = _accuracy(student, rival, "all")
        text = f"{name} is read right more often than {rival.row.label}: {numbers} of all prompts"
        criteria.append(Criterion(text, more.lowest > 0.0))
        numbers, apart = _frechet(student, rival)
        text = f"{name} is closer to real renders than {rival.row.label}: Fréchet distance {numbers}"
        criteria.append(Criterion(text, passed=apart.highest < 0.0))
    return criteria


def make_report(
    student: Student,
    setup: Mapping[str, Any],
    measured: Measured,
    teacher_steps: int,
    costs: Mapping[str, Cost] | None = None,
) -> dict[str, Any]:
    """Put measurements and verdict together, ready for JSON.

    Args:
        setup: how it was measured; its `groups` are the kinds of prompts and what they are called.
        measured: all rows.
        teacher_steps: the teacher's step count that the student is held to.
        costs: per key of a row, where they were measured.
    """
    summaries = {row.key: Summary.of(row, measurements) for row, measurements in measured}
    kinds = list(setup["groups"].items())
    if kinds:
        criteria = check(summaries, student.default_num_steps, teacher_steps, kinds[0])
    else:
        criteria = check_own(summaries, student.default_num_steps, teacher_steps)
    best = f"teacher-{teacher_steps}-cfg"
    by_key = {row.key: measurements for row, measurements in measured}
    yardstick = by_key.get("real") or by_key.get(best)
    return {
        "schema_version": 2,
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
                "accuracy": {name: asdict(spread) for name, spread in summaries[row.key].accuracy.items()},
                "frechet": asdict(summaries[row.key].frechet),
                "scores": {name: asdict(spread) for name, spread in summaries[row.key].scores.items()},
                "diversity": _diversity(measurements, yardstick),
                "cost": asdict(costs[row.key]) if costs and row.key in costs else None,
                "seeds": [asdict(measurement) for measurement in measurements],
            }
            for row, measurements in measured
        ],
        "differences": [
            difference(row, measurements, best, by_key[best])
            for row, measurements in measured
            if row.source == "student" and best in by_key
        ],
    }


def _diversity(
    measurements: Sequence[Measurement], yardstick: Sequence[Measurement] | None
) -> dict[str, float] | None:
    """Mean and sd over seeds of the diversity, in percent of the yardstick's; None where it is not known."""
    shares = [
        100.0 * ours.diversity / theirs.diversity
        for ours, theirs in zip(measurements, yardstick or (), strict=False)
        if ours.diversity is not None and theirs.diversity
    ]
    return asdict(Spread.of(shares)) if shares else None


def record_verdict(student: Path, report: dict[str, Any]) -> None:
    """Write the verdict and the table's means into `student.json`, where bundles and servers find it.

    Of the examples only those stay that were accepted.
    """
    description = read_json(student / STUDENT)
    examples = report.get("examples", [])
    description["examples"] = [one["prompt"] for one in examples if one["accepted"]]
    description["gate"] = {
        "passed": report["passed"],
        "criteria": report["criteria"],
        "setup": report["setup"],
        "examples": examples,
        "rows": [
            {
                "key": row["key"],
                "nfe": row["nfe"],
                "accuracy": {group: round(spread["mean"], 2) for group, spread in row["accuracy"].items()},
                "frechet": round(row["frechet"]["mean"], 3),
                "scores": {name: round(spread["mean"], 3) for name, spread in row["scores"].items()},
                "diversity": None if row["diversity"] is None else round(row["diversity"]["mean"], 1),
                "seconds": None if row["cost"] is None else round(row["cost"]["seconds"], 4),
            }
            for row in report["rows"]
        ],
    }
    write_json(student / STUDENT, description)
