"""Which files of a student belong into a bundle, and whether a bundle has them as they are. No torch here."""

from __future__ import annotations

import shutil
from pathlib import Path

from engines.bundle.integrity import hash_file
from engines.bundle.manifest import Manifest
from engines.families.student import STUDENT
from engines.files import replacing

PARTS = (
    "tokenizer",
    "tokenizer_2",
    "text_encoder",
    "text_encoder_2",
    "transformer",
    "unet",
    "vae",
    "scheduler",
)
SUFFIXES = (".json", ".safetensors", ".model", ".txt")
"""Configs, weights, sentencepiece models and word lists; nothing that runs code when it is read."""

DERIVED = ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json")
"""Made from a sentencepiece model or a word list if the student has only that."""


def student_files(student: Path) -> list[str]:
    """Paths, relative to the student's directory, of everything a bundle takes from it, sorted."""
    names = [name for name in ("model_index.json", STUDENT) if (student / name).is_file()]
    for part in PARTS:
        files = (path for path in sorted((student / part).glob("*")) if path.is_file())
        names += [f"{part}/{path.name}" for path in files if path.suffix in SUFFIXES]
    return sorted(names)


def copy_student(student: Path, checkpoint: Path) -> None:
    """Make `checkpoint` hold the student's files and no others; files that are the same already are left."""
    if checkpoint.exists() and checkpoint.samefile(student):
        return
    names = student_files(student)
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.relative_to(checkpoint).as_posix() not in names:
            path.unlink()
    for name in names:
        source, target = student / name, checkpoint / name
        if target.is_file() and hash_file(target) == hash_file(source):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            shutil.copyfile(source, partial)


def copy_report(student: Path, report: Path) -> None:
    """Make `report` hold what the student's quality gate left: tables and a contact sheet, for people."""
    shutil.rmtree(report, ignore_errors=True)
    if (student / "report").is_dir():
        shutil.copytree(student / "report", report, ignore=shutil.ignore_patterns(".*"))


def changed_file(student: Path, manifest: Manifest) -> str | None:
    """The first file in which a student differs from the one in a bundle; None if it is the same."""
    names = student_files(student)
    bundled = {
        name.removeprefix("checkpoint/"): entry
        for name, entry in manifest.files.items()
        if name.startswith("checkpoint/")
    }
    for name in names:
        if name not in bundled or hash_file(student / name) != bundled[name]:
            return name
    left = sorted(set(bundled) - set(names) - set(DERIVED))
    return left[0] if left else None
