"""The teacher that a run starts from, and the checkpoint directory that its student ships as."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.bundle.bucket import Bucket
from engines.denoiser import is_step_aware
from engines.distill.config import DistillConfig
from engines.distill.disk import room_for
from engines.errors import CheckpointError, ConfigError
from engines.families.checkpoint import check_safetensors, weight_files
from engines.families.scheduler import load_schedule
from engines.families.spec import FamilySpec, family_of
from engines.families.student import read_student
from engines.files import write_json
from engines.schedule import NoiseSchedule

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, slots=True)
class Teacher:
    """What distillation needs of a teacher.

    Attributes:
        family: whose functions call the network.
        network: in eval mode, frozen.
        schedule: its noise levels, on the network's device.
    """

    family: FamilySpec
    network: nn.Module
    schedule: NoiseSchedule

    def to(self, device: torch.device | str) -> Teacher:
        """Move network and schedule."""
        return Teacher(self.family, nn.Module.to(self.network, device), self.schedule.to(device))


def load_teacher(directory: Path, dtype: torch.dtype = torch.float32) -> Teacher:
    """Load a diffusers directory of any family.

    Raises:
        CheckpointError: a part is missing, damaged or unsupported, or the directory holds a student.
    """
    family = family_of(directory)
    check_copied_parts(directory, family)
    schedule = load_schedule(directory)
    network = family.load_network(directory, dtype)
    if is_step_aware(network):
        raise CheckpointError(f"{directory}: holds a student already; a teacher has no steps embedding")
    return Teacher(family, network, schedule)


def check_copied_parts(directory: Path, family: FamilySpec) -> None:
    """Check that what the student takes over is there, and in safetensors, before hours are spent on it.

    Raises:
        CheckpointError: a part is missing, or its weights are missing, damaged or pickles.
    """
    for part in family.copied_parts:
        if not (directory / part).is_dir():
            raise CheckpointError(f"{part}: folder is missing from {directory}")
        if part.startswith(("text_encoder", "vae")):
            for file in weight_files(directory / part):
                check_safetensors(file)


def load_initial_weights(config: DistillConfig, teacher: Teacher) -> dict[str, Tensor]:
    """Read the weights of the student that another one is to start from, `config.student_init`.

    Raises:
        CheckpointError: it is no student, or differs from what this run trains in family, size, noise levels,
            step counts or timesteps; names the field.
    """
    directory = config.student_init
    assert directory is not None
    first, family = read_student(directory), family_of(directory)
    if family is not teacher.family:
        raise CheckpointError(
            f"{directory}: a student of {teacher.family.name} is expected, not {family.name}"
        )
    schedule = load_schedule(directory)
    if schedule.prediction_type != teacher.schedule.prediction_type:
        raise CheckpointError(
            f"{directory}/scheduler/scheduler_config.json: field prediction_type: "
            f"{schedule.prediction_type}, the teacher's is {teacher.schedule.prediction_type}"
        )
    if not torch.equal(schedule.alphas, teacher.schedule.alphas.cpu()):
        raise CheckpointError(
            f"{directory}/scheduler/scheduler_config.json: other noise levels than the teacher's"
        )
    for count, visited in config.student_timesteps(schedule.num_timesteps).items():
        if list(first.timesteps.get(count, ())) != visited:
            raise CheckpointError(
                f"{directory}/student.json: field timesteps.{count}: "
                f"{list(first.timesteps.get(count, ()))}, this run visits {visited}"
            )
    if first.default_num_steps != config.default_num_steps:
        raise CheckpointError(
            f"{directory}/student.json: field default_num_steps: {first.default_num_steps}, this run's is "
            f"{config.default_num_steps}"
        )
    weights = family.load_network(directory, torch.float32).state_dict()
    steps = weights.get(family.steps_key)
    if steps is None or len(steps) != max(config.num_steps) + 1:
        found = "none" if steps is None else f"one for up to {len(steps) - 1}"
        raise CheckpointError(
            f"{directory}: a steps embedding for up to {max(config.num_steps)} is expected, found {found}"
        )
    theirs = {key: value.shape for key, value in weights.items() if key != family.steps_key}
    if theirs != {key: value.shape for key, value in teacher.network.state_dict().items()}:
        raise CheckpointError(f"{directory}: the network differs in size from the teacher's")
    return weights


def student_bucket(config: DistillConfig, family: FamilySpec) -> tuple[Bucket, tuple[int, ...]]:
    """What the student draws, and the shape of one row of its latents.

    Raises:
        CheckpointError: a config of the teacher is missing or lacks a field.
        ConfigError: the teacher's parts cannot make that height, width or number of frames.
    """
    bucket = config.bucket(family.native_bucket(config.teacher))
    if family.kind == "image" and bucket.frames != 1:
        raise ConfigError(f"frames: {family.name} draws images, which have one frame, not {bucket.frames}")
    try:
        return bucket, family.latent_shape(config.teacher, bucket)
    except CheckpointError as error:
        problem = str(error).removeprefix("student.json: field ")
        if problem == str(error):
            raise
        raise ConfigError(problem) from None


def write_student(
    directory: Path,
    config: DistillConfig,
    weights: Mapping[str, Tensor],
    *,
    max_text_tokens: int,
    training: Mapping[str, Any],
) -> None:
    """Write a diffusers directory with the averaged weights in fp16, and `student.json`.

    Everything but the network is copied from the teacher. The directory appears complete or not at all.

    Args:
        weights: the student's network, adapters merged.
        training: what to record about the run.
    Raises:
        TrainingError: there is no room.
    """
    family = family_of(config.teacher)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    description = describe(config, family, max_text_tokens=max_text_tokens, training=training)
    halves = {key: tensor.detach().half().cpu().contiguous() for key, tensor in weights.items()}
    num_bytes = sum(tensor.nbytes for tensor in halves.values())
    num_bytes += sum(
        file.stat().st_size for part in family.copied_parts for file in (config.teacher / part).rglob("*")
    )
    with room_for(directory, num_bytes, "The training is done and its last checkpoint stays"):
        try:
            for part in family.copied_parts:
                shutil.copytree(config.teacher / part, partial / part)
            shutil.copy(config.teacher / "model_index.json", partial)
            network = partial / family.network_part
            network.mkdir()
            shutil.copy(config.teacher / family.network_part / "config.json", network)
            save_file(halves, network / WEIGHTS_NAME, {"format": "pt"})
            write_json(partial / "student.json", description)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def describe(
    config: DistillConfig, family: FamilySpec, *, max_text_tokens: int, training: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of `student.json`: what a sampler has to know, and where the student comes from."""
    num_timesteps = load_schedule(config.teacher).num_timesteps
    bucket, _ = student_bucket(config, family)
    video = {"frames": bucket.frames, "fps": config.fps} if family.kind == "video" else {}
    return {
        "schema_version": 1,
        "family": family.name,
        "kind": family.kind,
        "name": config.name,
        "height": bucket.height,
        "width": bucket.width,
        **video,
        "num_steps": sorted(config.num_steps),
        "default_num_steps": config.default_num_steps,
        "timesteps": {
            str(count): visited for count, visited in config.student_timesteps(num_timesteps).items()
        },
        "solver": "ddim",
        "guidance_scale": 1.0,
        "max_text_tokens": max_text_tokens,
        "examples": list(config.examples),
        "teacher": {"path": config.teacher.as_posix(), "guidance_scale": config.objective.guidance_scale},
        "training": dict(training),
        "gate": None,
    }
