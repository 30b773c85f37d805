"""A student becomes a bundle: copy, compile, compare with eager, measure, and write the manifest last."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

from engines.bundle.bucket import Bucket
from engines.bundle.integrity import content_version, hash_files
from engines.bundle.manifest import SCHEMA_VERSION, EngineFile, Manifest, write_manifest
from engines.bundle.platform import Platform, current_platform
from engines.bundle.stages import Backend, StageName, StageSpec
from engines.compile.aotinductor import GPU_CACHE
from engines.compile.backends import compile_or_not, compilers
from engines.compile.compare import compare_and_measure
from engines.compile.gated import check_student, gate_verdict
from engines.compile.needed import buckets_of
from engines.compile.packages import EAGER_SERVES
from engines.compile.precision import with_compute_dtype
from engines.compile.progress import BuildProgress
from engines.compile.settings import BuildSettings
from engines.compile.student_files import DERIVED, copy_report, copy_student
from engines.errors import CheckpointError, CompileError, ParityError
from engines.families.checkpoint import read_json
from engines.families.spec import FamilySpec, get_family
from engines.families.student import EXAMPLE_SHARE, STUDENT, Student
from engines.families.tokenizer import write_fast_tokenizer
from engines.families.weights import check_finite

SOFTWARE = ("tdm-server", "torch", "diffusers", "transformers", "tokenizers", "safetensors")


def build_bundle(settings: BuildSettings, progress: BuildProgress) -> Manifest:
    """Build a bundle; packages that an earlier, interrupted build finished are kept.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: the student cannot be used; names the field or file.
        CompileError: a stage does not compile, and `allow_eager` is off.
        ParityError: compiled code does not draw what eager draws.
    """
    check_device(settings)
    student = check_student(settings.student, force=settings.force, ungated=settings.ungated)
    torch.set_num_threads(settings.num_threads)
    platform = current_platform(settings.device)
    if settings.device == "cuda" and not platform.gpu:
        raise CompileError("platform.gpu: nvidia-smi, which says what GPU this is, was not found or failed")
    checkpoint = _copy_checkpoint(settings)
    family = get_family(student.family)
    buckets = buckets_of(student, settings.buckets)
    specs = [
        with_compute_dtype(spec, settings, family, platform)
        for spec in _stages(family, checkpoint, student, buckets)
    ]
    progress.done(f"copied the checkpoint of {student.name}")
    unread = [prompt for prompt in student.examples if prompt not in student.accepted_examples]
    if unread:
        progress.warn(
            f"{len(unread)} of {len(student.examples)} examples are left out, for no quality gate has found "
            f"them right in {EXAMPLE_SHARE:.0%} of their pictures: {'; '.join(unread)}"
        )

    engines, eager_only = compile_or_not(settings, student, specs, platform, progress)
    _delete_leftovers(settings.out / "engines", engines)
    draft = _draft(settings, student, platform, buckets, specs).model_copy(
        update={"engines": engines, "eager_only": eager_only}
    )
    try:
        parity, latency = compare_and_measure(settings.out, draft, progress)
    except ParityError as error:
        if not settings.allow_eager:
            raise
        draft = _without_engines(settings.out, draft, f"it does not draw what eager draws: {error}", progress)
        parity, latency = compare_and_measure(settings.out, draft, progress)
    files = hash_files(settings.out)
    manifest = draft.model_copy(
        update={
            "version": content_version(files, buckets),
            "engines": [_verified(engine, draft) for engine in draft.engines],
            "parity": parity,
            "latency": latency,
            "files": files,
        }
    )
    write_manifest(settings.out, manifest)
    shutil.rmtree(settings.out / GPU_CACHE, ignore_errors=True)
    progress.done(f"wrote the manifest of {manifest.name} {manifest.version}")
    return manifest


def _copy_checkpoint(settings: BuildSettings) -> Path:
    """The student as the bundle's only copy of the weights, with what is derived from it."""
    checkpoint = settings.out / "checkpoint"
    copy_student(settings.student, checkpoint)
    for part in sorted({file.parent for file in checkpoint.glob("*/*.safetensors")}):
        check_finite(part)  # whatever serves it: eager has nothing that it is compared with
    if not (checkpoint.exists() and checkpoint.samefile(settings.student)):
        copy_report(settings.student, settings.out / "report")
    for derived in (checkpoint / name for name in DERIVED):
        if derived.parent.is_dir() and not derived.is_file():
            write_fast_tokenizer(derived.parent)
    return checkpoint


def _draft(
    settings: BuildSettings,
    student: Student,
    platform: Platform,
    buckets: Sequence[Bucket],
    specs: Sequence[StageSpec],
) -> Manifest:
    """The manifest before anything is compiled, compared or measured."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=student.name,
        kind=student.kind,
        fps=student.fps if student.kind == "video" else None,
        family=student.family,
        version="0" * 12,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        software=_software(),
        device=settings.device,
        platform=platform,
        buckets=list(buckets),
        num_steps=list(student.num_steps),
        default_num_steps=student.default_num_steps,
        timesteps={steps: list(student.timesteps[steps]) for steps in student.num_steps},
        solver=student.solver,
        guidance_scale=student.guidance_scale,
        max_text_tokens=student.max_text_tokens,
        batch_sizes=list(settings.batch_sizes),
        num_threads=settings.num_threads,
        stages=list(specs),
        engines=[],
        eager_only=None,
        latency=[],
        parity=[],
        gate=gate_verdict(student),
        student=read_json(settings.out / "checkpoint" / STUDENT) | {"examples": student.accepted_examples},
        files={},
    )


def num_pieces(settings: BuildSettings) -> int:
    """How many pieces of work `build_bundle` reports: checkpoint, packages, stages compared, manifest."""
    num_stages = 1 + 2 * max(1, len(settings.buckets))
    num_compiled = sum(compiler.num_engines(settings, num_stages) for compiler in compilers(settings))
    return 1 + num_compiled + num_stages + 1


def check_device(settings: BuildSettings) -> None:
    """Refuse settings that do not go together, or not with this machine.

    Raises:
        BackendUnavailable: what a backend compiles with is not installed; with the remedy.
        CompileError: names the setting.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise CompileError("--device cuda: torch sees no GPU here; use --device cpu")
    for compiler in compilers(settings):
        compiler.check(settings)
    extra = sorted(set(settings.static_batches) - set(settings.batch_sizes))
    if extra:
        raise CompileError(f"--static-batches {extra[0]}: not among --batches {settings.batch_sizes}")


def _stages(
    family: FamilySpec, checkpoint: Path, student: Student, buckets: Sequence[Bucket]
) -> list[StageSpec]:
    """The stages at every bucket; text, which no bucket changes, once.

    Raises:
        CheckpointError: the checkpoint's parts cannot make a bucket.
    """
    found: dict[tuple[StageName, Bucket | None], StageSpec] = {}
    for bucket in buckets:
        shape = {"height": bucket.height, "width": bucket.width, "frames": bucket.frames}
        try:
            specs = family.stages(checkpoint, student.model_copy(update=shape))
        except CheckpointError as error:
            if bucket == student.bucket:
                raise
            problem = str(error).removeprefix("student.json: field ")
            raise CheckpointError(f"bucket {bucket.label}: {problem}") from None
        for spec in specs:
            found.setdefault((spec.name, spec.bucket), spec)
    return list(found.values())


def _verified(engine: EngineFile, draft: Manifest) -> EngineFile:
    """An engine that agreed with eager, and on what it did."""
    platform = draft.platform
    where = [platform.cpu]
    if draft.device == "cuda":
        where = [platform.gpu, f"driver {platform.driver}"]
    if engine.backend == Backend.TENSORRT:
        where.append(f"TensorRT {platform.tensorrt}")
    else:
        where.append(f"torch {platform.torch}")
    return engine.model_copy(update={"verified_on": ", ".join(where)})


def _without_engines(bundle: Path, draft: Manifest, reason: str, progress: BuildProgress) -> Manifest:
    progress.warn(f"{reason}; {EAGER_SERVES}")
    _delete_leftovers(bundle / "engines", [])
    return draft.model_copy(update={"engines": [], "eager_only": reason})


def _delete_leftovers(folder: Path, engines: Sequence[EngineFile]) -> None:
    """Delete packages of other machines, students or settings."""
    kept = {
        Path(name).name
        for engine in engines
        for name in (engine.path, engine.constants, engine.report)
        if name
    }
    for path in sorted(folder.glob("*")):
        # timings of kernels begin with a dot: they are no part of the bundle, and the next build wants them
        if path.name not in kept and not path.name.startswith(".timing-"):
            path.unlink()


def _software() -> dict[str, str]:
    versions = {}
    for name in SOFTWARE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
