"""The stamp of tests that are left out: it must not outlive what it vouches for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import stamp


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of the same names, with a stamp that is current."""
    for name in stamp.DEPENDS_ON:
        path = tmp_path / name
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("one")
        else:
            (path / "inner").mkdir(parents=True)
            (path / "inner/module.py").write_text("one")
    monkeypatch.setattr(stamp, "ROOT", tmp_path)
    monkeypatch.setattr(stamp, "STAMP", tmp_path / "tests/engines/passed.sha256")
    stamp.STAMP.write_text(stamp.digest() + "\n")
    assert stamp.is_current()
    return tmp_path


@pytest.mark.parametrize("name", stamp.DEPENDS_ON)
def test_change_in_any_part_ends_it(root: Path, name: str) -> None:
    path = root / name
    file = path if path.is_file() else path / "inner/module.py"
    file.write_text("other")
    assert not stamp.is_current()
    file.write_text("one")
    assert stamp.is_current()


def test_file_that_comes_goes_or_is_renamed_ends_it(root: Path) -> None:
    new = root / "engines/new.yaml"
    new.write_text("")
    assert not stamp.is_current()
    new.unlink()
    (root / "engines/inner/module.py").rename(root / "engines/inner/moved.py")
    assert not stamp.is_current()


def test_what_running_leaves_behind_changes_nothing(root: Path) -> None:
    left = root / "engines/inner/__pycache__"
    left.mkdir()
    (left / "module.cpython-311.pyc").write_bytes(b"x")
    assert stamp.is_current()


def test_without_a_stamp_nothing_is_left_out(root: Path) -> None:
    stamp.STAMP.unlink()
    assert not stamp.is_current()


def test_every_part_is_there() -> None:
    for name in stamp.DEPENDS_ON:
        assert (stamp.ROOT / name).exists()
