"""What stops a distillation: before it starts, or with the last good state kept."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.distill.checkpoint import latest_checkpoint, load_checkpoint
from engines.distill.prompts import load_prompt_bank
from engines.distill.student import load_teacher
from engines.distill.trainer import Trainer, distill
from engines.errors import CheckpointError, ConfigError, TrainingError
from engines.families.scheduler import load_schedule
from engines.families.weights import load_weights
from tests.engines.distilling import config_of, quiet
from tests.engines.tiny import make_tiny_sdxl
from tests.shared import tmpfs

# Noise levels


def edited(teacher: Path, directory: Path, **fields: Any) -> Path:
    """A copy of a teacher whose scheduler says something else."""
    shutil.copytree(teacher, directory)
    path = directory / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "_class_name: EDMDPMSolverMultistepScheduler"),
        ({"_class_name": None}, "_class_name: None"),
        ({"beta_schedule": "laplace"}, "beta_schedule must be .*'laplace'"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"prediction_type": "sample"}, "prediction_type must be .*'sample'"),
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"beta_end": -0.1}, "beta_start, beta_end: noise has to rise"),
        ({"beta_start": 2.0}, "beta_start, beta_end: noise has to rise"),
    ],
)
def test_noise_levels_that_are_not_understood_are_refused_by_field(
    teacher: Path, tmp_path: Path, fields: dict[str, Any], match: str
) -> None:
    directory = edited(teacher, tmp_path / "teacher", **fields)
    with pytest.raises(CheckpointError, match=match) as error:
        load_teacher(directory)
    assert "scheduler_config.json" in str(error.value)


@pytest.mark.parametrize(
    "name", ["CogVideoXDDIM", "DPMSolverMultistep", "EulerDiscrete", "FlowMatchEulerDiscrete"]
)
def test_solvers_of_known_noise_levels_are_accepted(teacher: Path, tmp_path: Path, name: str) -> None:
    directory = edited(teacher, tmp_path / "teacher", _class_name=f"{name}Scheduler")
    assert load_schedule(directory).num_timesteps == 1000


def test_a_shorter_schedule_refuses_the_timesteps_it_does_not_have(teacher: Path, tmp_path: Path) -> None:
    short = edited(teacher, tmp_path / "teacher", num_train_timesteps=500)
    timesteps = {4: [999, 856, 665, 399]}
    for changes, match in (
        ({"timesteps": timesteps}, "timesteps: 999 is not among the teacher's 500"),
        ({"grid_timesteps": 900}, "grid_timesteps: 900, the teacher has 500 timesteps"),
    ):
        with pytest.raises(ConfigError, match=match):
            distill(config_of(short, tmp_path / "out", **changes), quiet())


# Weights


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_pickled_weights_of_any_part_are_refused_before_training(
    teacher: Path, tmp_path: Path, part: str
) -> None:
    directory = tmp_path / "teacher"
    shutil.copytree(teacher, directory)
    (weights,) = (directory / part).glob("*.safetensors")
    torch.save(load_weights(directory / part), weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=rf"{part}/.*\.bin: pickles can run code .*safetensors"):
        distill(config_of(directory, tmp_path / "out"), quiet())


def test_missing_and_cut_off_parts_are_refused_before_training(teacher: Path, tmp_path: Path) -> None:
    directory = tmp_path / "teacher"
    shutil.copytree(teacher, directory)
    (weights,) = (directory / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"vae/.*bytes on disk"):
        load_teacher(directory)
    shutil.rmtree(directory / "vae")
    with pytest.raises(CheckpointError, match="vae: folder is missing"):
        load_teacher(directory)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_second_text_encoder_of_sdxl_is_checked_too(tmp_path: Path) -> None:
    directory = make_tiny_sdxl(tmp_path / "sdxl", student=False)
    (weights,) = (directory / "text_encoder_2").glob("*.safetensors")
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"text_encoder_2/pytorch_model\.bin: pickles"):
        load_teacher(directory)


def test_adapters_without_a_layer_say_which_names_there_are(teacher: Path, tmp_path: Path) -> None:
    config = config_of(teacher, tmp_path / "out", lora={"targets": ["to_nothing"]})
    with pytest.raises(ConfigError, match=r"ends with to_nothing; there are .*to_k, to_out\.0, to_q"):
        distill(config, quiet())


# No room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    with tmpfs(tmp_path / "disk", "size=4m") as folder:
        yield folder


@pytest.fixture
def size_limit() -> Iterator[Any]:
    """Sets the largest file that this process may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def trainer_in(out: Path, teacher: Path, **changes: Any) -> Trainer:
    prompts = out.parent / "prompts.txt"
    config = config_of(teacher, out, checkpoint_every=1, **changes)
    assert prompts.is_file()
    return Trainer(config, load_teacher(teacher), load_prompt_bank(config))


def test_full_disk_keeps_the_last_checkpoint_and_says_how_much_is_needed(
    teacher: Path, small_disk: Path
) -> None:
    out = small_disk / "out"
    # adapters of two learners, their average and moments: a megabyte and a half each time
    trainer = trainer_in(out, teacher, lora={"rank": 48, "alpha": 48}, keep_checkpoints=10, iterations=20)
    with pytest.raises(TrainingError, match=r"no room to write \d{7} bytes \(\d+ are free\)") as error:
        trainer.train(quiet())
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    assert f"{newest} stays the newest checkpoint" in str(error.value)
    assert str(out / "checkpoints" / f"{trainer.state.iteration:08d}") in str(error.value)
    assert int(newest.name) == trainer.state.iteration - 1
    assert not (out / "checkpoints" / "partial").exists()  # what was half written gives its room back
    again = trainer_in(out, teacher, lora={"rank": 48, "alpha": 48}, keep_checkpoints=10, iterations=20)
    load_checkpoint(newest, again.state, again.config.numerics())
    assert again.state.iteration == trainer.state.iteration - 1


def test_file_size_limit_is_named_like_a_full_disk(teacher: Path, tmp_path: Path, size_limit: Any) -> None:
    out = tmp_path / "out"
    trainer = trainer_in(out, teacher, lora={"rank": 4})
    size_limit(100_000)
    with pytest.raises(TrainingError, match=r"no room to write \d+ bytes .*there is no checkpoint yet"):
        trainer.train(quiet())
    assert list((out / "checkpoints").glob("*")) == []


def test_no_room_for_encoded_prompts_or_the_student_is_named(
    teacher: Path, tmp_path: Path, size_limit: Any
) -> None:
    config = config_of(teacher, tmp_path / "out", iterations=1, lora={"rank": 4})
    size_limit(1_000)
    with pytest.raises(TrainingError, match=r"prompts\.safetensors: no room .*Nothing has been trained yet"):
        distill(config, quiet())
    size_limit(resource.RLIM_INFINITY)
    Trainer(config, load_teacher(teacher), load_prompt_bank(config)).train(quiet())
    size_limit(100_000)
    with pytest.raises(TrainingError, match=r"student: no room .*last checkpoint stays"):
        distill(config, quiet())
    size_limit(resource.RLIM_INFINITY)
    assert (distill(config, quiet()) / "student.json").is_file()


def test_other_errors_of_the_disk_are_not_taken_for_a_full_one(teacher: Path, tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "out", teacher, lora={"rank": 4})
    (tmp_path / "out" / "checkpoints").write_text("not a folder")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        trainer.train(quiet())
