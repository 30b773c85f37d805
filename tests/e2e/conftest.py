"""One system for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.system import System, running
from tests.shared import compiled_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student's bundle: what is tested here is everything around the engine."""
    return compiled_bundle(tmp_path_factory)


@pytest.fixture(scope="session")
def system(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    # pages from elsewhere may call it, as examples/page.html does
    with running(System(tmp_path_factory.mktemp("system"), bundle, cors_origins="*")) as system:
        yield system


@pytest.fixture
def http(system: System) -> Iterator[httpx.Client]:
    with system.client() as client:
        yield client
