"""The mutants of `make mutants` fit the code as it is; whether tests catch them is asked there, by a tool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.mutants import __main__ as tool
from tests.mutants.__main__ import ROOT
from tests.mutants.catalog import MUTANTS
from tests.mutants.mutant import Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_changes_one_place_and_leaves_a_program(mutant: Mutant) -> None:
    text = (ROOT / mutant.path).read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1
    assert mutant.before != mutant.after
    if mutant.path.endswith(".py"):
        compile(text.replace(mutant.before, mutant.after), mutant.path, "exec")


def test_names_tell_them_apart() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 150


# The tool, on a project of one function

HALF = "def half(number: float) -> float:\n    return number / 2\n"
pytestmark = pytest.mark.slow

TESTED = "from half import half\n\n\ndef test_half() -> None:\n    assert half(4) == 2\n"


def change(after: str, *, before: str = "number / 2", tests: str = "tests/test_half.py") -> Mutant:
    return Mutant(f"it is {after!r}", "half.py", before, after, tests)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the tool's own process that runs tests, which imports nothing else."""
    folder = tmp_path / "project"
    (folder / "tests" / "mutants").mkdir(parents=True)
    for name in ("tests/__init__.py", "tests/mutants/__init__.py"):
        (folder / name).touch()
    warm = (ROOT / "tests" / "mutants" / "warm.py").read_text(encoding="utf-8").splitlines()
    lines = ["SLOW = ()" if line.startswith("SLOW = ") else line for line in warm]
    assert lines != warm
    (folder / "tests" / "mutants" / "warm.py").write_text("\n".join(lines))
    (folder / "half.py").write_text(HALF)
    (folder / "tests" / "test_half.py").write_text(TESTED)
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    monkeypatch.setattr(tool, "ROOT", folder)
    return folder


def tried(monkeypatch: pytest.MonkeyPatch, *mutants: Mutant) -> int:
    monkeypatch.setattr(tool, "MUTANTS", mutants)
    return tool.main(["--jobs", "1"])


def test_mutants_that_tests_notice_are_caught_and_the_others_survive(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tried(monkeypatch, change("number * 2"), change("2.0")) == 1
    said = capsys.readouterr().out
    assert "half.py: it is 'number * 2'  [FAILED tests/test_half.py::test_half]" in said
    assert "SURVIVED" in said.splitlines()[-2]  # hence the first change was taken back
    assert said.splitlines()[-1] == "1 caught, 1 SURVIVED, 0 UNTESTED of 2 mutants"
    assert (project / "half.py").read_text() == HALF
    assert tried(monkeypatch, change("number * 2")) == 0


def test_mutant_whose_tests_never_end_is_caught(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warm = project / "tests" / "mutants" / "warm.py"
    patient = warm.read_text()
    # the tests of the unbroken project take a third of a second, and must end in it on a busy machine, too
    warm.write_text(patient.replace("LIMIT_S = 900", "LIMIT_S = 15"))
    assert warm.read_text() != patient
    endless = change("    __import__('time').sleep(1e6)\n", before="    return number / 2\n")
    assert tried(monkeypatch, endless) == 0
    assert "[no end]" in capsys.readouterr().out


def test_failure_of_the_unbroken_project_is_no_catch(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "tests" / "test_half.py").write_text(TESTED.replace("== 2", "== 3"))
    assert tried(monkeypatch, change("number * 2")) == 2
    said = capsys.readouterr().out
    assert said.startswith("FAILS ")
    assert said.endswith("1 of 1 suites fail on the unbroken copy: no mutant was tried\n")
    assert "half.py: it is" not in said


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize("before", ["number / 3", "number"])
def test_mutant_that_does_not_fit_is_an_error(
    before: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tried(monkeypatch, change("number * 2"), change("0", before=before)) == 2
    said = capsys.readouterr().out
    assert said.startswith(f"does not fit: half.py: it is '0': {before!r}")
    assert said.endswith("1 of 2 chosen mutants do not fit the code: nothing was tried\n")


@pytest.mark.usefixtures("project")
def test_mutant_that_no_test_could_look_at_is_no_catch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unimportable = change("number / 2\n\nraise ImportError", before="number / 2")
    assert tried(monkeypatch, unimportable) == 2
    assert capsys.readouterr().out.endswith("0 caught, 0 SURVIVED, 1 UNTESTED of 1 mutants\n")
    assert tried(monkeypatch, change("0", tests="tests/test_half.py -k nothing")) == 2
    assert "FAILS" in capsys.readouterr().out
