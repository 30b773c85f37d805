"""Files that are replaced whole."""

from pathlib import Path

import pytest

from engines.files import atomic_write, replacing


def test_file_is_written_and_then_replaced(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    atomic_write(path, "grün\n")
    assert path.read_text(encoding="utf-8") == "grün\n"
    atomic_write(path, b"\x00")
    assert path.read_bytes() == b"\x00"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")

    def break_off(partial: Path) -> None:
        assert partial.parent == tmp_path
        assert partial.name.startswith(".note.txt.")
        partial.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), replacing(path) as partial:
        break_off(partial)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("note.txt", "old")]


def test_readers_see_the_old_file_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
