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
from pydantic_core import to_jsonable_python

from engines.bundle.bucket import Bucket
from engines.bundle.platform import has_fast_bfloat16
from engines.distill.lcm import ConsistencyObjective
from engines.distill.objective import Objective
from engines.errors import ConfigError
from engines.schedule import student_timesteps

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PromptSource = Literal["demo", "demo-video"] | Path


DMD2: Mapping[str, Any] = {
    "points": "clean",
    "intervals": "overlapping",
    "fake_target": "student_x0",
    "importance_weight": False,
    "huber_c": 0.0,
}
"""Distribution matching as in DMD2: predictions are noised anew, to any level from the floor up to the
noisiest, and the gradient is that of plain squares with DMD's normaliser. Its GAN needs real pictures and is
left out. Its student is rolled out like TDM's, without the fresh noise that its own sampler adds."""

DMD2_FAKE_UPDATES = 5
"""Fake score updates per student update, DMD2's two time-scale rule."""


class LoraSettings(BaseModel):
    """Low-rank adapters (Hu et al., arXiv:2106.09685) instead of full copies.

    Attributes:
        rank: r, columns of each factor.
        alpha: the product of the factors is scaled by alpha / r.
        targets: ends of the names of the linear layers that get adapters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: PositiveInt = 32
    alpha: PositiveInt = 64
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class SampleSettings(BaseModel):
    """Sheets of pictures that the student draws while it learns, see `samples`.

    Attributes:
        every: iterations between sheets; 0 draws none.
        prompts, seeds: how many of the run's prompts are drawn, and each from how much other noise.
        teacher_steps: guided, of the teacher's pictures in the first row.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: Annotated[int, Field(ge=0)] = 100
    prompts: PositiveInt = 4
    seeds: PositiveInt = 2
    teacher_steps: PositiveInt = 25


class EarlyStopSettings(BaseModel):
    """When to end a run whose student no longer gets better, see `early_stop`.

    Attributes:
        every: iterations between evaluations.
        metric: "frechet", the distance to real renders of the demo's scenes, or of other models to the
            teacher's pictures; or "accuracy" of the demo's scenes.
        patience: evaluations in a row that may be no better than the best one.
        pictures: drawn for an evaluation.
        reference: real or teacher's pictures that the distance compares with.
        num_steps: K that is evaluated; by default `default_num_steps`.
        judge: of the demo's scenes; by default the shipped one.
        features: space of the distance for other models, see `features.make_features`.
        teacher_steps: guided, of the teacher's pictures for other models.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every: PositiveInt
    metric: Literal["frechet", "accuracy"] = "frechet"
    patience: PositiveInt = 4
    pictures: Annotated[int, Field(ge=10)] = 256
    reference: Annotated[int, Field(ge=10)] = 1000
    num_steps: PositiveInt | None = None
    judge: Path | None = None
    features: str = "pixels"
    teacher_steps: PositiveInt = 50


class DistillConfig(BaseModel):
    """One distillation run. Paths are relative to the working directory.

    Attributes:
        name: of the student.
        teacher: a diffusers directory of one of the families, see `families.spec`.
        student_init: a student of the same teacher and of as many steps, whose weights this one starts with;
            by default it starts as the teacher. The fake score starts as the teacher in any case.
        out: the run's directory: `checkpoints/`, `metrics.jsonl`, `prompts.safetensors`, `samples/` and, at
            the end, `student/`.
        prompts: a .txt, .jsonl, .csv or .parquet file, see `captions`; or "demo" or "demo-video" for captions
            of the demo's scenes or videos.
        num_prompts: how many demo captions to draw; of a file, how many prompts to use at most.
        max_text_tokens: length prompts are padded or cut to; by default the family's own.
        height, width, frames: of what the student draws; by default what the teacher was trained at.
        fps: frames per second at which a video is meant to be played.
        num_steps: how often each K is trained, K: weight.
        default_num_steps: the K whose steps embedding stays zero, so that software that knows nothing of it
            samples with this K.
        timesteps: the timesteps that a K-step student visits, K: falling list, for each K whose grid is not
            even.
        grid_timesteps: of the teacher's timesteps, how many the even grids divide; by default all. Epsilon
            models start lower, the authors' PixArt-alpha at 900.
        grid_jitter: share of the way to its neighbours by which each inner timestep is moved at random.
        examples: prompts that show what the student can draw; its users are offered them.
        method: "tdm" (arXiv:2503.06674); "dmd2" (arXiv:2405.14867 without its GAN), which is a preset of
            `objective` and `fake_updates`, see `DMD2`; or "lcm" (arXiv:2310.04378), see `lcm`.
        objective: see `Objective`; "lcm" looks at the guidance scale alone.
        consistency: see `lcm.ConsistencyObjective`.
        latents: for "lcm": a file of `latents.write_latents`, or "demo" for rendered scenes. Prompts are
            those of the latents, the first `num_prompts`.
        fake_pull: share by which each iteration moves the fake score's weights to the student's.
        lora: train adapters of this form on the teacher's frozen weights, instead of full copies.
        teacher_dtype: of the frozen weights in memory. What learns is fp32 in any case, so full copies need
            a teacher in float32 to be copied from.
        shard: with several processes, divide weights, gradients and moments among them (FSDP) instead of
            giving each a copy (DDP).
        gradient_checkpointing: keep fewer activations and compute them again.
        optimizer: "adamw8bit" keeps its moments in 8 bits; needs CUDA and bitsandbytes.
        iterations: of one student update, and `fake_updates` fake score updates, each.
        batch_size: rows per iteration, of all processes together, each with its own prompt, K and step.
        student_lr, fake_lr: peak learning rates. The fake score has to keep up with the student, so it
            learns faster.
        steps_lr: of the steps embeddings, which start at zero and have far to go; 0 leaves them there, and
            the networks are not told K.
        warmup_iterations: over which learning rates rise.
        decay_share: the last part of the run, over which they fall to a twentieth.
        betas, weight_decay: of AdamW.
        clip_norm: largest gradient norm, for each network.
        ema_decay: of the averaged weights, which are what the student ships with.
        seed: iteration i draws everything random from a generator seeded with (seed, i).
        device: "auto" is CUDA if there is one.
        autocast: precision of the networks' arithmetic; "auto" is bfloat16 where the device is faster at it,
            or the teacher is in it. Weights, schedule and losses are fp32.
        num_threads: of torch on the CPU; by default what torch chooses.
        checkpoint_every: iterations between checkpoints, of which the newest `keep_checkpoints` stay.
        log_every: iterations between lines of `metrics.jsonl`.
        tensorboard: also write TensorBoard events to `out`, if it is installed.
        samples: sheets of pictures in `out/samples/`, and in TensorBoard.
        early_stop: by default a run goes on to its end and its last student is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    teacher: Path
    student_init: Path | None = None
    out: Path
    prompts: PromptSource
    num_prompts: PositiveInt = 8192
    max_text_tokens: PositiveInt | None = None
    height: PositiveInt | None = None
    width: PositiveInt | None = None
    frames: PositiveInt | None = None
    fps: PositiveInt = 8
    num_steps: dict[PositiveInt, PositiveFloat] = {4: 0.6, 2: 0.25, 1: 0.15}
    default_num_steps: PositiveInt = 4
    timesteps: dict[PositiveInt, list[Annotated[int, Field(ge=0)]]] = {}
    grid_timesteps: PositiveInt | None = None
    grid_jitter: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    examples: tuple[str, ...] = ()
    method: Literal["tdm", "dmd2", "lcm"] = "tdm"
    objective: Objective = Objective()
    consistency: ConsistencyObjective = ConsistencyObjective()
    latents: Literal["demo"] | Path | None = None
    lora: LoraSettings | None = None
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    shard: bool = False
    gradient_checkpointing: bool = False
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    iterations: PositiveInt
    batch_size: PositiveInt
    fake_updates: PositiveInt = 1
    fake_pull: Share = 0.0
    student_lr: PositiveFloat
    fake_lr: PositiveFloat
    steps_lr: Annotated[float, Field(ge=0.0)]
    warmup_iterations: Annotated[int, Field(ge=0)] = 10
    decay_share: Share = 0.4
    betas: tuple[Share, Share] = (0.0, 0.99)
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    clip_norm: PositiveFloat = 1.0
    ema_decay: Share = 0.99
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    device: str = "auto"
    autocast: Literal["auto", "none", "bfloat16"] = "auto"
    num_threads: PositiveInt | None = None
    checkpoint_every: PositiveInt = 50
    keep_checkpoints: PositiveInt = 2
    log_every: PositiveInt = 10
    tensorboard: bool = False
    samples: SampleSettings = SampleSettings()
    early_stop: EarlyStopSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("method") != "dmd2":
            return values
        objective = values.get("objective", {})
        if isinstance(objective, Mapping):
            objective = {**DMD2, **objective}
        return {"fake_updates": DMD2_FAKE_UPDATES, **values, "objective": objective}

    @model_validator(mode="after")
    def _method_is_whole(self) -> DistillConfig:
        if self.method == "dmd2" and self.objective.points != "clean":
            raise ValueError('method dmd2 matches clean points noised anew: objective.points must be "clean"')
        if (self.method == "lcm") != (self.latents is not None):
            raise ValueError("latents are needed by method lcm, and by no other")
        if self.method == "lcm" and self.fake_pull > 0.0:
            raise ValueError("method lcm has no fake score: fake_pull must not be set")
        return self

    @model_validator(mode="after")
    def _steps_are_trained(self) -> DistillConfig:
        if self.default_num_steps not in self.num_steps:
            raise ValueError(
                f"default_num_steps {self.default_num_steps} is not in num_steps {sorted(self.num_steps)}"
            )
        if unknown := sorted(self.timesteps.keys() - self.num_steps.keys()):
            raise ValueError(f"timesteps are given for {unknown}, which are not in num_steps")
        if self.teacher_dtype == "bfloat16" and self.lora is None:
            raise ValueError("teacher_dtype bfloat16 is for lora: full copies learn in float32")
        if self.fake_pull > 0.0 and self.lora is not None:
            raise ValueError("fake_pull moves whole networks: lora must not be set")
        if self.student_init is not None and self.lora is not None:
            raise ValueError("student_init gives a whole network: lora must not be set")
        return self

    @model_validator(mode="after")
    def _early_stop_can_measure(self) -> DistillConfig:
        stop = self.early_stop
        if stop is None:
            return self
        if stop.num_steps is not None and stop.num_steps not in self.num_steps:
            raise ValueError(
                f"early_stop.num_steps {stop.num_steps} is not in num_steps {sorted(self.num_steps)}"
            )
        if isinstance(self.prompts, Path):
            if stop.metric == "accuracy" or stop.judge is not None:
                raise ValueError("early_stop: only the demo's scenes have a judge: metric must be frechet")
        elif stop.features != "pixels":
            raise ValueError("early_stop: the demo's scenes are compared in their judge's features")
        return self

    def student_timesteps(self, num_train_timesteps: int) -> dict[int, list[int]]:
        """The timesteps that a K-step student visits, for every K.

        Args:
            num_train_timesteps: of the teacher's schedule.
        """
        grid = self.grid_timesteps or num_train_timesteps
        return {
            count: list(self.timesteps.get(count, ())) or student_timesteps(count, grid)
            for count in sorted(self.num_steps)
        }

    def bucket(self, native: Bucket) -> Bucket:
        """What the student draws: the settings, and the teacher's `native` size where there are none."""
        return Bucket(self.height or native.height, self.width or native.width, self.frames or native.frames)

    def on(self, device: str) -> DistillConfig:
        """These settings with a precision chosen for `device`, as torch names it."""
        if self.autocast != "auto":
            return self
        half = self.teacher_dtype == "bfloat16" or has_fast_bfloat16(device)
        chosen = "bfloat16" if half else "none"
        return self.model_copy(update={"autocast": chosen})

    def numerics(self) -> dict[str, Any]:
        """The settings that change the result, as JSON: a run may only be resumed with the same ones."""
        return self.model_dump(mode="json", exclude=_NOT_NUMERICS)


def default_settings() -> dict[str, Any]:
    """The defaults of all settings that have one, as JSON.

    A run that was started before a setting existed was made with its default.
    """
    defaults = {
        name: field.get_default(call_default_factory=True, validated_data={})
        for name, field in DistillConfig.model_fields.items()
        if not field.is_required()
    }
    settings: dict[str, Any] = to_jsonable_python(defaults)
    return settings


_NOT_NUMERICS = {
    "examples",
    "fps",
    "out",
    "shard",
    "device",
    "num_threads",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "tensorboard",
    "samples",
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
