"""Compiled CPU code runs beside other threads, and draws what torch's own loader draws."""

from __future__ import annotations

import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.bundle.manifest import read_manifest
from engines.errors import BundleError
from engines.runtime.aotinductor import AotInductorEngine, Constants, LockedPackage, load_package
from engines.runtime.unlocked import UnlockedPackage, can_unlock
from tests.shared import tmpfs


def inputs_of(bundle: Path, index: int, batch: int) -> list[Tensor]:
    """Random ones of a stage."""
    rng = torch.Generator().manual_seed(index)
    spec = read_manifest(bundle).stages[index]
    return [
        torch.rand((batch, *one.shape), generator=rng)
        if "float" in one.dtype
        else torch.randint(1, 4, (batch, *one.shape), generator=rng, dtype=getattr(torch, one.dtype))
        for one in spec.inputs
    ]


def test_every_stage_draws_what_torchs_own_loader_draws(compiled_bundle: Path) -> None:
    manifest = read_manifest(compiled_bundle)
    constants = Constants(compiled_bundle)
    for index, (spec, engine) in enumerate(zip(manifest.stages, manifest.engines, strict=True)):
        path, bound = compiled_bundle / engine.path, constants.bind(spec, engine)
        assert can_unlock(path)
        ours, theirs = UnlockedPackage(path, bound), LockedPackage(path, bound, "cpu")
        for batch in (2, 3):
            inputs = inputs_of(compiled_bundle, index, batch)
            before = [one.clone() for one in inputs]
            drawn, expected = ours(inputs), theirs(inputs)
            assert len(drawn) == len(expected) == len(spec.outputs)
            assert all(torch.equal(one, other) for one, other in zip(drawn, expected, strict=True))
            assert all(torch.equal(one, other) for one, other in zip(inputs, before, strict=True))


class Slow(torch.nn.Module):
    """Much work in one compiled call."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x @ x @ x,)


def test_other_threads_run_while_compiled_code_does(tmp_path: Path) -> None:
    x = torch.randn(2500, 2500)
    path = tmp_path / "slow.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        torch._inductor.aoti_compile_and_package(torch.export.export(Slow(), (x,)), package_path=str(path))
    package = UnlockedPackage(path, {})
    stamps: list[float] = []
    started, ended = threading.Event(), threading.Event()

    def stamp() -> None:
        while not ended.wait(0.001):
            stamps.append(time.perf_counter())
            started.set()

    other = threading.Thread(target=stamp)
    other.start()
    started.wait()
    began_s = time.perf_counter()
    package([x])
    took_s = time.perf_counter() - began_s
    ended.set()
    other.join()
    # Beside `LockedPackage` there is none: between these two moments only the compiled code runs.
    assert [at_s for at_s in stamps if 0.2 < (at_s - began_s) / took_s < 0.8]


def test_error_inside_the_code_is_raised(compiled_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOTI_RUNTIME_CHECK_INPUTS", "1")  # read by the code itself
    manifest = read_manifest(compiled_bundle)
    bound = Constants(compiled_bundle).bind(manifest.stages[1], manifest.engines[1])
    package = UnlockedPackage(compiled_bundle / manifest.engines[1].path, bound)
    inputs = inputs_of(compiled_bundle, 1, 2)
    assert package(inputs)
    with pytest.raises(ValueError, match=f"takes {len(inputs)} tensors, not 0"):
        package([])
    with pytest.raises(RuntimeError, match=r"RunSingleThreaded: .*dtype"):
        package([one.double() for one in inputs])


@pytest.fixture
def no_programs(tmp_path: Path) -> Iterator[Path]:
    """A directory whose files must not be executed, as Docker mounts a tmpfs."""
    with tmpfs(tmp_path / "noexec", "noexec") as folder:
        yield folder


@pytest.mark.parametrize("unlocked", [True, False])
def test_code_that_may_not_be_executed_is_refused_with_the_way_out(
    compiled_bundle: Path, no_programs: Path, monkeypatch: pytest.MonkeyPatch, unlocked: bool
) -> None:
    path = compiled_bundle / read_manifest(compiled_bundle).engines[1].path
    monkeypatch.setenv("TMPDIR", str(no_programs))  # torch's loader reads it
    monkeypatch.setattr(tempfile, "tempdir", str(no_programs))
    with pytest.raises(BundleError, match=r"cannot be loaded: .*failed to map .*noexec\? TMPDIR names"):
        UnlockedPackage(path, {}) if unlocked else load_package(path)


def test_package_that_is_none_is_left_to_torchs_loader(tmp_path: Path) -> None:
    broken = tmp_path / "broken.pt2"
    broken.write_bytes(b"no archive")
    assert not can_unlock(broken)
    with pytest.raises(BundleError, match="cannot be loaded"):
        AotInductorEngine(broken, {}, min_batch=1, max_batch=1)
