"""Which students are built, and what their bundles say of that. No torch here."""

from __future__ import annotations

from pathlib import Path

from engines.bundle.manifest import GateCriterion, GateVerdict
from engines.errors import CheckpointError
from engines.families.student import STUDENT, Student, read_student


def check_student(directory: Path, *, force: bool, ungated: bool) -> Student:
    """Read a student and refuse one that should not be served.

    Raises:
        CheckpointError: it is no student; or it failed its gate and `force` is off; or it was never gated and
            `ungated` is off.
    """
    student = read_student(directory)
    if student.gate_passed or (ungated if student.gate_passed is None else force):
        return student
    if student.gate_passed is None:
        raise CheckpointError(
            f"{STUDENT}: field gate: this student never went through the quality gate; engines gate "
            f"{directory} measures it, --ungated builds it anyway, and the manifest will say so"
        )
    failed = [criterion.text for criterion in gate_verdict(student).criteria if not criterion.passed]
    raise CheckpointError(
        f"{STUDENT}: field gate.passed: the quality gate refused this student"
        f"{': ' if failed else ''}{'; '.join(failed)}. --force builds it anyway, and the manifest will say so"
    )


def gate_verdict(student: Student) -> GateVerdict:
    """What a manifest says of a student's gate; one that failed was built with --force, one without a
    verdict with --ungated.
    """
    criteria = student.gate.get("criteria", []) if student.gate else []
    return GateVerdict(
        passed=student.gate_passed,
        forced=student.gate_passed is False,
        criteria=tuple(
            GateCriterion(text=str(one.get("text", "")), passed=bool(one.get("passed", False)))
            for one in criteria
        ),
    )
