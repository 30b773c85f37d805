"""A student out of weights that somebody else distilled: a whole checkpoint, or a base and a LoRA.

What such releases leave to their model card (the timesteps they were trained on, the scale of the LoRA)
becomes part of the checkpoint here, so that nobody has to know it again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from engines.bundle.bucket import Bucket
from engines.bundle.integrity import hash_file
from engines.compile.student_files import student_files
from engines.errors import ConfigError
from engines.families.checkpoint import index_files, read_json, weight_files
from engines.families.lora import merge_lora, ranks, read_lora
from engines.families.spec import FamilySpec, family_of
from engines.families.student import STUDENT, read_student
from engines.families.weights import load_weights
from engines.schedule import student_timesteps

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adoption:
    """What to make a student of.

    Attributes:
        base: diffusers directory.
        out: where the student goes.
        name: of the model.
        lora: safetensors file to merge into the base's network; None takes the base's weights as they are.
        lora_scale: of the whole LoRA.
        timesteps: lists of those that the student visits, by the number of its steps.
        num_steps: further numbers of steps, with evenly spaced timesteps.
        default_num_steps: None for the largest.
        height, width, frames: None for what the base was trained at.
        fps: of videos.
        max_text_tokens: None for what the base takes.
        examples: prompts that show what it can draw.
    """

    base: Path
    out: Path
    name: str
    lora: Path | None = None
    lora_scale: float = 1.0
    timesteps: Mapping[int, Sequence[int]]
    num_steps: Sequence[int]
    default_num_steps: int | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    fps: int = 8
    max_text_tokens: int | None = None
    examples: Sequence[str] = ()


def adopt(adoption: Adoption) -> Path:
    """Write the student's directory; it appears complete or not at all.

    Returns:
        `adoption.out`.
    Raises:
        CheckpointError: base or LoRA cannot be used, or do not fit each other.
        ConfigError: the settings contradict each other or the base, or `out` exists.
    """
    base, out = adoption.base, adoption.out
    family = family_of(base)
    if (base / STUDENT).exists():
        raise ConfigError(f"{base} is a student already; build it")
    if out.exists():
        raise ConfigError(f"{out} exists")
    description = _describe(adoption, family)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        replaced = set() if adoption.lora is None else _network_files(base, family)
        for name in student_files(base):
            if name not in replaced:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(base / name, partial / name)
        if adoption.lora is not None:
            lora = read_lora(adoption.lora)
            merged = merge_lora(load_weights(base / family.network_part), lora, adoption.lora_scale)
            save_file(merged, partial / family.network_part / WEIGHTS, {"format": "pt"})
            description["source"]["lora"] = {
                "file": adoption.lora.name,
                "sha256": hash_file(adoption.lora).sha256,
                "scale": adoption.lora_scale,
                "layers": len(lora.layers),
                "ranks": ranks(lora),
                "scaling": sorted({round(lora.scaling(layer), 6) for layer in lora.layers.values()}),
            }
        text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        (partial / STUDENT).write_text(text, encoding="utf-8")
        read_student(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _network_files(base: Path, family: FamilySpec) -> set[str]:
    """Names of the network's weights and of their index."""
    part = base / family.network_part
    files = [*weight_files(part), *index_files(part)]
    return {f"{family.network_part}/{file.name}" for file in files}


def _describe(adoption: Adoption, family: FamilySpec) -> dict[str, Any]:
    """Content of `student.json`."""
    native = family.native_bucket(adoption.base)
    bucket = Bucket(
        adoption.height or native.height, adoption.width or native.width, adoption.frames or native.frames
    )
    if family.kind == "image" and bucket.frames != 1:
        raise ConfigError(f"frames: {family.name} draws images, which have one frame, not {bucket.frames}")
    family.latent_shape(adoption.base, bucket)
    timesteps = _timesteps(adoption)
    video = {"frames": bucket.frames, "fps": adoption.fps} if family.kind == "video" else {}
    default = adoption.default_num_steps or max(timesteps)
    if default not in timesteps:
        raise ConfigError(f"default steps: {default} is none of {', '.join(map(str, timesteps))}")
    return {
        "schema_version": 1,
        "family": family.name,
        "kind": family.kind,
        "name": adoption.name,
        "height": bucket.height,
        "width": bucket.width,
        **video,
        "num_steps": list(timesteps),
        "default_num_steps": default,
        "timesteps": {str(count): visited for count, visited in timesteps.items()},
        "solver": "ddim",
        "guidance_scale": 1.0,
        "max_text_tokens": adoption.max_text_tokens or family.native_max_tokens(adoption.base),
        "examples": list(adoption.examples),
        "source": {"base": adoption.base.name},
        "gate": None,
    }


def _timesteps(adoption: Adoption) -> dict[int, list[int]]:
    """Timesteps by number of steps, fewest first; falling, and such as the base's schedule has."""
    scheduler = read_json(adoption.base / "scheduler" / "scheduler_config.json")
    num_timesteps = int(scheduler.get("num_train_timesteps", 1000))
    found = {count: student_timesteps(count, num_timesteps) for count in adoption.num_steps}
    found |= {count: list(visited) for count, visited in adoption.timesteps.items()}
    for visited in found.values():
        if visited != sorted(set(visited), reverse=True) or visited[0] >= num_timesteps or visited[-1] < 0:
            raise ConfigError(
                f"timesteps: {','.join(map(str, visited))}: falling numbers are expected, from at most "
                f"{num_timesteps - 1}"
            )
    if not found:
        raise ConfigError("steps: for how many was it distilled?")
    return dict(sorted(found.items()))
