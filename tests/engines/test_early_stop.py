"""Runs that end when the student no longer gets better, and what of them is kept."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from engines.denoiser import Conditioning
from engines.distill.checkpoint import TrainingState
from engines.distill.config import DistillConfig
from engines.distill.distributed import World
from engines.distill.early_stop import EarlyStop, Examiner
from engines.distill.studio import Studio
from engines.distill.trainer import distill
from engines.errors import CheckpointError, ConfigError
from tests.engines.distilling import config_of, quiet, student_weights, trainer_of

OWN = {"every": 2, "patience": 1, "pictures": 12, "reference": 12, "teacher_steps": 2}


# Whom to keep, and when to end


class Run:
    """A run without networks, whose student is worth what the test says."""

    def __init__(self, config: DistillConfig, values: list[float]) -> None:
        self.values = iter(values)
        weights = {"weight": nn.Parameter(torch.zeros(2))}
        self.state = TrainingState({"student": weights}, {}, {"weight": torch.zeros(2)})
        self.stop = EarlyStop(config, lambda: next(self.values), self.state, World())

    def go(self, until: int) -> None:
        self.stop.resume()
        while self.state.iteration < until and not self.stop.exhausted:
            self.state.iteration += 1
            self.state.average["weight"].fill_(self.state.iteration)
            if self.stop.is_due:
                self.stop.evaluate()


def run_of(teacher: Path, out: Path, values: list[float], **settings: Any) -> Run:
    stop = {**OWN, "patience": 2, **settings}
    return Run(config_of(teacher, out, iterations=9, early_stop=stop), values)


def test_a_run_ends_when_as_many_evaluations_as_patience_allows_were_no_better(
    teacher: Path, tmp_path: Path
) -> None:
    run = run_of(teacher, tmp_path, [5.0, 3.0, 4.0, 3.0])
    run.go(9)
    assert run.stop.exhausted
    assert run.stop.best == run.stop.evaluations[1]
    assert run.state.iteration == 8
    run.stop.restore()
    assert run.state.average["weight"].tolist() == [4.0, 4.0]
    assert run.stop.verdict() == (
        "early stop: kept iteration 4: frechet 3.00 %, the best of 4 evaluations; the run ended after "
        "iteration 8 of 9 because 2 evaluations in a row were no better"
    )
    assert run.stop.summary()["kept_iteration"] == 4
    assert run.stop.summary()["stopped_early"]


def test_the_last_student_is_evaluated_too(teacher: Path, tmp_path: Path) -> None:
    run = run_of(teacher, tmp_path, [5.0, 4.0, 3.0, 2.0, 1.0])
    run.go(9)
    assert [one.iteration for one in run.stop.evaluations] == [2, 4, 6, 8, 9]
    assert run.stop.summary()["kept_iteration"] == 9
    assert "the run ended after iteration 9 of 9" in run.stop.verdict()


def test_accuracy_is_better_when_higher(teacher: Path, tmp_path: Path) -> None:
    run = run_of(teacher, tmp_path, [50.0, 60.0, 60.0, 55.0])
    run.stop.settings = run.stop.settings.model_copy(update={"metric": "accuracy"})
    run.go(9)
    assert run.stop.summary()["kept_iteration"] == 4


def test_evaluations_after_the_checkpoint_are_made_again(teacher: Path, tmp_path: Path) -> None:
    first = run_of(teacher, tmp_path, [5.0, 4.0, 3.0])
    first.go(4)
    first.stop.prune([2, 4])
    first.go(6)
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == [
        "00000002.safetensors",
        "00000004.safetensors",
        "00000006.safetensors",
    ]
    again = run_of(teacher, tmp_path, [6.0, 7.0])
    again.state.iteration = 4  # the last checkpoint
    again.go(9)
    assert [one.value for one in again.stop.evaluations] == [5.0, 4.0, 6.0, 7.0]
    again.stop.restore()
    assert again.state.average["weight"].tolist() == [4.0, 4.0]
    again.stop.prune([6, 8])
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["00000004.safetensors"]


def test_missing_or_damaged_files_are_named(teacher: Path, tmp_path: Path) -> None:
    run = run_of(teacher, tmp_path, [5.0])
    run.go(2)
    shutil.rmtree(tmp_path / "best")
    with pytest.raises(CheckpointError, match=r"best/00000002\.safetensors"):
        run.stop.resume()
    (tmp_path / "early_stop.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"early_stop\.json"):
        run.stop.resume()


# Of tiny students


def test_the_best_student_of_a_run_is_written(teacher: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    # a student that learns far too fast gets worse
    config = config_of(
        teacher, tmp_path / "out", iterations=40, student_lr=0.05, warmup_iterations=0, early_stop=OWN
    )
    distill(config, Console(file=said, width=200))
    training = json.loads((config.out / "student" / "student.json").read_text())["training"]["early_stop"]
    values = {one["iteration"]: one["value"] for one in training["evaluations"]}
    kept = training["kept_iteration"]
    assert training["stopped_early"]
    assert training["last_iteration"] < 40
    assert values[kept] == min(values.values())
    assert list(values) == list(range(2, kept + 3, 2))
    assert f"early stop: kept iteration {kept}" in said.getvalue()
    best = load_file(config.out / "best" / f"{kept:08d}.safetensors")
    written = student_weights(config.out)
    assert all(torch.equal(written[key], best[key].half()) for key in written)

    # asked again, the run is over
    before = {path: path.read_bytes() for path in (config.out / "checkpoints").rglob("*.safetensors")}
    distill(config, quiet())
    assert {path: path.read_bytes() for path in (config.out / "checkpoints").rglob("*.safetensors")} == before
    assert_equal(student_weights(config.out), written)


def test_a_run_that_goes_on_keeps_the_same_student(teacher: Path, tmp_path: Path) -> None:
    whole = config_of(teacher, tmp_path / "whole", early_stop={**OWN, "patience": 9})
    distill(whole, quiet())
    config = config_of(teacher, tmp_path / "halted", early_stop={**OWN, "patience": 9})
    trainer = trainer_of(config)
    step = trainer.step

    def step_or_fail() -> None:
        if trainer.state.iteration == 5:
            raise RuntimeError("the machine is gone")
        step()

    trainer.step = step_or_fail  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="gone"):
        trainer.train(quiet())
    distill(config, quiet())
    assert_equal(student_weights(whole.out), student_weights(config.out))
    records = [
        json.loads((out / "student" / "student.json").read_text())["training"]["early_stop"]
        for out in (whole.out, config.out)
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize("metric", ["frechet", "accuracy"])
def test_scenes_are_read_by_their_judge(metric: str, teacher: Path, tmp_path: Path) -> None:
    stop = {"every": 1, "metric": metric, "pictures": 10, "reference": 20, "num_steps": 1}
    config = config_of(
        teacher, tmp_path / "out", prompts="demo", num_prompts=8, iterations=1, early_stop=stop
    )
    distill(config, quiet())
    (evaluation,) = json.loads((config.out / "early_stop.json").read_text())["evaluations"]
    assert evaluation["iteration"] == 1
    # random pictures show next to nothing of what was asked, and are nothing like renders
    assert evaluation["value"] < 50 if metric == "accuracy" else evaluation["value"] > 50


def test_own_student_is_measured_at_its_steps_against_the_guided_teacher_of_this_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    students, teachers = Studio.student, Studio.teacher

    def student(studio: Studio, cond: Conditioning, seeds: list[int], num_steps: int) -> Tensor:
        asked.append(("student", num_steps))
        return students(studio, cond, seeds, num_steps)

    def guided(studio: Studio, cond: Conditioning, seeds: list[int], num_steps: int, scale: float) -> Tensor:
        asked.append(("teacher", num_steps, scale))
        return teachers(studio, cond, seeds, num_steps, scale)

    monkeypatch.setattr(Studio, "student", student)
    monkeypatch.setattr(Studio, "teacher", guided)

    def measure(scale: float) -> float:
        settings = {"early_stop": {**OWN, "num_steps": 1}, "objective": {"guidance_scale": scale}}
        trainer = trainer_of(config_of(teacher, tmp_path / "out", **settings))
        assert trainer.early_stop is not None
        return Examiner(trainer.studio, trainer.bank, trainer.config, trainer.device).measure()

    first = measure(3.0)
    assert measure(3.0) == first  # the teacher's pictures are kept
    measure(2.0)  # but not for another teacher
    assert asked == [
        ("student", 1), ("teacher", 2, 3.0), ("student", 1), ("student", 1), ("teacher", 2, 2.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"early_stop": {**OWN, "metric": "accuracy"}}, "only the demo's scenes have a judge"),
        ({"early_stop": {**OWN, "num_steps": 3}}, "early_stop.num_steps 3 is not in num_steps"),
        ({"early_stop": {**OWN, "features": "vae"}, "prompts": "demo"}, "their judge's features"),
        ({"early_stop": {"patience": 2}}, "early_stop.every"),
        ({"early_stop": {**OWN, "features": "nonsense"}}, "features: pixels, vae or"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    changes: dict[str, Any], match: str, teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        trainer_of(config_of(teacher, tmp_path / "out", **changes))


def test_a_judge_that_is_not_there_is_named(teacher: Path, tmp_path: Path) -> None:
    stop = {**OWN, "judge": str(tmp_path / "judge.safetensors")}
    config = config_of(teacher, tmp_path / "out", prompts="demo", num_prompts=8, early_stop=stop)
    with pytest.raises(CheckpointError, match=r"judge\.safetensors: no such file"):
        trainer_of(config)


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
