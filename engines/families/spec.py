"""What the rest of `engines` asks of a model family. Families share functions, not base classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundle import StageSpec
from engines.errors import CheckpointError
from engines.families.student import Student

if TYPE_CHECKING:
    import torch
    from torch import nn

FAMILIES = ("pixart",)


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySpec:
    """A family of models that share layout, stages and tokenizer rules.

    Attributes:
        name: as in `student.json`.
        stages: read a checkpoint's configs and describe its stages at the student's bucket.
        load_stage: the wrapper of one stage, weights in a dtype: tensors in, one tensor out, eval mode.
            Only the part of the checkpoint that this stage needs is read.
    """

    name: str
    stages: Callable[[Path, Student], Sequence[StageSpec]]
    load_stage: Callable[[Path, StageSpec, torch.dtype], nn.Module]


def get_family(name: str) -> FamilySpec:
    """Look up a family; its module, and with it diffusers, is imported now.

    Raises:
        CheckpointError: there is no such family.
    """
    if name == "pixart":
        from engines.families.pixart import FAMILY

        return FAMILY
    raise CheckpointError(
        f"student.json: field family: one of {', '.join(FAMILIES)} is expected, not {name!r}"
    )
