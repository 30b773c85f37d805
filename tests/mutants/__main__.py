"""`python -m tests.mutants [--only WORDS ...] [--jobs N]`: do the tests notice?

Breaks copies of the project, one change at a time, and runs the tests that each change concerns.

Prints a table. Exit status: 0 if all mutants were caught; 1 if one survived; 2 if nothing can be said: a
change does not fit the code, tests fail on the unbroken copy, or pytest could not run them on a broken one.
"""

from __future__ import annotations

import argparse
import enum
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import pytest

from tests.mutants.catalog import MUTANTS
from tests.mutants.mutant import Mutant
from tests.mutants.warm import NO_END

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
OPTIONS = [
    "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-x", "-W", "ignore::pytest.PytestAssertRewriteWarning",
    "--hypothesis-profile=ci",  # the same examples every time, and no deadlines: a slow machine catches none
]  # fmt: skip


class Fate(enum.Enum):
    """What became of a mutant."""

    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    UNTESTED = "UNTESTED"
    """Pytest neither passed nor failed: it found no tests, or could not import them."""


class Ran(NamedTuple):
    """A run of pytest: its exit status, or `NO_END`, and its telling words."""

    status: int
    said: str

    @property
    def fate(self) -> Fate:
        """Of the mutant that it was run on."""
        if self.status == pytest.ExitCode.OK:
            return Fate.SURVIVED
        return Fate.CAUGHT if self.status in (pytest.ExitCode.TESTS_FAILED, NO_END) else Fate.UNTESTED


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


class Copy:
    """A copy of the project in which tests run, one run at a time, until it is closed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._words = folder.with_suffix(".words")
        copy_project(folder)
        self._warm = subprocess.Popen(
            [sys.executable, "-m", "tests.mutants.warm"], cwd=folder, env=ENVIRONMENT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def close(self) -> None:
        """End the process that runs tests."""
        self._warm.communicate()

    def run(self, tests: str) -> Ran:
        """Run tests as the copy is now."""
        assert self._warm.stdin is not None
        assert self._warm.stdout is not None
        print(
            json.dumps([[*OPTIONS, *arguments(tests)], str(self._words)]), file=self._warm.stdin, flush=True
        )
        status = int(self._warm.stdout.readline())
        lines = self._words.read_text(encoding="utf-8", errors="replace").splitlines()
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        if status == NO_END:
            return Ran(status, "no end")
        return Ran(status, failed[0].split(" - ")[0] if failed else (lines or ["no words"])[-1])

    def run_broken(self, mutant: Mutant) -> Ran:
        """Make a mutant's change, run its tests, and take the change back."""
        path = self.folder / mutant.path
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        try:
            return self.run(mutant.tests)
        finally:
            path.write_text(text, encoding="utf-8")


def shown(verdict: str, spent_s: float, what: str, ran: Ran) -> None:
    """Print a line of the table."""
    print(f"{verdict:9} {spent_s:6.1f} s  {what}  [{ran.said}]", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORDS", help="those with these words in name or path"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies that are tried at once")
    options = parser.parse_args(argv)
    words = options.only or [""]
    chosen = [one for one in MUTANTS if any(each in f"{one.name} {one.path}" for each in words)]
    unfit = [one for one in chosen if (ROOT / one.path).read_text(encoding="utf-8").count(one.before) != 1]
    for mutant in unfit:
        print(f"does not fit: {mutant.path}: {mutant.name}: {mutant.before!r} is not there once")
    if not chosen:
        print(f"no mutant has {' or '.join(words)!r} in name or path")
        return 2
    if unfit:
        print(f"{len(unfit)} of {len(chosen)} chosen mutants do not fit the code: nothing was tried")
        return 2
    with tempfile.TemporaryDirectory(prefix="mutants-") as box, ExitStack() as stack:
        free: SimpleQueue[Copy] = SimpleQueue()
        for number in range(options.jobs):
            copy = Copy(Path(box) / str(number))
            stack.callback(copy.close)
            free.put(copy)
        pool = stack.enter_context(ThreadPoolExecutor(options.jobs))

        def timed(work: Callable[[Copy], Ran]) -> tuple[Ran, float]:
            copy, started = free.get(), time.monotonic()
            try:
                return work(copy), time.monotonic() - started
            finally:
                free.put(copy)

        suites = list(dict.fromkeys(one.tests for one in chosen))
        failing = []
        for tests, (ran, spent_s) in zip(
            suites, pool.map(lambda tests: timed(lambda copy: copy.run(tests)), suites), strict=True
        ):
            passes = ran.status == pytest.ExitCode.OK
            shown("passes" if passes else "FAILS", spent_s, f"unbroken: {tests}", ran)
            failing += [] if passes else [tests]
        if failing:
            print(f"{len(failing)} of {len(suites)} suites fail on the unbroken copy: no mutant was tried")
            return 2
        fates: Counter[Fate] = Counter()
        for mutant, (ran, spent_s) in zip(
            chosen, pool.map(lambda one: timed(lambda copy: copy.run_broken(one)), chosen), strict=True
        ):
            shown(ran.fate.value, spent_s, f"{mutant.path}: {mutant.name}", ran)
            fates[ran.fate] += 1
    print(", ".join(f"{fates[fate]} {fate.value}" for fate in Fate) + f" of {len(chosen)} mutants")
    if fates[Fate.UNTESTED]:
        return 2
    return 1 if fates[Fate.SURVIVED] else 0


if __name__ == "__main__":
    sys.exit(main())
