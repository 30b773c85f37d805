"""The manifest of an engine bundle, and what is refused in it. No torch here.

DIR/manifest.json    this module's `Manifest`, written last: a directory without it is not a bundle
DIR/manifest.sig     who built it, where that matters (`signature`)
DIR/checkpoint/      the student, a diffusers directory; the only copy of the weights
DIR/engines/         compiled code (*.pt2) and what it needs besides the weights (*.safetensors)
DIR/report/          what the quality gate left, for people
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from pydantic import Field, ValidationError

from engines.bundle.bucket import Bucket
from engines.bundle.latency import LatencyRow, stage_ms
from engines.bundle.platform import Device, Platform
from engines.bundle.stages import Backend, BucketLabel, Model, StageName, StageSpec
from engines.errors import BundleError
from engines.files import replacing

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
SCHEMA_VERSION: Final[Literal[5]] = 5
READABLE_VERSIONS: Final = (1, 2, 3, 4, 5)
"""Version 1 had one part and one output per stage, and images only; version 2 no criteria of the gate;
version 3 no GPUs, and up to version 4 `version` said nothing of sizes."""


class EngineFile(Model):
    """One compiled package, or one TensorRT plan."""

    stage: StageName
    bucket: BucketLabel | None
    backend: Backend
    """A compiled one."""
    min_batch: int
    max_batch: int
    path: str
    constants: str = ""
    """Safetensors with what the package needs besides the checkpoint; the names of both are in its header.
    Empty for a plan, which holds its weights."""
    key: str
    """Hash of all the code was compiled from; a file with this key is not rebuilt. A package has no weights,
    and its key none of them."""
    profiles: tuple[tuple[int, int], ...] = ()
    """Batch sizes of each of a plan's optimization profiles, smallest and largest."""
    scratch_bytes: int = 0
    """Memory that a plan wants for a run, beside its weights, inputs and outputs."""
    report: str = ""
    """What TensorRT's engine inspector says of a plan, as JSON."""
    fused_attention: int | None = None
    """Layers of a plan that are fused attention, by that report; None: it is no plan, or the report has no
    such detail."""
    verified_on: str = ""
    """Where this very file was run and compared with eager; empty: nowhere."""


class ParityRow(Model):
    """How far a compiled stage is from the eager one on the same inputs."""

    stage: StageName
    bucket: BucketLabel | None
    batch: int
    backend: Backend
    cosine: float
    max_abs: float
    finite: bool


class FileHash(Model):
    """A file as it was when the bundle was written."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class GateCriterion(Model):
    """One condition of passing the gate, with the numbers that decided it."""

    text: str
    passed: bool


class GateVerdict(Model):
    """What the quality gate said of this student."""

    passed: bool | None
    """None: the student never went through the gate; it was built with --ungated."""
    forced: bool
    """Built with --force although the gate had failed; in older bundles also one that was never asked."""
    criteria: tuple[GateCriterion, ...] = ()
    """In bundles older than version 3 they are only in `student`."""

    @property
    def summary(self) -> str:
        """The verdict in a word or two: `passed`, `failed`, `never gated`, and `, forced`."""
        verdict = {True: "passed", False: "failed", None: "never gated"}[self.passed]
        return verdict + (", forced" if self.forced else "")


class Manifest(Model):
    """Everything a server must know of a bundle; README.md explains the fields."""

    schema_version: Literal[1, 2, 3, 4, 5]
    name: str = Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")
    kind: Literal["image", "video"]
    fps: int | None = Field(default=None, ge=1)
    """Frames per second of a video; None for images."""
    family: str
    version: str = Field(pattern=r"^[0-9a-f]{12}$")
    created: str
    software: dict[str, str]
    device: Device = "cpu"
    """What it was compiled for and measured on."""
    platform: Platform
    buckets: list[BucketLabel] = Field(min_length=1)
    num_steps: list[int] = Field(min_length=1)
    default_num_steps: int
    timesteps: dict[int, list[int]]
    solver: Literal["ddim"]
    guidance_scale: float = Field(ge=1.0, le=1.0)
    max_text_tokens: int = Field(ge=1)
    batch_sizes: list[int] = Field(min_length=1)
    num_threads: int = Field(ge=1)
    stages: list[StageSpec]
    engines: list[EngineFile]
    eager_only: str | None
    """Why there are no engines; None when there are."""
    latency: list[LatencyRow]
    parity: list[ParityRow]
    gate: GateVerdict
    student: dict[str, Any]
    """`student.json` as it came, for people."""
    files: dict[str, FileHash]

    @property
    def backend(self) -> Backend:
        """The backend that was listed first when this bundle was built; eager if there is no other."""
        return self.compiled_backends[0] if self.engines else Backend.EAGER

    @property
    def compiled_backends(self) -> list[Backend]:
        """Those that it has engines for, in the order in which they are to be tried."""
        return list(dict.fromkeys(engine.backend for engine in self.engines))

    @property
    def max_batch(self) -> int:
        return max(self.batch_sizes)

    def stage(self, name: StageName, bucket: Bucket) -> StageSpec:
        """The stage as it is for `bucket`."""
        return next(spec for spec in self.stages if spec.name == name and spec.bucket in (None, bucket))

    def stage_ms(self, stage: StageName, bucket: Bucket, batch: int, backend: Backend | None = None) -> float:
        """Milliseconds of one call of one stage, between measured batch sizes by straight line.

        Raises:
            ValueError: nothing was measured for this stage, bucket and backend.
        """
        return stage_ms(self.latency, stage, bucket, batch, backend or self.backend)

    def predict_ms(self, bucket: Bucket, num_steps: int, batch: int, backend: Backend | None = None) -> float:
        """Milliseconds from prompts to pixels of one batch, without packing.

        Args:
            bucket: one of `buckets`.
            num_steps: denoiser calls.
            batch: samples that run together.
            backend: the one that runs; by default the fastest this bundle has.

        Raises:
            ValueError: nothing was measured for this bucket and backend.
        """
        text = self.stage_ms("text", bucket, batch, backend)
        denoise = self.stage_ms("denoise", bucket, batch, backend)
        decode = self.stage_ms("decode", bucket, batch, backend)
        return text + num_steps * denoise + decode


def read_manifest(directory: Path) -> Manifest:
    """Read `directory/manifest.json`.

    Raises:
        BundleError: it is missing, is not JSON, or a field is missing, unknown or out of range.
    """
    path = Path(directory) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(MANIFEST, f"not found; {directory} is not a bundle") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(MANIFEST, f"not JSON ({error})") from None
    if not isinstance(data, dict):
        raise BundleError(MANIFEST, f"a JSON object is expected, not {type(data).__name__}")
    if data.get("schema_version") not in READABLE_VERSIONS:
        found, readable = data.get("schema_version"), ", ".join(map(str, READABLE_VERSIONS))
        raise BundleError(
            "schema_version", f"this version reads {readable}, the bundle has {found!r}; build it again"
        )
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BundleError(".".join(str(part) for part in first["loc"]), first["msg"]) from None
    _check_references(manifest)
    return manifest


def _check_references(manifest: Manifest) -> None:
    """Refuse a manifest whose fields contradict each other."""
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or name != str(path):
            raise BundleError(f"files.{name}", "must be a plain path inside the bundle")
    for engine in manifest.engines:
        for field in ("path", "constants", "report"):
            if getattr(engine, field) not in {"", *manifest.files}:
                raise BundleError(f"engines.{field}", f"{getattr(engine, field)} is not among files")
    for num_steps in manifest.num_steps:
        if len(manifest.timesteps.get(num_steps, ())) != num_steps:
            raise BundleError(f"timesteps.{num_steps}", f"{num_steps} timesteps are expected")
    if manifest.default_num_steps not in manifest.num_steps:
        raise BundleError("default_num_steps", f"{manifest.default_num_steps} is not one of num_steps")
    for bucket in manifest.buckets:
        for stage in ("text", "denoise", "decode"):
            if not any(spec.name == stage and spec.bucket in (None, bucket) for spec in manifest.stages):
                raise BundleError("stages", f"{stage} is missing for bucket {bucket.label}")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write `directory/manifest.json` in one move: readers see the old one or the new one, never half.

    A signature of the old one is taken away.
    """
    with replacing(Path(directory) / MANIFEST) as partial:
        partial.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (Path(directory) / SIGNATURE).unlink(missing_ok=True)
