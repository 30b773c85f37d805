"""A student becomes a bundle: copy, compile, compare with eager, measure, and write the manifest last."""

from __future__ import annotations

import ctypes
import multiprocessing
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from engines.bundle import (
    Backend,
    EngineFile,
    GateVerdict,
    LatencyRow,
    Manifest,
    ParityRow,
    StageSpec,
    content_version,
    current_platform,
    hash_files,
    write_manifest,
)
from engines.compile.aotinductor import CompileJob, compile_stage
from engines.compile.measure import measure_stage
from engines.compile.needed import EAGER_ASKED_FOR, NO_COMPILER, has_compiler
from engines.compile.parity import check_parity
from engines.compile.precision import choose_dtype
from engines.compile.progress import BuildProgress
from engines.compile.student_files import DERIVED, copy_report, copy_student
from engines.errors import CheckpointError, CompileError, ParityError
from engines.families.checkpoint import read_json
from engines.families.spec import FamilySpec, get_family
from engines.families.student import STUDENT, Student, read_student
from engines.families.tokenizer import write_fast_tokenizer
from engines.platform import Platform
from engines.runtime.aotinductor import Constants
from engines.runtime.stages import Stage, load_compiled_stage, load_eager_stage

EAGER_SERVES = "the bundle is built without compiled code and eager serves it, slower"
SOFTWARE = ("tdm-server", "torch", "diffusers", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What to build.

    Attributes:
        student: directory of the student.
        out: directory of the bundle; may be there already, and may hold the student as its `checkpoint`.
        batch_sizes: sorted; the largest is the largest batch the bundle will take.
        backends: `aotinductor`, or `eager` alone for a bundle without compiled code.
        num_threads: of the process that will run the bundle.
        num_jobs: compilations side by side.
        decode_dtype: what compiled decode computes in; `auto` tries both.
        force: build a student that its gate refused.
        allow_eager: when compilation or parity fails, build a bundle without compiled code instead.
    """

    student: Path
    out: Path
    batch_sizes: tuple[int, ...]
    backends: tuple[Backend, ...]
    num_threads: int
    num_jobs: int
    decode_dtype: Literal["auto", "float32", "bfloat16"]
    force: bool
    allow_eager: bool


def build_bundle(settings: BuildSettings, progress: BuildProgress) -> Manifest:
    """Build a bundle; packages that an earlier, interrupted build finished are kept.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: the student cannot be used; names the field or file.
        CompileError: a stage does not compile, and `allow_eager` is off.
        ParityError: compiled code does not draw what eager draws.
    """
    student = check_student(settings.student, force=settings.force)
    torch.set_num_threads(settings.num_threads)
    checkpoint = settings.out / "checkpoint"
    copy_student(settings.student, checkpoint)
    if not (checkpoint.exists() and checkpoint.samefile(settings.student)):
        copy_report(settings.student, settings.out / "report")
    if not (checkpoint / DERIVED).is_file():
        write_fast_tokenizer(checkpoint / "tokenizer")
    family = get_family(student.family)
    platform = current_platform()
    specs = [
        _with_compute_dtype(spec, settings, family, platform) for spec in family.stages(checkpoint, student)
    ]
    progress.done(f"copied the checkpoint of {student.name}")

    engines, eager_only = _compile_or_not(settings, student, specs, platform, progress)
    _delete_leftovers(settings.out / "engines", engines)

    draft = Manifest(
        schema_version=1,
        name=student.name,
        kind=student.kind,
        family=student.family,
        version="0" * 12,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        software=_software(),
        platform=platform,
        buckets=[student.bucket],
        num_steps=list(student.num_steps),
        default_num_steps=student.default_num_steps,
        timesteps={steps: list(student.timesteps[steps]) for steps in student.num_steps},
        solver=student.solver,
        guidance_scale=student.guidance_scale,
        max_text_tokens=student.max_text_tokens,
        batch_sizes=list(settings.batch_sizes),
        num_threads=settings.num_threads,
        stages=specs,
        engines=engines,
        eager_only=eager_only,
        latency=[],
        parity=[],
        gate=GateVerdict(passed=student.gate_passed, forced=student.gate_passed is False),
        student=read_json(checkpoint / STUDENT),
        files={},
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
        update={"version": content_version(files), "parity": parity, "latency": latency, "files": files}
    )
    write_manifest(settings.out, manifest)
    progress.done(f"wrote the manifest of {manifest.name} {manifest.version}")
    return manifest


def num_pieces(settings: BuildSettings) -> int:
    """How many pieces of work `build_bundle` reports: checkpoint, packages, stages compared, manifest."""
    return 1 + (3 if "aotinductor" in settings.backends else 0) + 3 + 1


def check_student(directory: Path, *, force: bool) -> Student:
    """Read a student and refuse one that should not be served.

    Raises:
        CheckpointError: it is no student, or its gate refused it and `force` is off.
    """
    student = read_student(directory)
    if student.gate_passed is False and not force:
        raise CheckpointError(
            f"{STUDENT}: field gate.passed: the quality gate refused this student; --force builds it anyway"
        )
    return student


def compare_and_measure(
    bundle: Path, manifest: Manifest, progress: BuildProgress
) -> tuple[list[ParityRow], list[LatencyRow]]:
    """Run every stage of a bundle, eager and compiled, at every batch size.

    Raises:
        ParityError: they differ by more than is allowed.
    """
    parity: list[ParityRow] = []
    latency: list[LatencyRow] = []
    constants = Constants(bundle)
    for spec in manifest.stages:
        progress.doing(f"comparing and measuring {spec.name}")
        stages: dict[Backend, Stage] = {"eager": load_eager_stage(bundle, manifest, spec)}
        if manifest.engines:
            compiled = load_compiled_stage(bundle, manifest, spec, constants)
            stages["aotinductor"] = compiled
            parity += [
                check_parity(spec, stages["eager"], compiled, batch, "aotinductor")
                for batch in manifest.batch_sizes
            ]
        for backend, stage in stages.items():
            latency += measure_stage(spec, stage, backend, manifest.batch_sizes)
        progress.done(f"measured {spec.name}")
    return parity, latency


def _with_compute_dtype(
    spec: StageSpec, settings: BuildSettings, family: FamilySpec, platform: Platform
) -> StageSpec:
    """Decide what compiled code of a stage computes in; everything but decode stays float32.

    In the denoiser bfloat16 gains a third, but a rounding there changes the path that the sampler takes: the
    same seed would give visibly different pictures in different batches.
    """
    if spec.name != "decode" or settings.backends == ("eager",):
        return spec
    if settings.decode_dtype != "auto":
        return spec.model_copy(update={"compute_dtype": settings.decode_dtype})
    dtype = choose_dtype(family, settings.out / "checkpoint", spec, platform)
    return spec.model_copy(update={"compute_dtype": dtype})


def _compile_or_not(
    settings: BuildSettings,
    student: Student,
    specs: Sequence[StageSpec],
    platform: Platform,
    progress: BuildProgress,
) -> tuple[list[EngineFile], str | None]:
    """Compile every stage, or say why not."""
    if "aotinductor" not in settings.backends:
        return [], EAGER_ASKED_FOR
    if not has_compiler():
        progress.warn(f"no C++ compiler (g++) on this machine: {EAGER_SERVES}; install g++ and build again")
        return [], NO_COMPILER
    # One package for all batch sizes. Measured on the demo at batches 1 and 8, packages for one size were
    # within 3 % of it in every stage, and each costs another compilation at first start.
    jobs = [
        CompileJob(
            family=student.family,
            spec=spec,
            min_batch=1,
            max_batch=settings.batch_sizes[-1],
            num_threads=settings.num_threads,
            bundle=settings.out.resolve(),
            platform=platform,
        )
        for spec in specs
    ]
    try:
        return _compile_all(jobs, settings, progress), None
    except CompileError as error:
        if not settings.allow_eager:
            raise
        reason = f"it did not compile: {error}"
        progress.warn(f"{reason}; {EAGER_SERVES}")
        return [], reason


def _without_engines(bundle: Path, draft: Manifest, reason: str, progress: BuildProgress) -> Manifest:
    progress.warn(f"{reason}; {EAGER_SERVES}")
    _delete_leftovers(bundle / "engines", [])
    return draft.model_copy(update={"engines": [], "eager_only": reason})


def _compile_all(
    jobs: Sequence[CompileJob], settings: BuildSettings, progress: BuildProgress
) -> list[EngineFile]:
    """Compile `jobs` side by side; the result keeps their order.

    Raises:
        CompileError: one of them failed; the others are stopped.
    """
    with _scratch_folder(settings.out / ".build") as scratch:
        progress.doing(f"compiling {', '.join(job.label for job in jobs)}")
        executor = ProcessPoolExecutor(
            max_workers=min(settings.num_jobs, len(jobs)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_compiler_process,
            initargs=(str(scratch.resolve()),),
        )
        try:
            futures = {executor.submit(compile_stage, job): job for job in jobs}
            engines: dict[str, EngineFile] = {}
            for future in as_completed(futures):
                job = futures[future]
                engines[job.label] = future.result()
                progress.done(f"compiled {job.label}")
            return [engines[job.label] for job in jobs]
        except BrokenProcessPool:
            raise CompileError("a compiler process was killed; is there enough memory?") from None
        except BaseException:
            # after an error or Ctrl-C nobody waits for the other compilations, which take a minute
            for child in multiprocessing.active_children():
                child.terminate()
            raise
        finally:
            executor.shutdown(cancel_futures=True)


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder that is gone afterwards, whatever happens."""
    shutil.rmtree(path, ignore_errors=True)
    try:
        path.mkdir(parents=True)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _start_compiler_process(scratch: str) -> None:
    """Keep inductor's caches in a folder that is deleted afterwards; die with the parent."""
    tempfile.tempdir = scratch
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _delete_leftovers(folder: Path, engines: Sequence[EngineFile]) -> None:
    """Delete packages of other machines, students or settings."""
    kept = {Path(name).name for engine in engines for name in (engine.path, engine.constants)}
    for path in sorted(folder.glob("*")):
        if path.name not in kept:
            path.unlink()


def _software() -> dict[str, str]:
    versions = {}
    for name in SOFTWARE:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
