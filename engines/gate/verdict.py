"""From measurements to a verdict: what a student must reach, and whether it does."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from engines.families.checkpoint import read_json
from engines.families.student import STUDENT, Student
from engines.files import write_json
from engines.gate.report import SCORES, Spread

MAX_LOSS_POINTS = 2.0
"""How far the student's accuracy of the first kind of prompts may lie below that of many guided steps."""
MAX_FRECHET_POINTS = 5.0
"""Without a judge: how much farther from the teacher's pictures than other such pictures."""
MAX_SCORE_POINTS = 0.5
"""Without a judge: how far a score, 100 times a cosine, may lie below that of many guided steps."""


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
        accuracy: percent of pictures that show all that was asked, per kind of prompt and over "all"; empty
            where there is no judge.
        frechet: Fréchet distance to real renders, or to the teacher's pictures, in percent of their variance.
        diversity: mean distance of two pictures of one prompt, in the same features.
        scores: mean over pictures of each score, by its name.
    """

    accuracy: dict[str, float]
    frechet: float
    diversity: float | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one row takes, and what comes of it from the same noise.

    Attributes:
        seconds: per picture, prompts to pixels.
        paired: distance to the teacher's pictures of most steps, in percent of that between its own pictures
            of different prompts.
    """

    seconds: float
    paired: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One row over all seeds."""

    row: Row
    accuracy: dict[str, Spread]
    frechet: Spread
    scores: dict[str, Spread]

    @classmethod
    def of(cls, row: Row, measurements: Sequence[Measurement]) -> Summary:
        return cls(
            row,
            {
                group: Spread.of([one.accuracy[group] for one in measurements])
                for group in measurements[0].accuracy
            },
            Spread.of([one.frechet for one in measurements]),
            {name: Spread.of([one.scores[name] for one in measurements]) for name in measurements[0].scores},
        )


@dataclass(frozen=True, slots=True)
class Criterion:
    """One condition of passing."""

    text: str
    passed: bool


def check_own(summaries: Mapping[str, Summary], num_steps: int, teacher_steps: int) -> list[Criterion]:
    """Compare the student of a model that somebody brought, at `num_steps`, with its teacher.

    Its distance to the teacher's pictures of `teacher_steps` guided steps may be at most `MAX_FRECHET_POINTS`
    larger than that of other such pictures, which sampling alone causes; its scores may be at most
    `MAX_SCORE_POINTS` lower; and it has to be closer than the teacher at the same number of evaluations.

    Returns:
        As `check`.
    """
    name, needed = f"student, {num_steps} steps,", _needed(num_steps, teacher_steps)
    missing = [key for key in needed if key not in summaries]
    if missing:
        return [Criterion(f"{name} not measured: {', '.join(missing)}", passed=False)]
    student, best, *rivals = (summaries[key] for key in needed)
    ours, theirs = student.frechet, best.frechet
    criteria = [
        Criterion(
            f"{name} is at most {MAX_FRECHET_POINTS:g} points of Fréchet distance farther from pictures of "
            f"{best.row.label}, than others of them are: {ours.mean:.2f} against {theirs.mean:.2f} %",
            ours.mean <= theirs.mean + MAX_FRECHET_POINTS,
        )
    ]
    for score in student.scores:
        ours, theirs = student.scores[score], best.scores[score]
        criteria.append(
            Criterion(
                f"{name} loses at most {MAX_SCORE_POINTS:g} points of {SCORES[score]} to {best.row.label}: "
                f"{ours.mean:.2f} against {theirs.mean:.2f}",
                ours.mean >= theirs.mean - MAX_SCORE_POINTS,
            )
        )
    for rival in rivals:
        ours, theirs = student.frechet, rival.frechet
        numbers = f"{ours.mean:.2f} against {theirs.mean:.2f} %"
        text = f"{name} is closer to them than {rival.row.label}: Fréchet distance {numbers}"
        criteria.append(Criterion(text, ours.mean < theirs.mean))
    return criteria


def _needed(num_steps: int, teacher_steps: int) -> list[str]:
    """Rows that decide: the student, the teacher's best, and the teacher at as many evaluations."""
    rivals = [f"teacher-{num_steps}"] + ([f"teacher-{num_steps // 2}-cfg"] if num_steps % 2 == 0 else [])
    return [f"student-{num_steps}", f"teacher-{teacher_steps}-cfg", *rivals]


def check(
    summaries: Mapping[str, Summary], num_steps: int, teacher_steps: int, group: tuple[str, str]
) -> list[Criterion]:
    """Compare the student at `num_steps` with its teacher.

    It may lose at most `MAX_LOSS_POINTS` of the accuracy of the first kind of prompts to the teacher's
    `teacher_steps` guided steps, and it has to beat the teacher at the same number of evaluations: as many
    steps without guidance, and, for an even number, half as many with it, in accuracy over all prompts and in
    Fréchet distance.

    Args:
        group: the first kind of prompts, and what it is called.
    Returns:
        Criteria with the numbers that decided them; one that needs a row which was not measured fails.
    """
    name = f"student, {num_steps} steps,"
    needed = _needed(num_steps, teacher_steps)
    missing = [key for key in needed if key not in summaries]
    if missing:
        return [Criterion(f"{name} not measured: {', '.join(missing)}", passed=False)]
    student, best = summaries[needed[0]], summaries[needed[1]]
    key, called = group
    ours, theirs = student.accuracy[key].mean, best.accuracy[key].mean
    criteria = [
        Criterion(
            f"{name} loses at most {MAX_LOSS_POINTS:g} points of accuracy ({called}) to {best.row.label}: "
            f"{ours:.1f} against {theirs:.1f} %",
            ours >= theirs - MAX_LOSS_POINTS,
        )
    ]
    for rival in (summaries[key] for key in needed[2:]):
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


Measured = Sequence[tuple[Row, Sequence[Measurement]]]
"""Rows in the table's order, with one measurement per seed."""


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


def difference(
    row: Row, ours: Sequence[Measurement], best: str, theirs: Sequence[Measurement]
) -> dict[str, Any]:
    """How a row differs from another over the same prompts and noise: mean, and standard error over seeds.

    A standard error is None with one seed.
    """
    values = {"frechet": [a.frechet - b.frechet for a, b in zip(ours, theirs, strict=True)]}
    if "all" in ours[0].accuracy:
        values["accuracy"] = [
            a.accuracy["all"] - b.accuracy["all"] for a, b in zip(ours, theirs, strict=True)
        ]
    for name in ours[0].scores:
        values[name] = [a.scores[name] - b.scores[name] for a, b in zip(ours, theirs, strict=True)]
    return {
        "key": row.key,
        "label": row.label,
        "against": best,
        **{
            name: {
                "mean": statistics.fmean(each),
                "standard_error": statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None,
            }
            for name, each in values.items()
        },
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
                "scores": {name: round(spread["mean"], 3) for name, spread in row["scores"].items()},
                "diversity": None if row["diversity"] is None else round(row["diversity"]["mean"], 1),
                "seconds": None if row["cost"] is None else round(row["cost"]["seconds"], 4),
            }
            for row in report["rows"]
        ],
    }
    write_json(student / STUDENT, description)
