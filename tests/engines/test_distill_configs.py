"""The configs that are shipped: they parse, and fit the models they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.distill import forward, trajectory
from engines.distill.ablation import read_ablation
from engines.distill.config import DistillConfig, read_config
from engines.distill.grid import check_schedule
from engines.distill.prompts import load_prompt_bank
from engines.distill.student import load_teacher, student_bucket
from engines.distill.trainer import Trainer, distill
from engines.errors import CheckpointError, ConfigError
from engines.families.pixart import load_transformer
from engines.schedule import NoiseSchedule
from tests.engines.distilling import config_of, quiet
from tests.engines.tiny import make_tiny_checkpoint, make_tiny_cogvideox, make_tiny_sdxl

ABLATION = "ablation"
CONFIGS = Path(__file__).parents[2] / "engines" / "distill" / "configs"

# scheduler/scheduler_config.json as published with each model
PIXART: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}
SDXL: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
COGVIDEOX: dict[str, Any] = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
PUBLISHED = {
    "pixart-512": PIXART,
    "pixart-1024": PIXART,
    "sdxl-512": SDXL,
    "sdxl-1024": SDXL,
    "cogvideox-2b": COGVIDEOX,
}


def shipped(name: str) -> DistillConfig:
    return read_config(CONFIGS / f"{name}.yaml")


def test_every_shipped_config_parses() -> None:
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != ABLATION)
    assert set(PUBLISHED) < set(names)
    for name in names:
        config = shipped(name)
        assert not config.teacher.is_absolute()
        assert not config.out.is_absolute()
    assert len({shipped(name).out for name in PUBLISHED}) == len(PUBLISHED)


def test_shipped_ablation_parses_with_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parents[2])
    ablation = read_ablation(CONFIGS / f"{ABLATION}.yaml")
    assert ablation.variants[0].changes == {}
    assert len({str(sorted(variant.overrides())) for variant in ablation.variants}) == len(ablation.variants)


@pytest.mark.parametrize("name", PUBLISHED)
def test_objective_fits_the_published_noise_levels(name: str) -> None:
    config, schedule = shipped(name), NoiseSchedule.from_config(PUBLISHED[name])
    check_schedule(config, schedule)
    table = trajectory.timestep_table(config.student_timesteps(schedule.num_timesteps))
    for count in config.num_steps:
        num_steps = torch.full((64,), count)
        step = torch.arange(64) % count
        now, to = trajectory.step_ends(table[num_steps], step)
        tau = forward.draw_tau(now, to, config.objective, torch.Generator().manual_seed(0))
        a, b = forward.transition_kernel(schedule, to, tau)
        assert a.isfinite().all()
        assert (b > 0).all()
        assert schedule.at(now)[1].min() > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pixart-512", [899, 674, 449, 224]),
        ("sdxl-1024", [999, 749, 499, 249]),
        ("cogvideox-2b", [999, 856, 665, 399]),
    ],
)
def test_four_step_students_visit_the_timesteps_of_the_authors(name: str, expected: list[int]) -> None:
    assert shipped(name).student_timesteps(1000)[4] == expected


def test_a_shipped_config_trains_a_small_model_of_its_family(tmp_path: Path) -> None:
    """All numbers as shipped, but for paths, sizes, iterations and batch."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cube\n")
    sizes: dict[str, dict[str, Any]] = {
        "pixart-1024": {},
        "sdxl-512": {"height": 64, "width": 64},
        "cogvideox-2b": {"height": 32, "width": 32, "frames": 9},
    }
    makers: dict[str, Callable[..., Path]] = {
        "pixart": make_tiny_checkpoint,
        "sdxl": make_tiny_sdxl,
        "cogvideox": make_tiny_cogvideox,
    }
    for name, size in sizes.items():
        directory = makers[name.split("-")[0]](tmp_path / name, student=False)
        config = shipped(name).model_copy(
            update={
                "teacher": directory,
                "out": tmp_path / f"{name}-out",
                "prompts": prompts,
                "iterations": 1,
                "batch_size": 2,
                "device": "cpu",
                **size,
            }
        )
        assert (distill(config, quiet()) / "student.json").is_file()


# Continuing from another student


@pytest.fixture(scope="module")
def first(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(config_of(teacher, tmp_path_factory.mktemp("first") / "out", iterations=2), quiet())


def trainer_from(student: Path, teacher: Path, out: Path, **changes: Any) -> Trainer:
    config = config_of(teacher, out, student_init=str(student), **changes)
    return Trainer(config, load_teacher(teacher), load_prompt_bank(config))


def test_second_half_starts_with_the_first_halfs_student_and_a_fresh_fake_score(
    first: Path, teacher: Path, tmp_path: Path
) -> None:
    trainer = trainer_from(first, teacher, tmp_path / "out", height=32, width=32)
    expected, plain = load_transformer(first).state_dict(), load_transformer(teacher).state_dict()
    found = trainer.roles.student.network.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(torch.equal(trainer.state.average[key], expected[key]) for key in trainer.state.average)
    fake_score = trainer.roles.fake_score.network.state_dict()
    assert all(torch.equal(fake_score[key], plain[key]) for key in plain)
    trainer.step()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"num_steps": {3: 1.0}, "default_num_steps": 3},
            r"timesteps\.3: \[\], this run visits \[999, 666, 332\]",
        ),
        ({"timesteps": {2: [999, 400]}}, r"timesteps\.2: \[999, 499\], this run visits \[999, 400\]"),
        ({"num_steps": {2: 1.0}, "default_num_steps": 2}, "default_num_steps: 4, this run's is 2"),
    ],
)
def test_students_of_other_step_counts_are_not_continued(
    first: Path, teacher: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(CheckpointError, match=match):
        trainer_from(first, teacher, tmp_path / "out", **changes)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_students_of_other_networks_are_not_continued(first: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"student\.json: missing"):
        trainer_from(teacher, teacher, tmp_path / "out")
    with pytest.raises(CheckpointError, match="a student of pixart is expected, not sdxl"):
        trainer_from(make_tiny_sdxl(tmp_path / "sdxl"), teacher, tmp_path / "out")
    deeper = make_tiny_checkpoint(tmp_path / "deeper", student=False, transformer_config={"num_layers": 3})
    with pytest.raises(CheckpointError, match="differs in size"):
        trainer_from(first, deeper, tmp_path / "out")
    other = make_tiny_checkpoint(tmp_path / "other", student=False, scheduler_config={"beta_end": 0.012})
    with pytest.raises(CheckpointError, match="other noise levels than the teacher's"):
        trainer_from(first, other, tmp_path / "out")
    flow = make_tiny_checkpoint(
        tmp_path / "eps", student=False, scheduler_config={"prediction_type": "epsilon"}
    )
    with pytest.raises(CheckpointError, match="prediction_type: v_prediction, the teacher's is epsilon"):
        trainer_from(first, flow, tmp_path / "out", grid_timesteps=900)
    with pytest.raises(ConfigError, match="lora must not be set"):
        trainer_from(first, teacher, tmp_path / "out", lora={"rank": 4})


def test_grids_longer_than_the_teachers_schedule_are_refused(teacher: Path, tmp_path: Path) -> None:
    config = config_of(teacher, tmp_path / "out", grid_timesteps=1200)
    with pytest.raises(ConfigError, match="grid_timesteps: 1200, the teacher has 1000"):
        check_schedule(config, NoiseSchedule.from_config(PIXART))


def test_shipped_sizes_are_those_of_the_families(tmp_path: Path) -> None:
    directory = make_tiny_sdxl(tmp_path / "sdxl", student=False)
    config = shipped("sdxl-512").model_copy(update={"teacher": directory})
    bucket, shape = student_bucket(config, load_teacher(directory).family)
    assert (bucket.label, shape) == ("512x512", (4, 64, 64))
