"""One system for all tests that leave it as they found it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.system import TIMEOUT_S, System, running
from tests.engines.tiny import make_tiny_checkpoint


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student's bundle, without compiled code: what is tested here is everything around the engine."""
    directory = tmp_path_factory.mktemp("e2e")
    student = make_tiny_checkpoint(directory / "tiny")
    out = directory / "bundle"
    command = ["build", str(student), "--out", str(out), "--backends", "eager", "--batches", "1,2,4"]
    subprocess.run([sys.executable, "-m", "engines", *command], check=True, timeout=TIMEOUT_S)
    return out


@pytest.fixture(scope="session")
def system(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    with running(System(tmp_path_factory.mktemp("system"), bundle)) as system:
        yield system


@pytest.fixture
def http(system: System) -> Iterator[httpx.Client]:
    with system.client() as client:
        yield client
