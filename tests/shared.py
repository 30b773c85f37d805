"""What is dear to make and never written to, made once per test run and shared by xdist's processes."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from server.supervisor.bundles import shipped_student


def make_tiny_checkpoint(directory: Path, **options: Any) -> Path:
    """What the function of this name in `tests.engines.tiny` writes; it imports diffusers when it is called.

    For tests that are collected without the heavy libraries: they would cost each of xdist's processes 5 s.
    """
    from tests.engines import tiny

    return tiny.make_tiny_checkpoint(directory, **options)


def make_tiny_cogvideox(directory: Path, **options: Any) -> Path:
    """The same of a student for clips."""
    from tests.engines import tiny

    return tiny.make_tiny_cogvideox(directory, **options)


def once_per_run(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` has filled, in this process of the run or in another one.

    Args:
        factory: pytest's.
        name: of the folder.
        make: fills the folder that it is given; the others wait for it. If it fails, the next one tries.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder.with_suffix(".done")
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            done.touch()
    return folder


@contextmanager
def tmpfs(folder: Path, options: str) -> Iterator[Path]:
    """A file system in memory, mounted with these options on a new folder; skips where none may be.

    It goes once the last file in it is closed: memory that is mapped, and libraries, outlive a test.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def tiny_bundle(factory: pytest.TempPathFactory) -> Path:
    """A tiny image student's bundle, without compiled code, for batches of 1, 2 and 4."""

    def make(folder: Path) -> None:
        _build(make_tiny_checkpoint(folder / "tiny"), folder / "bundle", "--backends", "eager")

    return once_per_run(factory, "tiny", make) / "bundle"


def compiled_bundle(factory: pytest.TempPathFactory) -> Path:
    """The same student's bundle, compiled for this machine: its workers start without diffusers."""

    def make(folder: Path) -> None:
        compile_bundle(make_tiny_checkpoint(folder / "tiny"), folder / "bundle")

    return once_per_run(factory, "compiled", make) / "bundle"


def compile_bundle(student: Path, out: Path) -> None:
    """Build with compiled code. Where `out` is the bundle of a student of the same shapes, its code stays."""
    # one process: while others use the other cores, a second one would only import all libraries again
    options = ("--backends", "aotinductor", "--threads", "1", "--decode-dtype", "float32", "--jobs", "1")
    _build(student, out, *options)


def clips_bundle(factory: pytest.TempPathFactory) -> Path:
    """The bundle of the shipped student for clips, built as `up` builds it."""

    def make(folder: Path) -> None:
        options = ("--out", str(folder / "clips"), "--if-needed", "--jobs", "1")
        _engines("build", str(shipped_student("clips")), *options)

    return once_per_run(factory, "clips", make) / "clips"


def _build(student: Path, out: Path, *options: str) -> None:
    _engines("build", str(student), "--out", str(out), *options, "--batches", "1,2,4")


def _engines(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "engines", *command], check=True, timeout=1100)
