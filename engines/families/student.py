"""`student.json`: what a few-step student says of itself beside the weights. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engines.bundle.bucket import Bucket
from engines.errors import CheckpointError
from engines.families.checkpoint import read_json

STUDENT = "student.json"

EXAMPLE_SHARE = 0.9
"""In so many of its pictures an example has to show all that it says."""


class Student(BaseModel):
    """How to sample from a student, and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: Literal[1]
    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")
    family: str
    kind: Literal["image", "video"]
    num_steps: tuple[int, ...] = Field(min_length=1)
    default_num_steps: int
    timesteps: dict[int, tuple[int, ...]]
    solver: Literal["ddim"]
    guidance_scale: float = Field(ge=1.0, le=1.0)
    max_text_tokens: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    frames: int = Field(default=1, ge=1)
    """Of a video, first and last included."""
    fps: int = Field(default=8, ge=1)
    """At which a video is meant to be played."""
    examples: tuple[str, ...] = ()
    gate: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _steps_agree(self) -> Student:
        for num_steps in self.num_steps:
            visited = self.timesteps.get(num_steps, ())
            if len(visited) != num_steps or list(visited) != sorted(set(visited), reverse=True):
                raise ValueError(
                    f"timesteps.{num_steps} must hold {num_steps} falling timesteps, not {visited}"
                )
        if self.default_num_steps not in self.num_steps:
            raise ValueError(f"default_num_steps {self.default_num_steps} is not one of {self.num_steps}")
        if self.kind == "image" and self.frames != 1:
            raise ValueError(f"frames: an image has one, not {self.frames}")
        return self

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.height, self.width, self.frames)

    @property
    def accepted_examples(self) -> list[str]:
        """Those that a quality gate has read and found right often enough."""
        read = {
            one["prompt"]: one.get("right")
            for one in (self.gate or {}).get("examples", ())
            if "prompt" in one
        }
        return [prompt for prompt in self.examples if (read.get(prompt) or 0.0) >= EXAMPLE_SHARE]

    @property
    def gate_passed(self) -> bool | None:
        """Whether the quality gate let this student pass; None when it was never asked."""
        return None if self.gate is None else bool(self.gate.get("passed", False))


def read_student(directory: Path) -> Student:
    """Read `directory/student.json`.

    Raises:
        CheckpointError: the directory is a teacher or no checkpoint, or a field is missing or wrong.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if not (directory / STUDENT).is_file() and (directory / "model_index.json").is_file():
        raise CheckpointError(
            f"{STUDENT}: missing from {directory}; distil a teacher first (python -m engines distill)"
        )
    data = read_json(directory / STUDENT)
    try:
        return Student.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise CheckpointError(
            f"{STUDENT}: field {field}: {message}" if field else f"{STUDENT}: {message}"
        ) from None
