"""A student becomes a bundle: copy, compile, compare with eager, measure, and write the manifest last."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import tempfile
import threading
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

from engines.bucket import Bucket
from engines.bundle import (
    SCHEMA_VERSION,
    Backend,
    EngineFile,
    GateCriterion,
    GateVerdict,
    LatencyRow,
    Manifest,
    ParityRow,
    StageName,
    StageSpec,
    content_version,
    current_platform,
    hash_files,
    write_manifest,
)
from engines.compile.aotinductor import GPU_CACHE, CompileJob, compile_stage
from engines.compile.measure import measure_stage
from engines.compile.needed import EAGER_ASKED_FOR, NO_COMPILER, buckets_of, has_compiler
from engines.compile.parity import check_parity
from engines.compile.precision import Precision, choose_dtype, dtype_for
from engines.compile.progress import BuildProgress
from engines.compile.student_files import DERIVED, copy_report, copy_student
from engines.compile.tensorrt import OPTIMIZATION_LEVEL, UNTRIED, PlanJob, compile_plan
from engines.errors import CheckpointError, CompileError, ParityError
from engines.families.checkpoint import read_json
from engines.families.spec import FamilySpec, get_family
from engines.families.student import STUDENT, Student, read_student
from engines.families.tokenizer import write_fast_tokenizer
from engines.platform import Device, Platform
from engines.processes import start_child
from engines.runtime.backends import compiled_stages
from engines.runtime.cuda_graphs import TorchGraphs, capture_stages
from engines.runtime.stages import EagerStages, Stage
from engines.runtime.tensorrt import import_tensorrt

EAGER_SERVES = "the bundle is built without compiled code and eager serves it, slower"
SOFTWARE = ("tdm-server", "torch", "diffusers", "transformers", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """What to build.

    Attributes:
        student: directory of the student.
        out: directory of the bundle; may be there already, and may hold the student as its `checkpoint`.
        buckets: what it draws, the default first; empty for the student's own. A video's that has one frame
            gets the student's number of them.
        batch_sizes: sorted; the largest is the largest batch the bundle will take.
        backends: `aotinductor` and `tensorrt`, the first that fits a machine is the one that serves there, or
            `eager` alone for a bundle without compiled code.
        num_threads: of the process that will run the bundle.
        num_jobs: compilations side by side.
        decode_dtype: what compiled decode computes in; `auto` tries both. On a GPU `auto` follows
            `precision`.
        device: what to compile for and measure on.
        precision: what compiled code computes in; by default bfloat16 on a GPU and on a CPU float32, decode
            aside.
        static_batches: batch sizes that get packages of their own for denoise and decode at every bucket,
            beside those for all sizes; sorted, and among `batch_sizes`.
        optimization_level: of TensorRT's builder, 0 to 5: how many kernels it tries.
        workspace_bytes: scratch memory that TensorRT may choose a kernel by; None: all there is.
        force: build a student that did not pass its gate; the manifest says so.
        allow_eager: when compilation or parity fails, build a bundle without compiled code instead.
    """

    student: Path
    out: Path
    buckets: tuple[Bucket, ...] = ()
    batch_sizes: tuple[int, ...]
    backends: tuple[Backend, ...]
    num_threads: int
    num_jobs: int
    decode_dtype: Literal["auto", "float32", "bfloat16"]
    force: bool
    allow_eager: bool
    device: Device = "cpu"
    precision: Precision | None = None
    static_batches: tuple[int, ...] = ()
    optimization_level: int = OPTIMIZATION_LEVEL
    workspace_bytes: int | None = None


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
    student = check_student(settings.student, force=settings.force)
    torch.set_num_threads(settings.num_threads)
    checkpoint = settings.out / "checkpoint"
    copy_student(settings.student, checkpoint)
    if not (checkpoint.exists() and checkpoint.samefile(settings.student)):
        copy_report(settings.student, settings.out / "report")
    for derived in (checkpoint / name for name in DERIVED):
        if derived.parent.is_dir() and not derived.is_file():
            write_fast_tokenizer(derived.parent)
    family = get_family(student.family)
    platform = current_platform(settings.device)
    if settings.device == "cuda" and not platform.gpu:
        raise CompileError("platform.gpu: nvidia-smi, which says what GPU this is, was not found or failed")
    buckets = buckets_of(student, settings.buckets)
    specs = [
        _with_compute_dtype(spec, settings, family, platform)
        for spec in _stages(family, checkpoint, student, buckets)
    ]
    progress.done(f"copied the checkpoint of {student.name}")

    engines, eager_only = _compile_or_not(settings, student, specs, platform, progress)
    _delete_leftovers(settings.out / "engines", engines)

    draft = Manifest(
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
        stages=specs,
        engines=engines,
        eager_only=eager_only,
        latency=[],
        parity=[],
        gate=gate_verdict(student),
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
        update={
            "version": content_version(files),
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


def num_pieces(settings: BuildSettings) -> int:
    """How many pieces of work `build_bundle` reports: checkpoint, packages, stages compared, manifest."""
    num_stages = 1 + 2 * max(1, len(settings.buckets))
    num_packages = num_stages + (num_stages - 1) * len(settings.static_batches)
    num_compiled = num_packages * ("aotinductor" in settings.backends)
    num_compiled += num_stages * ("tensorrt" in settings.backends)
    return 1 + num_compiled + num_stages + 1


def check_device(settings: BuildSettings) -> None:
    """Refuse settings that do not go together, or not with this machine.

    Raises:
        CompileError: names the setting.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise CompileError("--device cuda: torch sees no GPU here; use --device cpu")
    if "tensorrt" in settings.backends:
        check_tensorrt(settings)
    extra = sorted(set(settings.static_batches) - set(settings.batch_sizes))
    if extra:
        raise CompileError(f"--static-batches {extra[0]}: not among --batches {settings.batch_sizes}")


def check_tensorrt(settings: BuildSettings) -> None:
    """Refuse to build plans where that cannot work.

    Raises:
        BackendUnavailable: TensorRT is not installed; with the remedy.
        CompileError: the bundle is for a CPU.
    """
    import_tensorrt()
    if settings.device != "cuda":
        raise CompileError("--backends tensorrt: plans run on a GPU; use --device cuda")


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


def check_student(directory: Path, *, force: bool) -> Student:
    """Read a student and refuse one that should not be served.

    Raises:
        CheckpointError: it is no student; or it failed its gate or was never gated, and `force` is off.
    """
    student = read_student(directory)
    if student.gate_passed or force:
        return student
    if student.gate_passed is None:
        raise CheckpointError(
            f"{STUDENT}: field gate: this student never went through the quality gate; engines gate "
            f"{directory} measures it, --force builds it anyway, and the manifest will say so"
        )
    failed = [criterion.text for criterion in gate_verdict(student).criteria if not criterion.passed]
    raise CheckpointError(
        f"{STUDENT}: field gate.passed: the quality gate refused this student"
        f"{': ' if failed else ''}{'; '.join(failed)}. --force builds it anyway, and the manifest will say so"
    )


def gate_verdict(student: Student) -> GateVerdict:
    """What a manifest says of a student's gate; whoever builds one that did not pass has used --force."""
    criteria = student.gate.get("criteria", []) if student.gate else []
    return GateVerdict(
        passed=student.gate_passed,
        forced=not student.gate_passed,
        criteria=tuple(
            GateCriterion(text=str(one.get("text", "")), passed=bool(one.get("passed", False)))
            for one in criteria
        ),
    )


def compare_and_measure(
    bundle: Path, manifest: Manifest, progress: BuildProgress
) -> tuple[list[ParityRow], list[LatencyRow]]:
    """Run every stage of a bundle, eager and compiled, at every batch size.

    Raises:
        ParityError: they differ by more than is allowed.
    """
    parity: list[ParityRow] = []
    latency: list[LatencyRow] = []
    device = torch.device(manifest.device)
    loaders = {
        backend: compiled_stages(bundle, manifest, backend, device) for backend in manifest.compiled_backends
    }
    references = EagerStages(bundle, manifest, device)
    # a CPU serves eager in float32, too
    served = references if device.type == "cpu" else EagerStages(bundle, manifest, device, reference=False)
    for spec in manifest.stages:
        progress.doing(f"comparing and measuring {spec.label}")
        stages: dict[Backend, Stage] = {"eager": served.load(spec)}
        for name, loader in loaders.items():
            stages[name] = compiled = loader.load(spec)
            reference = references.load(spec)
            parity += [check_parity(spec, reference, compiled, batch, name) for batch in manifest.batch_sizes]
        for backend, stage in stages.items():
            rows = measure_stage(spec, stage, backend, manifest.batch_sizes)
            # eager code may do what cannot be captured
            plain = device.type == "cpu" or backend == "eager"
            latency += rows if plain else _with_graphs(stage, rows)
        progress.done(f"measured {spec.label}")
    return parity, latency


def _with_graphs(stage: Stage, rows: Sequence[LatencyRow]) -> list[LatencyRow]:
    """Rows of one stage with what it takes as a CUDA graph; the graphs are given up afterwards."""
    stream = torch.cuda.Stream(stage.device)
    peaks = {(row.stage, row.bucket, row.batch): row.peak_bytes for row in rows if row.peak_bytes}
    with torch.cuda.stream(stream):
        decisions = capture_stages([stage], [row.batch for row in rows], TorchGraphs(stream), peaks)
    graph_ms = {decision.batch: decision.graph_ms for decision in decisions}
    return [row.model_copy(update={"graph_ms": graph_ms[row.batch]}) for row in rows]


def _with_compute_dtype(
    spec: StageSpec, settings: BuildSettings, family: FamilySpec, platform: Platform
) -> StageSpec:
    """Decide what compiled code of a stage computes in; on a CPU everything but decode stays float32.

    In the denoiser bfloat16 gains a CPU a third, but a rounding there changes the path that the sampler
    takes: the same seed would give visibly different pictures in different batches. On a GPU float32 would
    cost a multiple.
    """
    precision = settings.precision or ("bf16" if settings.device == "cuda" else None)
    eager_only = set(settings.backends) <= {"eager"}
    if precision is not None and not (eager_only and settings.device == "cpu"):
        if eager_only and precision == "fp8":  # compiled code alone has it
            precision = "bf16"
        dtype = dtype_for(precision, spec.name, family.name)
        if spec.name == "decode" and settings.decode_dtype != "auto":
            dtype = settings.decode_dtype
        return spec.model_copy(update={"compute_dtype": dtype})
    if spec.name != "decode" or settings.backends == ("eager",):
        return spec
    if settings.decode_dtype != "auto":
        return spec.model_copy(update={"compute_dtype": settings.decode_dtype})
    chosen = choose_dtype(family, settings.out / "checkpoint", spec, platform)
    return spec.model_copy(update={"compute_dtype": chosen})


def _compile_or_not(
    settings: BuildSettings,
    student: Student,
    specs: Sequence[StageSpec],
    platform: Platform,
    progress: BuildProgress,
) -> tuple[list[EngineFile], str | None]:
    """Compile every stage for every backend, or say why there is nothing compiled."""
    engines: list[EngineFile] = []
    reasons: list[str] = []
    for backend in settings.backends:
        if backend == "eager":
            continue
        compile_all = _plans_or_not if backend == "tensorrt" else _packages_or_not
        made, reason = compile_all(settings, student, specs, platform, progress)
        engines += made
        reasons += [] if reason is None else [reason]
    return engines, None if engines else "; ".join(reasons) or EAGER_ASKED_FOR


def _plans_or_not(
    settings: BuildSettings,
    student: Student,
    specs: Sequence[StageSpec],
    platform: Platform,
    progress: BuildProgress,
) -> tuple[list[EngineFile], str | None]:
    """TensorRT plans of every stage, or why there are none."""
    progress.warn(UNTRIED)
    engines = []
    try:
        for spec in specs:
            progress.doing(f"building the plan of {spec.label}")
            job = PlanJob(
                family=student.family,
                spec=spec,
                batch_sizes=settings.batch_sizes,
                bundle=settings.out.resolve(),
                platform=platform,
                optimization_level=settings.optimization_level,
                workspace_bytes=settings.workspace_bytes,
            )
            engines.append(compile_plan(job))
            progress.done(f"built the plan of {spec.label}")
    except CompileError as error:
        if not settings.allow_eager:
            raise
        reason = f"no plan was built: {error}"
        progress.warn(reason)
        return [], reason
    return engines, None


def _packages_or_not(
    settings: BuildSettings,
    student: Student,
    specs: Sequence[StageSpec],
    platform: Platform,
    progress: BuildProgress,
) -> tuple[list[EngineFile], str | None]:
    """AOTInductor packages of every stage, or why there are none."""
    if not has_compiler():
        progress.warn(f"no C++ compiler (g++) on this machine: {EAGER_SERVES}; install g++ and build again")
        return [], NO_COMPILER
    # One package for all batch sizes. Measured on the demo at batches 1 and 8 on a CPU, packages for one size
    # were within 3 % of it in every stage, and each costs another compilation at first start. A GPU's kernels
    # for a known size are chosen for it.
    sizes = [(1, settings.batch_sizes[-1]), *((batch, batch) for batch in settings.static_batches)]
    jobs = [
        CompileJob(
            family=student.family,
            spec=spec,
            min_batch=min_batch,
            max_batch=max_batch,
            num_threads=settings.num_threads,
            bundle=settings.out.resolve(),
            platform=platform,
            device=settings.device,
        )
        for spec in specs
        # text is encoded once per prompt, in batches of whatever new prompts there are
        for min_batch, max_batch in dict.fromkeys(sizes if spec.bucket else sizes[:1])
    ]
    try:
        return _compile_all(jobs, settings, progress), None
    except CompileError as error:
        if not settings.allow_eager:
            raise
        reason = f"it did not compile: {error}"
        progress.warn(f"{reason}; {EAGER_SERVES}")
        return [], reason


def _verified(engine: EngineFile, draft: Manifest) -> EngineFile:
    """An engine that agreed with eager, and on what it did."""
    platform = draft.platform
    where = [platform.cpu]
    if draft.device == "cuda":
        where = [platform.gpu, f"driver {platform.driver}"]
    if engine.backend == "tensorrt":
        where.append(f"TensorRT {platform.tensorrt}")
    else:
        where.append(f"torch {platform.torch}")
    return engine.model_copy(update={"verified_on": ", ".join(where)})


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
            with _interrupted_afterwards():
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
def _interrupted_afterwards() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the block is done: a half started pool cannot be shut down."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread
        return
    came: list[int] = []
    previous = {
        number: signal.signal(number, lambda came_now, _: came.append(came_now))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


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
    start_child()


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
