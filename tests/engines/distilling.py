"""Distilling the tiny teacher: settings, and what tests look at."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from engines.distill.config import DistillConfig, parse_config
from engines.distill.prompts import load_prompt_bank
from engines.distill.student import load_teacher
from engines.distill.trainer import Trainer

PROMPTS = ["a red cube", "a small blue sphere left of a green cone", "a torus"]


def settings(teacher: Path, out: Path, **changes: Any) -> dict[str, Any]:
    prompts = out.parent / "prompts.txt"
    prompts.write_text("\n\n".join(PROMPTS) + "\n")
    return {
        "name": "tiny",
        "teacher": str(teacher),
        "out": str(out),
        "prompts": str(prompts),
        "iterations": 6,
        "batch_size": 8,
        "student_lr": 1e-3,
        "fake_lr": 3e-3,
        "steps_lr": 1e-2,
        "checkpoint_every": 2,
        "log_every": 2,
        "num_threads": 1,
        "device": "cpu",
    } | changes


def config_of(teacher: Path, out: Path, **changes: Any) -> DistillConfig:
    return parse_config(settings(teacher, out, **changes), "test")


def trainer_of(config: DistillConfig) -> Trainer:
    return Trainer(config, load_teacher(config.teacher), load_prompt_bank(config))


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def student_weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "student" / "transformer" / "diffusion_pytorch_model.safetensors")
