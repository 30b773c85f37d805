"""FLOPs of one sample in each stage, counted on networks that have shapes and no memory."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engines.bench.models import NUM_STEPS, Model, make_parts, stage_modules, student
from engines.bundle.stages import StageSpec
from engines.families.spec import FAMILIES, get_family
from engines.families.student import Student
from engines.runtime.scratch import META, AnswerWithZero
from engines.runtime.stages import torch_dtype


def count_flops(model: Model, *, toy: bool) -> dict[str, int]:
    """Two per multiplication and addition, as torch counts: products of matrices, convolutions and attention.

    Returns:
        `text`, `denoise` (one step) and `decode` of one sample, and `sample`: text, all steps and decode.
    """
    parts = make_parts(model, toy=toy, device=META, dtype=torch.bfloat16)
    modules = stage_modules(model, parts)
    counted: dict[str, int] = {
        spec.name: _count(modules[spec.name], spec) for spec in stage_specs(model, toy=toy)
    }
    total = counted["text"] + NUM_STEPS * counted["denoise"] + counted["decode"]
    return {**counted, "sample": total}


def stage_specs(model: Model, *, toy: bool) -> list[StageSpec]:
    """The model's stages, from its configs alone."""
    architecture, family = model.architecture(toy=toy), get_family(model.family)
    encoders = {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}
    configs = {
        "model_index.json": {"_class_name": FAMILIES[model.family]},
        f"{family.network_part}/config.json": architecture.network,
        "vae/config.json": architecture.vae,
        "scheduler/scheduler_config.json": model.scheduler,
        **{
            f"{folder}/config.json": {
                **config,
                "architectures": [encoders[folder] if model.family == "sdxl" else "T5EncoderModel"],
            }
            for folder, config in architecture.text.items()
        },
    }
    with tempfile.TemporaryDirectory(prefix="tdm-bench-") as folder:
        for name, content in configs.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dict(content)), encoding="utf-8")
        return list(family.stages(Path(folder), Student.model_validate(student(model, toy=toy))))


def _count(module: nn.Module, spec: StageSpec) -> int:
    inputs = [
        torch.empty((1, *tensor.shape), dtype=torch_dtype(tensor), device=META) for tensor in spec.inputs
    ]
    module = nn.Module.to(module, META)
    # the fused kernels have no form without memory; what they multiply is the same
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        AnswerWithZero(),  # type: ignore[no-untyped-call]
        FlopCounterMode(display=False) as counter,
    ):
        module(*inputs)
    return int(counter.get_total_flops())
