"""Everything a distillation run depends on, read from one YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from engines.distill.tdm import Objective
from engines.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class DistillConfig(BaseModel):
    """One distillation run. Paths are relative to the working directory.

    Attributes:
        name: of the student.
        teacher: a diffusers `PixArtAlphaPipeline` directory.
        out: the run's directory: `checkpoints/`, `metrics.jsonl`, `prompts.safetensors` and, at the end,
            `student/`.
        prompts: a text file with one prompt per line, or "demo" for captions of the demo's scenes.
        num_prompts: how many demo captions to draw; of a file, how many lines to use at most.
        max_text_tokens: length prompts are padded or cut to; by default the tokenizer's own, at most 120.
        num_steps: how often each K is trained, K: weight.
        default_num_steps: the K whose steps embedding stays zero, so that software that knows nothing of it
            samples with this K.
        examples: prompts that show what the student can draw; its users are offered them.
        objective: see `tdm.Objective`.
        iterations: of one student update, and `fake_updates` fake score updates, each.
        batch_size: rows per iteration, each with its own prompt, K and step.
        student_lr, fake_lr: peak learning rates. The fake score has to keep up with the student, so it
            learns faster.
        steps_lr: of the student's steps embedding, which starts at zero and has far to go.
        warmup_iterations: over which learning rates rise.
        decay_share: the last part of the run, over which they fall to a twentieth.
        betas, weight_decay: of AdamW.
        clip_norm: largest gradient norm, for each network.
        ema_decay: of the averaged weights, which are what the student ships with.
        seed: iteration i draws everything random from a generator seeded with (seed, i).
        device: "auto" is CUDA if there is one.
        autocast: precision of the networks' arithmetic; weights, schedule and losses are fp32.
        num_threads: of torch on the CPU; by default what torch chooses.
        checkpoint_every: iterations between checkpoints, of which the newest `keep_checkpoints` stay.
        log_every: iterations between lines of `metrics.jsonl`.
        tensorboard: also write TensorBoard events to `out`, if it is installed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    teacher: Path
    out: Path
    prompts: Literal["demo"] | Path
    num_prompts: PositiveInt = 8192
    max_text_tokens: PositiveInt | None = None
    num_steps: dict[PositiveInt, PositiveFloat] = {4: 0.6, 2: 0.25, 1: 0.15}
    default_num_steps: PositiveInt = 4
    examples: tuple[str, ...] = ()
    objective: Objective = Objective()
    iterations: PositiveInt
    batch_size: PositiveInt
    fake_updates: PositiveInt = 1
    student_lr: PositiveFloat
    fake_lr: PositiveFloat
    steps_lr: PositiveFloat
    warmup_iterations: Annotated[int, Field(ge=0)] = 10
    decay_share: Share = 0.4
    betas: tuple[Share, Share] = (0.0, 0.99)
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    clip_norm: PositiveFloat = 1.0
    ema_decay: Share = 0.99
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "auto"
    autocast: Literal["none", "bfloat16"] = "bfloat16"
    num_threads: PositiveInt | None = None
    checkpoint_every: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10
    tensorboard: bool = False

    @model_validator(mode="after")
    def _default_is_trained(self) -> DistillConfig:
        if self.default_num_steps not in self.num_steps:
            raise ValueError(
                f"default_num_steps {self.default_num_steps} is not in num_steps {sorted(self.num_steps)}"
            )
        return self

    def numerics(self) -> dict[str, Any]:
        """The settings that change the result, as JSON: a run may only be resumed with the same ones."""
        return self.model_dump(mode="json", exclude=_NOT_NUMERICS)


_NOT_NUMERICS = {
    "examples",
    "out",
    "device",
    "num_threads",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "tensorboard",
}


def read_config(path: Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a run's YAML.

    Args:
        overrides: `key=value` or `section.key=value`, the value in YAML; they win over the file.
    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown or missing, or a value is not
            allowed; names every key at fault.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a mapping of settings is expected, not {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse_config(values, source=str(path))


def parse_config(values: Mapping[str, Any], source: str) -> DistillConfig:
    """Check settings that were read from `source`. Errors as `read_config`."""
    try:
        return DistillConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'settings'}: {problem['msg']}"
            for problem in error.errors()
        ]
        raise ConfigError("\n  ".join([f"{source}:", *problems])) from None


def _apply(values: dict[str, Any], override: str) -> None:
    keys, separator, value = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r}: key=value is expected")
    *sections, key = keys.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section")
    try:
        values[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: not YAML: {error}") from None
