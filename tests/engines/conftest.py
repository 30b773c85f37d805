"""A tiny student and the bundles built from it, once per test run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.bundle.stages import Backend
from engines.compile.build import build_bundle, num_pieces
from engines.compile.progress import BuildProgress
from engines.compile.settings import BuildSettings
from tests import shared
from tests.engines.tiny import make_tiny_checkpoint

BATCH_SIZES = (1, 2, 4)


def build_settings(student: Path, out: Path) -> BuildSettings:
    """Settings of a bundle without compiled code, which takes a second to build."""
    return BuildSettings(
        student=student,
        out=out,
        batch_sizes=BATCH_SIZES,
        backends=(Backend.EAGER,),
        num_threads=1,
        num_jobs=2,
        decode_dtype="float32",
        force=False,
        allow_eager=False,
    )


def build(settings: BuildSettings) -> Path:
    """Build quietly; return where."""
    with BuildProgress(Console(quiet=True), num_pieces(settings)) as progress:
        build_bundle(settings, progress)
    return settings.out


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student directory; do not write to it."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "student")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher directory; do not write to it."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("teacher"), student=False)


@pytest.fixture(scope="session")
def eager_bundle(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle without compiled code; do not write to it."""
    return build(build_settings(tiny_student, tmp_path_factory.mktemp("eager") / "bundle"))


@pytest.fixture(scope="session")
def compiled_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of such a student compiled for this machine, once for the whole run; do not write to it."""

    return shared.compiled_bundle(tmp_path_factory)


@pytest.fixture(scope="session")
def both_bundle(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of plans and nothing else, once for the whole run; do not write to it."""
    from tests.engines.plans import build_plans

    def make(folder: Path) -> None:
        build_plans(tiny_student, folder / "bundle")

    return shared.once_per_run(tmp_path_factory, "plans", make) / "bundle"


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in as the module that `import tensorrt` finds; the oldest version unless the test says."""
    from engines.bundle import platform
    from tests.engines import fake_tensorrt

    version = getattr(request, "param", fake_tensorrt.VERSIONS[0])
    module = fake_tensorrt.make(version)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(platform, "tensorrt_version", lambda: version)
    return module
