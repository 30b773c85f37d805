"""What the distribution holds and pins."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# CUDA builds of several gigabytes, installed by people who have the GPU for them.
UNPINNED_EXTRAS = {"tensorrt", "torch-tensorrt"}


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    matches = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert all(matches), "constraints.txt holds something else than NAME==VERSION"
    return {canonicalize_name(found[1]): Version(found[2]) for found in matches if found}


def requirements() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    listed = PROJECT["project"]["dependencies"] + [
        entry for extra, entries in extras.items() if extra not in UNPINNED_EXTRAS for entry in entries
    ]
    return [Requirement(entry) for entry in listed]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_requirement_is_pinned_to_a_version_it_allows(requirement: Requirement) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


@pytest.mark.parametrize("package", ["server", "engines"])
def test_package_data_covers_every_file_that_is_not_python(package: str) -> None:
    folder = ROOT / package
    patterns = PROJECT["tool"]["setuptools"]["package-data"][package]
    covered = {path for pattern in patterns for path in folder.glob(pattern)}
    data = {
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".md") and "__pycache__" not in path.parts
    }
    assert data
    assert data - covered == set()
