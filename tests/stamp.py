"""A stamp for tests that cost much and concern little: those of `engines` and of what measures it.

They compile, export and train for a third of a whole run's time, and depend on nothing but what is hashed
here. Once they have passed, `python -m tests.stamp` writes the hash down; as long as it is the same, a run of
everything leaves them out and says so. `--all` runs them, and so does naming one. A change in any of these
files runs them again by itself.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAMP = ROOT / "tests/engines/passed.sha256"
TESTS = ("tests/engines", "tests/test_distill_benchmark.py", "tests/test_witness.py")
DEPENDS_ON = (
    *TESTS,
    *("engines", "loadtests/distill", "loadtests/witness", "loadtests/machine.py", "loadtests/process.py"),
    *("loadtests/gpu.sh", "tests/conftest.py", "tests/shared.py", "tests/ports.py"),
    *("constraints.txt", "pyproject.toml"),
)


def files() -> Iterator[Path]:
    """Everything that the tests depend on, in order; not what running them leaves behind."""
    for name in DEPENDS_ON:
        path = ROOT / name
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        yield from (one for one in found if one.is_file() and "__pycache__" not in one.parts and one != STAMP)


def digest() -> str:
    """Hash of their names and contents."""
    whole = hashlib.sha256()
    for path in files():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        whole.update(f"{content} {path.relative_to(ROOT).as_posix()}\n".encode())
    return whole.hexdigest()


def is_covered(test: Path) -> bool:
    """Whether a file of tests is one of them, or a folder that holds nothing else."""
    return any((ROOT / name) in (test, *test.parents) for name in TESTS)


def is_current() -> bool:
    """Whether nothing has changed since they passed."""
    return STAMP.is_file() and STAMP.read_text(encoding="utf-8").strip() == digest()


if __name__ == "__main__":
    STAMP.write_text(digest() + "\n", encoding="utf-8")
    sys.stdout.write(f"{STAMP.relative_to(ROOT)}: left out from now on, until what they depend on changes\n")
