"""Several distillations with one thing changed at a time, measured and put into one table."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from engines.demo.judge import Judge
from engines.distill.ablation import AblationConfig, read_ablation, run_ablation
from engines.distill.config import read_config
from engines.distill.cost import iterations_within
from engines.errors import CheckpointError, ConfigError
from tests.engines.tiny import make_tiny_checkpoint


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("ablation") / "teacher", student=False)


@pytest.fixture
def ablation(teacher: Path, tmp_path: Path) -> Path:
    """The path of an ablation that takes seconds."""
    Judge().save(tmp_path / "judge.safetensors")
    (tmp_path / "prompts.txt").write_text("a red cube\na torus\n")
    base = {
        "name": "tiny",
        "teacher": str(teacher),
        "out": "unused",
        "prompts": str(tmp_path / "prompts.txt"),
        "iterations": 2,
        "batch_size": 6,
        "num_steps": {2: 0.5, 1: 0.5},
        "default_num_steps": 2,
        "student_lr": 1e-3,
        "fake_lr": 3e-3,
        "steps_lr": 1e-2,
        "num_threads": 1,
        "device": "cpu",
        "autocast": "none",
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return write(tmp_path / "ablation.yaml")


def write(path: Path, **changes: Any) -> Path:
    values = {
        "title": "what pays",
        "base": str(path.parent / "base.yaml"),
        "out": str(path.parent / "runs"),
        "judge": str(path.parent / "judge.safetensors"),
        "eval_seeds": 1,
        "num_prompts": 10,
        "num_reference": 12,
        "variants": [
            {"name": "tdm", "label": "TDM", "seeds": [0, 1]},
            {"name": "clean", "label": "clean points", "changes": {"objective": {"points": "clean"}}},
        ],
    }
    path.write_text(yaml.safe_dump(values | changes))
    return path


def run(config: AblationConfig, num_processes: int = 1) -> str:
    return run_ablation(config, Console(file=io.StringIO()), num_processes=num_processes)


def weights(config: AblationConfig) -> dict[str, bytes]:
    return {
        path.parts[-4]: path.read_bytes() for path in config.out.glob("*/student/transformer/*.safetensors")
    }


@pytest.mark.slow
def test_every_variant_is_distilled_and_measured_once(ablation: Path) -> None:
    config = read_ablation(ablation)
    assert [each.name for each in config.runs()] == ["tdm-0", "clean-0", "tdm-1"]
    shown = run(config, num_processes=2)
    rows = [line for line in shown.splitlines() if line.startswith(("| TDM", "| clean"))]
    assert [row.split(" | ")[:2] for row in rows] == [["| TDM", "2"], ["| clean points", "1"]]
    made = weights(config)
    assert len(set(made.values())) == 3
    results = json.loads((config.out / "ablation.json").read_text())["runs"]
    assert {key: list(result["rows"]) for key, result in results.items()} == {
        name: ["student-2", "student-1"] for name in ("tdm-0", "tdm-1", "clean-0")
    }

    # a second time: nothing is distilled again, and a run that is lost is made as it was
    (config.out / "clean-0" / "student" / "student.json").unlink()
    assert run(config) == shown
    assert weights(config) == made


def test_a_budget_pays_for_as_many_iterations_as_a_variant_is_cheap(ablation: Path) -> None:
    variants = [
        {"name": "tdm", "label": "TDM"},
        {"name": "dear", "label": "5 fake updates", "changes": {"fake_updates": 5}},
        {"name": "own", "label": "its own", "changes": {"iterations": 3}},
    ]
    write(ablation, budget=1000, variants=variants)
    config = read_ablation(ablation)
    runs = [read_config(config.base, each.overrides()) for each in config.runs()]
    assert [each.iterations for each in runs] == [iterations_within(runs[0], 1000), 7, 3]
    assert runs[0].iterations == 18  # of 6 rows at 9.25


def test_what_cannot_be_run_is_refused_before_anything_is(ablation: Path) -> None:
    variant = {"name": "a", "label": "A"}
    for changes, message in (
        ({"variants": [variant, variant]}, "the name a is given twice"),
        ({"variants": [variant | {"changes": {"objective": {"point": 1}}}]}, "objective.point"),
        ({"variants": []}, "variants"),
        ({"base": "nowhere.yaml"}, "nowhere.yaml: no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_ablation(write(ablation, **changes))
    with pytest.raises(CheckpointError, match="demo-teacher"):
        run(read_ablation(write(ablation, judge="nothing.safetensors")))
