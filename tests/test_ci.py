"""What CI makes of failures: one that repeats is red, one that does not is a warning that names its test."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

FAILS_ONCE = """
from pathlib import Path

def test_that_fails_beside_others():
    seen = Path(__file__).with_name("seen")
    first = not seen.exists()
    seen.touch()
    assert not first
"""
FAILS_ALWAYS = "def test_that_fails():\n    assert False\n"
PASSES = "def test_that_passes():\n    pass\n"


def run_ci(folder: Path, *args: str, **files: str) -> "subprocess.CompletedProcess[str]":
    """`.ci/tests` over a project of these test files."""
    (folder / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/tests", folder / ".ci/tests")
    (folder / "tests").mkdir()
    for name, text in files.items():
        (folder / "tests" / f"test_{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = ["bash", ".ci/tests", sys.executable, *args]
    # Of pytest's plugins the one that it is about: each process loads them anew.
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "-p xdist"}
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    } | alone
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_whole_suite_that_passes_is_run_once(tmp_path: Path) -> None:
    done = run_ci(tmp_path, a=PASSES, b=PASSES)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    assert "once more" not in done.stdout


def test_what_fails_once_and_passes_alone_is_named_and_lets_the_run_pass(tmp_path: Path) -> None:
    done = run_ci(tmp_path, a=PASSES, b=FAILS_ONCE)
    assert done.returncode == 0, done.stdout
    _, again = done.stdout.split("once more, alone:")
    assert "1 passed" in again
    assert "a bug to mend: tests/test_b.py::test_that_fails_beside_others\n" in again


def test_what_fails_twice_is_red_whatever_else_passes_the_second_time(tmp_path: Path) -> None:
    done = run_ci(tmp_path, a=FAILS_ALWAYS, b=FAILS_ONCE)
    assert done.returncode == 1, done.stdout
    assert "FAILED tests/test_a.py::test_that_fails" in done.stdout.split("once more, alone:")[1]


def test_run_that_could_not_be_gone_through_with_is_red_at_once(tmp_path: Path) -> None:
    done = run_ci(tmp_path, "--no-such-option", a=PASSES)
    assert done.returncode == 4, done.stdout
    assert "once more" not in done.stdout


def test_many_failures_are_not_bad_luck(tmp_path: Path) -> None:
    many = "import pytest\n\n@pytest.mark.parametrize('n', range(21))\ndef test_it(n):\n    assert False\n"
    done = run_ci(tmp_path, a=many)
    assert done.returncode == 1, done.stdout
    assert "21 tests failed" in done.stdout
