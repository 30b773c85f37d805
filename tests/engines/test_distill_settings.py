"""Settings of a distillation: what is read, what is refused, and what follows from them."""

import json
from pathlib import Path
from typing import Any

import pytest

from engines.bundle import platform
from engines.bundle.platform import current_platform
from engines.distill.config import parse_config, read_config
from engines.distill.updates import lr_factor
from engines.errors import ConfigError
from tests.engines.distilling import config_of, settings, trainer_of


def test_precision_is_chosen_for_the_device_and_then_belongs_to_the_run(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(teacher, tmp_path / "out")
    for flags, chosen in ((("avx2", "avx512f"), "none"), (("avx2", "avx512_bf16"), "bfloat16")):
        here = current_platform().model_copy(update={"cpu_flags": flags})
        monkeypatch.setattr(platform, "current_platform", lambda here=here: here)
        assert config.on("cpu").numerics()["autocast"] == trainer_of(config).config.autocast == chosen
        assert config.on("cuda:0").autocast == "bfloat16"
        assert config_of(teacher, tmp_path / "out", autocast="none").on("cuda:0").autocast == "none"


def test_shipped_config_is_valid() -> None:
    config = read_config(Path(__file__).parents[2] / "engines" / "distill" / "configs" / "scenes.yaml")
    assert set(config.num_steps) == {1, 2, 4}
    assert config.fake_lr >= 2 * config.student_lr


def test_every_key_at_fault_is_named(tmp_path: Path, teacher: Path) -> None:
    values = settings(teacher, tmp_path / "out", batchsize=4, iterations=0, objective={"huber": 1.0})
    with pytest.raises(ConfigError) as error:
        parse_config(values, "run.yaml")
    assert all(key in str(error.value) for key in ("run.yaml", "batchsize", "iterations", "objective.huber"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"default_num_steps": 3}, "default_num_steps 3"),
        ({"objective": {"guidance_scale": 0.0}}, "guidance_scale"),
        ({"objective": {"tau_floor": 0}}, "tau_floor"),
        ({"objective": {"fake_loss": "mse"}}, "fake_loss"),
        ({"num_steps": {4: -1.0}}, "num_steps"),
    ],
)
def test_values_out_of_range_are_refused(
    tmp_path: Path, teacher: Path, change: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config(settings(teacher, tmp_path / "out", **change), "run.yaml")


def test_overrides_win_over_the_file(tmp_path: Path, teacher: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings(teacher, tmp_path / "out")))  # JSON is YAML
    config = read_config(
        file, ["seed=7", "objective.guidance_scale=3", "num_steps={2: 1.0}", "default_num_steps=2"]
    )
    assert (config.seed, config.objective.guidance_scale, config.num_steps) == (7, 3.0, {2: 1.0})
    with pytest.raises(ConfigError, match="key=value"):
        read_config(file, ["seed"])


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "\x00"])
def test_files_that_are_not_settings_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_config(file)
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "missing.yaml")


def test_steps_without_room_for_a_tau_are_refused(tmp_path: Path, teacher: Path) -> None:
    config = config_of(teacher, tmp_path / "out", num_steps={100: 1.0}, default_num_steps=100)
    with pytest.raises(ConfigError, match="100 steps"):
        trainer_of(config)


def test_learning_rate_rises_holds_and_falls(tmp_path: Path, teacher: Path) -> None:
    config = config_of(teacher, tmp_path / "out", iterations=100, warmup_iterations=10, decay_share=0.4)
    factors = [lr_factor(iteration, config) for iteration in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert set(factors[10:60]) == {1.0}
    assert factors[60:] == sorted(factors[60:], reverse=True)
    assert factors[-1] == pytest.approx(0.05, abs=0.03)
