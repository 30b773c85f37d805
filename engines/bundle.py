"""The engine bundle: its manifest, its hashes, its latency table, and what is refused. No torch here.

DIR/manifest.json    this module's `Manifest`, written last: a directory without it is not a bundle
DIR/manifest.sig     who built it, where that matters (`engines.signature`)
DIR/checkpoint/      the student, a diffusers directory; the only copy of the weights
DIR/engines/         compiled code (*.pt2) and what it needs besides the weights (*.safetensors)
DIR/report/          what the quality gate left, for people
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from engines.bucket import Bucket
from engines.errors import BundleError
from engines.files import replacing
from engines.platform import (
    Device,
    Mismatch,
    Platform,
    compare_for_plan,
    compare_platforms,
    current_platform,
    list_gpus,
)

__all__ = [
    "MANIFEST",
    "SIGNATURE",
    "EngineFile",
    "FileHash",
    "GateCriterion",
    "GateVerdict",
    "LatencyRow",
    "Manifest",
    "ParityRow",
    "Platform",
    "StageSpec",
    "TensorSpec",
    "check_platform",
    "content_version",
    "current_platform",
    "hash_files",
    "list_gpus",
    "read_manifest",
    "verify_files",
    "write_manifest",
]

MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
SCHEMA_VERSION: Final[Literal[4]] = 4
READABLE_VERSIONS: Final = (1, 2, 3, 4)
"""Version 1 had one part and one output per stage, and images only; version 2 no criteria of the gate;
version 3 no GPUs."""

Backend = Literal["eager", "aotinductor", "tensorrt"]
StageName = Literal["text", "denoise", "decode"]
DType = Literal["float32", "bfloat16", "float16", "int64", "uint8"]
ComputeDType = Literal["float32", "bfloat16", "float16", "float8"]
"""`float8`: matrix products of large layers in float8 (`compile/fp8.py`), all else in bfloat16."""


def _parse_bucket(value: object) -> Bucket:
    return value if isinstance(value, Bucket) else Bucket.parse(str(value))


BucketLabel = Annotated[
    Bucket, PlainValidator(_parse_bucket), PlainSerializer(lambda bucket: bucket.label, return_type=str)
]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(_Model):
    """One tensor at a stage's boundary."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    """Without the batch dimension, which comes first."""
    maximum: int | None = None
    """Largest value of an integer tensor; the smallest is 0."""


class StageSpec(_Model):
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


class EngineFile(_Model):
    """One compiled package, or one TensorRT plan."""

    stage: StageName
    bucket: BucketLabel | None
    backend: Literal["aotinductor", "tensorrt"]
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


class LatencyRow(_Model):
    """Median time of one call of one stage."""

    stage: StageName
    bucket: BucketLabel | None
    batch: int
    backend: Backend
    ms: float
    graph_ms: float | None = None
    """The same replayed as a CUDA graph; None where that was not measured or cannot be."""
    peak_bytes: int | None = None
    """Memory that the call takes beyond weights and inputs; measured on a GPU, None elsewhere."""

    @property
    def served_ms(self) -> float:
        """What a call takes as it is served: by a graph where that is faster."""
        return self.ms if self.graph_ms is None else min(self.ms, self.graph_ms)


class ParityRow(_Model):
    """How far a compiled stage is from the eager one on the same inputs."""

    stage: StageName
    bucket: BucketLabel | None
    batch: int
    backend: Backend
    cosine: float
    max_abs: float
    finite: bool


class FileHash(_Model):
    """A file as it was when the bundle was written."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class GateCriterion(_Model):
    """One condition of passing the gate, with the numbers that decided it."""

    text: str
    passed: bool


class GateVerdict(_Model):
    """What the quality gate said of this student."""

    passed: bool | None
    """None: the student never went through the gate."""
    forced: bool
    """Built with --force although the gate had failed, or was never asked."""
    criteria: tuple[GateCriterion, ...] = ()
    """In bundles older than version 3 they are only in `student`."""

    @property
    def summary(self) -> str:
        """The verdict in a word or two: `passed`, `failed`, `never gated`, and `, forced`."""
        verdict = {True: "passed", False: "failed", None: "never gated"}[self.passed]
        return verdict + (", forced" if self.forced else "")


class Manifest(_Model):
    """Everything a server must know of a bundle; README.md explains the fields."""

    schema_version: Literal[1, 2, 3, 4]
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
        return self.compiled_backends[0] if self.engines else "eager"

    @property
    def compiled_backends(self) -> list[Literal["aotinductor", "tensorrt"]]:
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
        backend = backend or self.backend
        points = sorted(
            (row.batch, row.served_ms)
            for row in self.latency
            if (row.stage, row.backend) == (stage, backend) and row.bucket in (None, bucket)
        )
        if not points:
            raise ValueError(f"no latency was measured for {stage} at {bucket.label} with {backend}")
        return _interpolate(points, batch)

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


def _interpolate(points: Sequence[tuple[int, float]], batch: int) -> float:
    """Value at `batch`: on the line between neighbours, beyond the last point in proportion to it."""
    batches = [point[0] for point in points]
    right = bisect_left(batches, batch)
    if right == len(points):
        return points[-1][1] * batch / points[-1][0]
    if right == 0 or batches[right] == batch:
        return points[right][1]
    (b0, ms0), (b1, ms1) = points[right - 1], points[right]
    return ms0 + (ms1 - ms0) * (batch - b0) / (b1 - b0)


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


def hash_file(path: Path) -> FileHash:
    """Hash one file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileHash(sha256=digest, size_bytes=path.stat().st_size)


def hash_files(directory: Path) -> dict[str, FileHash]:
    """Hash every file under `directory`, the manifest, its signature and dot-files aside.

    Returns:
        Hashes by path relative to `directory`, with forward slashes, sorted.
    """
    return {name: hash_file(Path(directory) / name) for name in _names(Path(directory))}


def _names(directory: Path) -> list[str]:
    paths = (path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    names = (path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    return sorted(name for name in names if name not in (MANIFEST, SIGNATURE))


def content_version(files: Mapping[str, FileHash]) -> str:
    """Twelve hex digits that change exactly when the checkpoint does.

    Compiled code is left out: it differs from machine to machine, the pictures do not.
    """
    lines = [
        f"{entry.sha256} {name}\n" for name, entry in sorted(files.items()) if name.startswith("checkpoint/")
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def verify_files(directory: Path, manifest: Manifest | None = None) -> Manifest:
    """Check every file of a bundle against the manifest, before anything in it is loaded.

    Returns:
        The manifest.

    Raises:
        BundleError: a file is missing, changed or was added; `field` is `files.<path>`.
    """
    directory = Path(directory)
    manifest = manifest or read_manifest(directory)
    present = set(_names(directory))
    for name, expected in manifest.files.items():
        if name not in present:
            raise BundleError(f"files.{name}", "is missing")
        size_bytes = (directory / name).stat().st_size
        if size_bytes != expected.size_bytes:
            raise BundleError(f"files.{name}", f"has {size_bytes} bytes, {expected.size_bytes} expected")
        if hash_file(directory / name).sha256 != expected.sha256:
            raise BundleError(f"files.{name}", "its content has changed (sha256 differs)")
    added = sorted(present - set(manifest.files))
    if added:
        raise BundleError(f"files.{added[0]}", "is not part of this bundle")
    if content_version(manifest.files) != manifest.version:
        raise BundleError("version", "does not belong to this checkpoint")
    return manifest


def check_platform(
    manifest: Manifest, platform: Platform | None = None, backend: Backend | None = None
) -> list[Mismatch]:
    """What keeps this bundle's compiled code from running here; empty when it fits, or when there is none.

    Args:
        manifest: of the bundle.
        platform: by default this machine.
        backend: whose code; by default that of `manifest.backend`.
    """
    if not manifest.engines:
        return []
    compare = compare_for_plan if (backend or manifest.backend) == "tensorrt" else compare_platforms
    return compare(manifest.platform, platform or current_platform(manifest.device))
