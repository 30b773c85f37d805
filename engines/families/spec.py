"""What the rest of `engines` asks of a model family. Families share functions, not base classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from engines.bundle.bucket import Bucket
from engines.bundle.stages import StageSpec
from engines.errors import CheckpointError
from engines.families.checkpoint import read_json
from engines.families.student import Student

if TYPE_CHECKING:
    import torch
    from torch import nn

    from engines.denoiser import Predict
    from engines.families.prompts import PromptEncoder

FAMILIES = {
    "pixart": "PixArtAlphaPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "cogvideox": "CogVideoXPipeline",
}
"""Names of the families, as in `student.json`, and the diffusers pipelines whose directories they read."""


class LoadEncoder(Protocol):
    """Loads tokenizers and text encoders of a directory."""

    def __call__(
        self, directory: Path, *, max_tokens: int | None = None, device: torch.device | str = "cpu"
    ) -> PromptEncoder: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    """A family of models that share layout, stages and tokenizer rules.

    Everything that takes a directory raises `CheckpointError` if a config or weights are missing, damaged, or
    do not fit each other.

    Attributes:
        name: as in `student.json`.
        kind: what it draws.
        network_part: folder of the network that is distilled.
        steps_key: the extra tensor of a step-aware network, in its state dict: (steps + 1, width).
        copied_parts: folders that a student takes over from its teacher unchanged.
        stages: read a checkpoint's configs and describe its stages at the student's bucket.
        load_stage: the wrapper of one stage, weights in a dtype: tensors in, tensors out, eval mode. Only the
            parts of the checkpoint that this stage needs are read.
        load_network: the network in eval mode, parameters in a dtype; step-aware if its weights say so.
        make_step_aware: give a network a zero-initialised embedding of the number of steps, for up to this
            many, in place; all keys of a published checkpoint stay, and plain diffusers ignores the new one.
        predict: call the network.
        native_bucket: what the network was trained at.
        latent_shape: shape of one row of latents: (C, h, w) for images, (F, C, h, w) for videos.
        native_max_tokens: length of prompts that the network was trained with, end included.
        load_encoder: prompts to `Conditioning`.
        load_decoder: a module: latents (B, ...) in fp32, clean, to (B, F, H, W, 3) uint8.
    """

    name: str
    kind: Literal["image", "video"]
    network_part: str
    steps_key: str
    copied_parts: tuple[str, ...]
    stages: Callable[[Path, Student], Sequence[StageSpec]]
    load_stage: Callable[[Path, StageSpec, torch.dtype], nn.Module]
    load_network: Callable[[Path, torch.dtype], nn.Module]
    # networks of a family are a class of their own, which no caller needs to know
    make_step_aware: Callable[[Any, int], None]
    predict: Predict
    native_bucket: Callable[[Path], Bucket]
    latent_shape: Callable[[Path, Bucket], tuple[int, ...]]
    native_max_tokens: Callable[[Path], int]
    load_encoder: LoadEncoder
    load_decoder: Callable[[Path], nn.Module]


def get_family(name: str) -> FamilySpec:
    """Look up a family; its module, and with it diffusers, is imported now.

    Raises:
        CheckpointError: there is no such family.
    """
    if name == "pixart":
        from engines.families.pixart import FAMILY
    elif name == "sdxl":
        from engines.families.sdxl import FAMILY
    elif name == "cogvideox":
        from engines.families.cogvideox import FAMILY
    else:
        raise CheckpointError(
            f"student.json: field family: one of {', '.join(FAMILIES)} is expected, not {name!r}"
        )
    return FAMILY


def family_of(directory: Path) -> FamilySpec:
    """The family of a diffusers directory, teacher or student, by its `model_index.json`.

    Raises:
        CheckpointError: it is no diffusers directory, or no family has such pipelines.
    """
    found = read_json(Path(directory) / "model_index.json").get("_class_name")
    for name, pipeline in FAMILIES.items():
        if pipeline == found:
            return get_family(name)
    expected = ", ".join(FAMILIES.values())
    raise CheckpointError(
        f"model_index.json: field _class_name: one of {expected} is expected, not {found!r}"
    )


def check_multiples(bucket: Bucket, unit: int) -> None:
    """Refuse a bucket that is not made of whole units of `unit` pixels.

    Raises:
        CheckpointError: its height or width is not a multiple.
    """
    for field in ("height", "width"):
        if getattr(bucket, field) % unit:
            raise CheckpointError(
                f"student.json: field {field}: {getattr(bucket, field)} is not a multiple of {unit}"
            )
