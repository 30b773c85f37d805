"""What a bundle is made of: backends, stages, and the tensors that go in and out of them. No torch here."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, model_validator

from engines.bundle.bucket import Bucket


class Backend(StrEnum):
    """What runs the stages."""

    EAGER = "eager"
    AOTINDUCTOR = "aotinductor"
    TENSORRT = "tensorrt"


StageName = Literal["text", "denoise", "decode"]
DType = Literal["float32", "bfloat16", "float16", "int64", "uint8"]
ComputeDType = Literal["float32", "bfloat16", "float16", "float8"]
"""`float8`: matrix products of large layers in float8 (`compile/fp8.py`), all else in bfloat16."""


def _parse_bucket(value: object) -> Bucket:
    return value if isinstance(value, Bucket) else Bucket.parse(str(value))


BucketLabel = Annotated[
    Bucket, PlainValidator(_parse_bucket), PlainSerializer(lambda bucket: bucket.label, return_type=str)
]


class Model(BaseModel):
    """A record that no one changes and that knows all of its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(Model):
    """One tensor at a stage's boundary."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    """Without the batch dimension, which comes first."""
    maximum: int | None = None
    """Largest value of an integer tensor; the smallest is 0."""


class StageSpec(Model):
    """What one stage takes and gives, and where its weights lie."""

    name: StageName
    parts: tuple[str, ...] = Field(min_length=1)
    """Folders under `checkpoint/` that hold the weights."""
    bucket: BucketLabel | None
    """None for text, which no bucket changes."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...] = Field(min_length=1)
    compute_dtype: ComputeDType = "float32"
    """What compiled code computes in, and on a GPU eager where it serves. The reference is eager in
    float32."""

    @property
    def label(self) -> str:
        """`text`, `denoise-64x64`: for people and file names."""
        return self.name if self.bucket is None else f"{self.name}-{self.bucket.label}"

    @model_validator(mode="before")
    @classmethod
    def _read_version_1(cls, data: Any) -> Any:
        if isinstance(data, dict):
            old = {"part": "parts", "output": "outputs"}
            return {old.get(key, key): (value,) if key in old else value for key, value in data.items()}
        return data
