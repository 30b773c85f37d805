"""`python -m tests.mutants [--only WORDS]`: do the tests notice?

Breaks copies of the project, one change at a time, and runs the tests that each change concerns.

Prints a table; the exit status is 1 if a mutant survived, or if tests fail on the unbroken copy.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.catalog import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
OPTIONS = ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-x"]
LIMIT_S = 900


def copy_project(folder: Path) -> None:
    """What git would commit."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def arguments(tests: str) -> list[str]:
    """pytest's arguments: files, and behind -k an expression with spaces."""
    files, _, expression = tests.partition(" -k ")
    return [*shlex.split(files), *(["-k", expression] if expression else [])]


def run_tests(folder: Path, tests: str) -> tuple[bool, str]:
    """Whether they pass, and the last words of pytest."""
    command = [sys.executable, "-m", "pytest", *OPTIONS, *arguments(tests)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return False, f"no end after {LIMIT_S} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    said = failed[0].split(" - ")[0] if failed else (done.stdout.splitlines() or [done.stderr[-200:]])[-1]
    return done.returncode == 0, said


def try_mutant(folder: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether the tests noticed, and which did."""
    path = folder / mutant.path
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.before) == 1, f"{mutant.name}: not found once in {mutant.path}"
    path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
    try:
        passed, said = run_tests(folder, mutant.tests)
    finally:
        path.write_text(text, encoding="utf-8")
    return not passed, said


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="those with these words in name or path")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies that are tried at once")
    options = parser.parse_args(argv)
    chosen = [one for one in MUTANTS if options.only in f"{one.name} {one.path}"]
    survived = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as box, ThreadPoolExecutor(options.jobs) as pool:
        folders: SimpleQueue[Path] = SimpleQueue()
        for number in range(options.jobs):
            copy_project(Path(box) / str(number))
            folders.put(Path(box) / str(number))

        def with_folder(work: Callable[..., tuple[bool, str]], argument: object) -> tuple[bool, str, float]:
            folder = folders.get()
            started = time.monotonic()
            try:
                return *work(folder, argument), time.monotonic() - started
            finally:
                folders.put(folder)

        suites = list(dict.fromkeys(one.tests for one in chosen))
        for tests, (passed, said, spent_s) in zip(
            suites, pool.map(lambda tests: with_folder(run_tests, tests), suites), strict=True
        ):
            state = "passes" if passed else "FAILS"
            print(f"{state} unbroken  {spent_s:6.1f} s  {tests}: {said}", flush=True)
            if not passed:
                return 1
        for mutant, (caught, said, spent_s) in zip(
            chosen, pool.map(lambda one: with_folder(try_mutant, one), chosen), strict=True
        ):
            verdict = "caught  " if caught else "SURVIVED"
            print(f"{verdict}  {spent_s:6.1f} s  {mutant.path}: {mutant.name}  [{said}]", flush=True)
            survived += [] if caught else [mutant]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
