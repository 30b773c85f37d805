"""A gate that measures with several processes."""

from __future__ import annotations

import io
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engines.demo.judge import Judge
from engines.errors import CheckpointError, GateError
from engines.gate.evaluator import GateConfig
from engines.gate.gate import Gate, Measurements
from engines.gate.measurement import Measurement, Row
from tests.engines.tiny import make_tiny_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("gate")
    Judge().save(base / "judge.safetensors")
    return {
        "student": make_tiny_checkpoint(base / "student"),
        "teacher": make_tiny_checkpoint(base / "teacher", student=False),
        "judge": base / "judge.safetensors",
    }


def make_gate(directories: dict[str, Path], out: Path, **changes: Any) -> Gate:
    settings: dict[str, Any] = {
        **directories,
        "out": out,
        "seeds": 1,
        "num_prompts": 10,
        "num_reference": 12,
        "steps": (2, 1),
        "teacher_steps": (2,),
        "guidance_scale": 2.0,
        "num_processes": 2,
    }
    return Gate(GateConfig(**(settings | changes)), Console(file=io.StringIO(), force_terminal=False))


def finished(gate: Gate) -> int:
    found = [gate.measurements.get(row, seed) for row in gate.rows for seed in range(gate.config.seeds)]
    return sum(one is not None for one in found)


def kill_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


class TellsOfTheFirst(Measurements):
    """Does something when the first measurement comes in."""

    def __init__(self, measurements: Measurements, act: Any) -> None:
        super().__init__(measurements.path, measurements.identities)
        self.act = act

    def add(self, row: Row, seed: int, measurement: Measurement) -> None:
        first = not self._done
        super().add(row, seed, measurement)
        if first:
            self.act()


def test_two_processes_measure_what_one_does(directories: dict[str, Path], tmp_path: Path) -> None:
    one, two = (make_gate(directories, tmp_path / str(num), num_processes=num) for num in (1, 2))
    one.measure_all()
    two.measure_all()
    assert [two.measurements.of(row, 1) for row in two.rows] == [
        one.measurements.of(row, 1) for row in one.rows
    ]
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_ends_the_gate_and_the_next_goes_on(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    gate = make_gate(directories, tmp_path)
    gate.measurements = TellsOfTheFirst(gate.measurements, kill_children)
    with pytest.raises(GateError, match="killed"):
        gate.measure_all()
    assert not multiprocessing.active_children()
    again = make_gate(directories, tmp_path, num_processes=1)
    assert 1 <= finished(again) < len(again.rows)
    again.measure_all()
    assert finished(again) == len(again.rows)


def test_ctrl_c_stops_all_processes_and_keeps_what_was_measured(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    gate = make_gate(directories, tmp_path)
    gate.measurements = TellsOfTheFirst(gate.measurements, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        gate.measure_all()
    assert not multiprocessing.active_children()
    assert finished(make_gate(directories, tmp_path)) >= 1


def test_what_a_process_cannot_use_is_said_here(directories: dict[str, Path], tmp_path: Path) -> None:
    broken = make_tiny_checkpoint(tmp_path / "broken", student=False)
    for weights in (broken / "transformer").glob("*.safetensors"):
        weights.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="transformer"):
        make_gate({**directories, "teacher": broken}, tmp_path / "out").measure_all()
    assert not multiprocessing.active_children()
