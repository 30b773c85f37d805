"""`python -m tests.image` says where it cannot run, and why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.image import __main__ as image

ROOT = Path(__file__).resolve().parents[2]


def test_machine_without_the_programs_is_told_their_names(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.image", f"--folder={tmp_path / 'kept'}"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: the images cannot be made here: not installed: debootstrap, unshare"
    )
    assert not (tmp_path / "kept").exists()


def test_whoever_is_not_root_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "PROGRAMS", ())
    monkeypatch.setattr(os, "getuid", lambda: 1000)

    assert image.obstacle(tmp_path) == "it takes root to mount and to change roots"


def test_refusal_of_the_kernel_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "PROGRAMS", ())
    monkeypatch.setattr(os, "getuid", lambda: 0)
    monkeypatch.setattr(image, "NAMESPACES", ("sh", "-c", "echo no namespaces >&2; exit 1", "sh"))

    assert image.obstacle(tmp_path) == "no layers in namespaces: no namespaces"
    assert list(tmp_path.iterdir()) == []
