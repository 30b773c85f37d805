"""A Redis of each kind, and a deployment on it, for every test anew: these tests break what they use."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from engines.bundle.manifest import write_manifest
from engines.bundle.stages import Backend
from engines.compile.build import build_bundle, num_pieces
from engines.compile.progress import BuildProgress
from engines.compile.settings import BuildSettings
from server.supervisor.valkey import find_server
from tests.failures.deployment import Deployment
from tests.failures.processes import RedisServer
from tests.shared import make_tiny_checkpoint, once_per_run

MAX_BATCH = 8


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An eager bundle of a tiny student: what is tested here is everything around the engine."""
    return once_per_run(tmp_path_factory, "failures", build) / "bundle"


def build(folder: Path) -> None:
    """The bundle in `folder`."""
    student = make_tiny_checkpoint(folder / "student")
    build_eager(student, folder / "bundle", batch_sizes=(1, 2, 4, MAX_BATCH))


def build_eager(student: Path, out: Path, *, batch_sizes: tuple[int, ...]) -> None:
    """A bundle without compiled code, whose batches all take as long."""
    settings = BuildSettings(
        student=student,
        out=out,
        batch_sizes=batch_sizes,
        backends=(Backend.EAGER,),
        num_threads=1,
        num_jobs=1,
        decode_dtype="float32",
        force=False,
        allow_eager=False,
    )
    with BuildProgress(Console(quiet=True), num_pieces(settings)) as progress:
        manifest = build_bundle(settings, progress)
    # The tests want batches; whether these pay was measured, and differs from machine to machine.
    flat = [row.model_copy(update={"ms": 10.0}) for row in manifest.latency]
    write_manifest(out, manifest.model_copy(update={"latency": flat}))


@pytest.fixture(params=["valkey", "redis"])
def redis_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """The embedded Valkey's binary, and Debian's redis-server where installed."""
    server = RedisServer(binary_of(request.param), tmp_path).start()
    yield server
    server.kill()


def binary_of(kind: str) -> Path:
    """The program of "valkey" (embedded) or "redis" (Debian's); the test is skipped where it is missing."""
    if kind == "valkey":
        return find_server()
    if (found := shutil.which("redis-server")) is None:
        pytest.skip("redis-server is not installed (apt install redis-server)")
    return Path(found)


@pytest.fixture
def deployment(redis_server: RedisServer, bundle: Path, tmp_path: Path) -> Iterator[Deployment]:
    deployment = Deployment(tmp_path, bundle, redis_server)
    yield deployment
    deployment.close()
