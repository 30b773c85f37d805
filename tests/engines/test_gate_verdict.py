"""What a student must reach, and how sure that it does."""

from pathlib import Path

import numpy as np
import pytest

from engines.families.student import read_student
from engines.gate.measurement import Difference, Measurement, Row, Summary, difference
from engines.gate.verdict import check, record_verdict
from tests.engines.tiny import make_tiny_checkpoint


def summaries(**points: tuple[float, float, float]) -> dict[str, Summary]:
    """Rows by key (`_` for `-`): one-object accuracy, accuracy over all, Fréchet distance."""
    out = {}
    for name, (one, overall, frechet) in points.items():
        row = Row(name.replace("_", "-"), name, "teacher", 4)
        accuracy = {"one_object": one, "two_objects": overall, "held_out": overall, "all": overall}
        out[row.key] = Summary.of(row, [Measurement(accuracy, frechet)] * 2)
    return out


KIND = ("one_object", "one object")
GOOD = {
    "teacher_50_cfg": (95.0, 70.0, 2.5),
    "teacher_4_cfg": (94.0, 67.0, 3.5),
    "teacher_4": (80.0, 50.0, 9.0),
    "teacher_2_cfg": (81.0, 51.0, 8.0),
    "student_4": (93.5, 69.0, 3.0),
}


def test_good_student_passes_every_criterion() -> None:
    criteria = check(summaries(**GOOD), 4, 50, KIND)
    assert len(criteria) == 10
    assert all(criterion.passed for criterion in criteria)
    assert "93.5 against 95.0" in criteria[0].text


@pytest.mark.parametrize(
    ("student", "failing"),
    [
        ((92.9, 69.0, 3.0), ["(one object) to teacher_50_cfg"]),
        ((93.5, 67.9, 3.0), ["(all prompts) to teacher_50_cfg"]),
        ((93.5, 69.0, 3.6), ["farther from real renders than teacher_50_cfg"]),
        (
            (91.9, 64.9, 4.6),
            [
                "(one object) to teacher_50_cfg", "(all prompts) to teacher_50_cfg", "than teacher_50_cfg",
                "(one object) to teacher_4_cfg", "(all prompts) to teacher_4_cfg", "than teacher_4_cfg",
            ],
        ),
    ],
)  # fmt: skip
def test_student_fails_what_it_does_not_reach(
    student: tuple[float, float, float], failing: list[str]
) -> None:
    failed = [
        criterion.text
        for criterion in check(summaries(**{**GOOD, "student_4": student}), 4, 50, KIND)
        if not criterion.passed
    ]
    assert len(failed) == len(failing)
    assert all(part in text for part, text in zip(failing, failed, strict=True))


@pytest.mark.parametrize("rival", ["teacher_4", "teacher_2_cfg"])
def test_student_that_is_only_as_good_as_its_teacher_at_equal_cost_fails(rival: str) -> None:
    rows = {**GOOD, rival: (80.0, 69.0, 3.0)}
    failed = [criterion.text for criterion in check(summaries(**rows), 4, 50, KIND) if not criterion.passed]
    assert len(failed) == 2
    assert f"more often than {rival}: 69.0 against 69.0" in failed[0]
    assert f"than {rival}: Fréchet distance 3.00 against 3.00" in failed[1]


def test_odd_number_of_steps_has_only_the_unguided_rival() -> None:
    rows = {"teacher_50_cfg": GOOD["teacher_50_cfg"], "teacher_1": GOOD["teacher_4"]}
    rows["teacher_1_cfg"] = GOOD["teacher_4_cfg"]
    criteria = check(summaries(**rows, student_1=GOOD["student_4"]), 1, 50, KIND)
    assert [criterion.passed for criterion in criteria] == [True] * 8


def measured_as(key: str, *one_object: float) -> Summary:
    """A row by its accuracy at each seed; the other numbers are those of a good student."""
    rows = [Measurement({"one_object": one, "all": 69.0}, 3.0) for one in one_object]
    return Summary.of(Row(key, key, "teacher", 4), rows)


@pytest.mark.parametrize(
    ("ours", "passes"),
    [
        ([94.0, 94.0, 94.0, 94.0], True),  # one point less, at every seed
        ([91.0, 96.0, 92.0, 97.0], False),  # one point less on average, or three, or none
        ([94.5], False),  # of one seed nothing follows
    ],
)
def test_student_is_as_good_as_its_teacher_only_if_that_is_no_luck(ours: list[float], passes: bool) -> None:
    rows = summaries(**GOOD)
    for key, values in (("student-4", ours), ("teacher-50-cfg", [95.0] * len(ours))):
        rows[key] = measured_as(key, *values)
    for key in ("teacher-4-cfg", "teacher-4", "teacher-2-cfg"):
        rows[key] = Summary.of(rows[key].row, rows[key].measurements[:1] * len(ours))
    first = check(rows, 4, 50, KIND)[0]
    assert "(one object) to teacher-50-cfg" in first.text
    assert first.passed == passes


def test_interval_is_that_of_students_t() -> None:
    found = Difference.of([3.0, 4.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0])
    reach = 2.353 * np.std([2, 3, 1, 2], ddof=1) / 2
    assert (found.lowest, found.highest) == pytest.approx((2.0 - reach, 2.0 + reach))
    assert str(found) == f"+2.00 (90 % interval {2 - reach:+.2f} to {2 + reach:+.2f})"
    assert (Difference.of([1.0], [0.0]).lowest, Difference.of([1.0], [0.0]).highest) == (-np.inf, np.inf)


def test_difference_is_what_the_row_has_more_and_how_sure_that_is() -> None:
    def measured(values: list[tuple[float, float, float]]) -> list[Measurement]:
        return [Measurement({"all": one}, two, scores={"clip": three}) for one, two, three in values]

    ours = measured([(80.0, 5.0, 31.0), (82.0, 6.0, 31.5), (84.0, 4.0, 32.0)])
    theirs = measured([(85.0, 2.0, 30.0), (86.0, 2.0, 30.0), (87.0, 2.0, 30.0)])
    row = Row("student-4", "student, 4 steps", "student", 4)
    found = difference(row, ours, "teacher-50-cfg", theirs)
    for name, each in (("accuracy", [-5, -4, -3]), ("frechet", [3, 4, 2]), ("clip", [1, 1.5, 2])):
        error = np.std(each, ddof=1) / np.sqrt(3)
        assert found[name] == pytest.approx({"mean": np.mean(each), "standard_error": error})
    assert difference(row, ours[:1], "x", theirs[:1])["frechet"] == {"mean": 3.0, "standard_error": None}


def test_rows_that_were_not_measured_fail() -> None:
    rows = summaries(**GOOD)
    del rows["teacher-4"]
    (criterion,) = check(rows, 4, 50, KIND)
    assert not criterion.passed
    assert "teacher-4" in criterion.text


def test_verdict_survives_in_student_json(tmp_path: Path) -> None:
    student = make_tiny_checkpoint(tmp_path / "student")
    spread = {"mean": 1.23456, "sd": 0.0}
    row = {"key": "student-4", "nfe": 4, "accuracy": {"all": spread}, "frechet": spread}
    row |= {"diversity": spread, "cost": {"seconds": 0.123456, "paired": 1.0}, "scores": {}}
    record_verdict(student, {"passed": True, "criteria": [], "setup": {}, "rows": [row]})
    gate = read_student(student).gate
    assert gate is not None
    assert gate["passed"] is True
    assert gate["rows"] == [
        {
            "key": "student-4",
            "nfe": 4,
            "accuracy": {"all": 1.23},
            "frechet": 1.235,
            "scores": {},
            "diversity": 1.2,
            "seconds": 0.1235,
        }
    ]
