"""The student: a copy of its teacher that knows the step count, and the checkpoint directory it ships as."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from engines.denoiser import is_step_aware
from engines.distill.config import DistillConfig
from engines.errors import CheckpointError
from engines.families.checkpoint import read_config, read_json
from engines.families.pixart import STEPS_EMBEDDING_KEY, load_transformer, make_step_aware
from engines.schedule import NoiseSchedule, student_timesteps

COPIED_PARTS = ("tokenizer", "text_encoder", "vae", "scheduler")
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


def load_teacher(directory: Path) -> tuple[PixArtTransformer2DModel, NoiseSchedule]:
    """Load what distillation needs of a teacher: its transformer in fp32 and its noise schedule.

    Raises:
        CheckpointError: a part is missing, damaged or unsupported, or the directory holds a student.
    """
    transformer = load_transformer(directory, torch.float32)
    if is_step_aware(transformer):
        raise CheckpointError(f"{directory}: holds a student already; a teacher has no steps embedding")
    try:
        schedule = NoiseSchedule.from_config(read_json(directory / "scheduler" / "scheduler_config.json"))
    except ValueError as error:
        raise CheckpointError(f"{directory}: {error}") from None
    return transformer, schedule


def step_aware_copy(
    teacher: PixArtTransformer2DModel, max_num_steps: int, zero_row: int
) -> PixArtTransformer2DModel:
    """Copy the teacher with a steps embedding, all parameters trainable.

    Args:
        zero_row: the row that never learns and stays zero. A student with this many steps is the
            transformer without the embedding, which is what software unaware of it runs.
    """
    student = copy.deepcopy(teacher)
    make_step_aware(student, max_num_steps)
    student.requires_grad_(True)

    def mask(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[zero_row] = 0.0
        return gradient

    student.get_parameter(STEPS_EMBEDDING_KEY).register_hook(mask)
    return student


def latent_shape(transformer: PixArtTransformer2DModel) -> tuple[int, int, int]:
    """Shape of one row of latents, (C, h, w), at the resolution the transformer was trained at."""
    size = int(transformer.config.sample_size)
    return int(transformer.config.in_channels), size, size


def write_student(
    directory: Path,
    config: DistillConfig,
    network: nn.Module,
    average: Mapping[str, Tensor],
    *,
    max_text_tokens: int,
    training: Mapping[str, Any],
) -> None:
    """Write a `PixArtAlphaPipeline` directory with the averaged weights in fp16, and `student.json`.

    Everything but the transformer is copied from the teacher. The directory appears complete or not at all.

    Args:
        average: the student's parameters by name.
        training: what to record about the run.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for part in COPIED_PARTS:
        shutil.copytree(config.teacher / part, partial / part)
    shutil.copy(config.teacher / "model_index.json", partial)
    (partial / "transformer").mkdir()
    shutil.copy(config.teacher / "transformer" / "config.json", partial / "transformer")
    weights = {**network.state_dict(), **average}
    save_file(
        {key: tensor.detach().half().cpu().contiguous() for key, tensor in weights.items()},
        partial / "transformer" / WEIGHTS_NAME,
        {"format": "pt"},
    )
    description = describe(config, network, max_text_tokens=max_text_tokens, training=training)
    write_json(partial / "student.json", description)
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


def describe(
    config: DistillConfig, network: nn.Module, *, max_text_tokens: int, training: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of `student.json`: what a sampler has to know, and where the student comes from."""
    schedule = read_json(config.teacher / "scheduler" / "scheduler_config.json")
    num_train_timesteps = int(schedule.get("num_train_timesteps", 1000))
    vae = read_config(config.teacher / "vae")
    num_steps = sorted(config.num_steps)
    assert isinstance(network, PixArtTransformer2DModel)
    pixels = int(network.config.sample_size) * 2 ** (len(vae["block_out_channels"]) - 1)
    return {
        "schema_version": 1,
        "family": "pixart",
        "kind": "image",
        "name": config.name,
        "height": pixels,
        "width": pixels,
        "num_steps": num_steps,
        "default_num_steps": config.default_num_steps,
        "timesteps": {str(count): student_timesteps(count, num_train_timesteps) for count in num_steps},
        "solver": "ddim",
        "guidance_scale": 1.0,
        "max_text_tokens": max_text_tokens,
        "examples": list(config.examples),
        "teacher": {"path": config.teacher.as_posix(), "guidance_scale": config.objective.guidance_scale},
        "training": dict(training),
        "gate": None,
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one move. NaN is refused: it is not JSON."""
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    partial.replace(path)


def num_parameters(network: nn.Module) -> int:
    return sum(math.prod(parameter.shape) for parameter in network.parameters())
