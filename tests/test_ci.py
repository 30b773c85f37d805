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
    shutil.copy2(ROOT / "tests/watchdog.py", folder / "tests/watchdog.py")
    for name, text in files.items():
        file = "conftest.py" if name == "conftest" else f"test_{name}.py"
        (folder / "tests" / file).write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\ntimeout = 600\n")
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


HANGS_ONCE = """
import ctypes
import signal
from pathlib import Path

import pytest

@pytest.mark.timeout(1)
def test_that_hangs_beside_others():
    seen = Path(__file__).with_name("seen")
    if not seen.exists():
        seen.touch()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        ctypes.CDLL(None).pause()
"""


def test_what_hangs_where_no_timeout_reaches_is_aborted_and_tried_again(tmp_path: Path) -> None:
    watched = (
        "from tests import watchdog\n"
        "watchdog.GRACE_S, watchdog.PERIOD_S = 0.1, 0.1\n"
        "pytest_configure = watchdog.watch\n"
    )
    done = run_ci(tmp_path, "-p", "pytest_timeout", a=PASSES, b=HANGS_ONCE + PASSES, conftest=watched)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "aborted, as neither its end nor its timeout came: tests/test_b.py::test_that_hangs" in done.stderr
    assert "pause" not in done.stdout
    first, again = done.stdout.split("once more, alone:")
    assert "1 failed, 2 passed" in first
    assert "a bug to mend: tests/test_b.py::test_that_hangs_beside_others\n" in again


def test_process_that_breaks_makes_the_run_red(tmp_path: Path) -> None:
    breaks = """
import os
from tests.watchdog import watch as pytest_configure

def pytest_runtest_protocol():
    raise OSError
"""
    done = run_ci(tmp_path, "-p", "pytest_timeout", a=PASSES, conftest=breaks)
    assert done.returncode == 3, done.stdout


def test_run_that_is_ended_from_outside_names_what_still_ran(tmp_path: Path) -> None:
    ends_the_run = """
import os
import signal

def test_that_hangs():
    os.kill(os.getppid(), signal.SIGTERM)
    signal.pause()
"""
    watched = "from tests.watchdog import watch as pytest_configure\n"
    done = run_ci(tmp_path, "-p", "pytest_timeout", a=ends_the_run, conftest=watched)
    assert done.returncode != 0
    assert (
        "still running when the run was ended from outside: tests/test_a.py::test_that_hangs" in done.stderr
    )
