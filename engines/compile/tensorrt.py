"""One stage compiled by TensorRT into a plan: strongly typed, one profile per range of batch sizes.

A plan holds the stage's weights and fits one kind of GPU and one version of TensorRT. Plans are built in this
process one after the other: kernels are chosen by timing them, and the GPU must be otherwise idle.

This has never run on a GPU. What was checked without one is in `engines/README.md`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.bundle.integrity import hash_file
from engines.bundle.manifest import EngineFile
from engines.bundle.platform import Platform
from engines.bundle.stages import Backend, StageSpec
from engines.compile.onnx_export import OPSET, export_onnx
from engines.compile.plan_report import read_plan_report
from engines.compile.sources import hash_sources
from engines.errors import CompileError
from engines.families.checkpoint import read_json, weight_files
from engines.families.spec import get_family
from engines.files import atomic_write
from engines.runtime.stages import MODULE_DTYPES
from engines.runtime.tensorrt import import_tensorrt, last_lines, make_logger

UNTRIED = (
    "TensorRT plans were never run on a GPU by those who wrote this; only parity below says that they work"
)

OPTIMIZATION_LEVEL = 5
"""0 to 5: how many kernels are tried. 3 is TensorRT's default; a release is built once and run often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanJob:
    """One plan to make.

    Attributes:
        family: as in `student.json`.
        spec: the stage.
        batch_sizes: sorted; each ends the range of one optimization profile, and is what that is tuned for.
        bundle: the bundle directory; the checkpoint is there already.
        platform: this machine.
        optimization_level: 0 to 5.
        workspace_bytes: scratch memory that a kernel may take; None: all there is.
    """

    family: str
    spec: StageSpec
    batch_sizes: tuple[int, ...]
    bundle: Path
    platform: Platform
    optimization_level: int = OPTIMIZATION_LEVEL
    workspace_bytes: int | None = None

    @property
    def profiles(self) -> tuple[tuple[int, int], ...]:
        """Smallest and largest batch of each profile: 1, 2, 4 become (1, 1), (2, 2), (3, 4)."""
        lows = (1, *(batch + 1 for batch in self.batch_sizes[:-1]))
        return tuple(zip(lows, self.batch_sizes, strict=True))


def describe_plan(job: PlanJob) -> EngineFile:
    """The plan that `job` makes, with its key; whether or not it exists yet."""
    key = plan_key(job)
    stem = f"engines/{job.spec.label}-{key[:12]}"
    return EngineFile(
        stage=job.spec.name,
        bucket=job.spec.bucket,
        backend=Backend.TENSORRT,
        min_batch=1,
        max_batch=job.batch_sizes[-1],
        path=f"{stem}.plan",
        key=key,
        profiles=job.profiles,
        report=f"{stem}.json",
    )


def plan_key(job: PlanJob) -> str:
    """Hash of all a plan is made from: weights, configs, shapes, sources, settings, GPU and TensorRT."""
    parts = [job.bundle / "checkpoint" / part for part in job.spec.parts]
    ingredients = {
        "spec": job.spec.model_dump(mode="json"),
        "batches": list(job.batch_sizes),
        "level": job.optimization_level,
        "workspace_bytes": job.workspace_bytes,
        "opset": OPSET,
        "configs": [read_json(part / "config.json") for part in parts],
        "weights": [hash_file(file).sha256 for part in parts for file in weight_files(part)],
        "platform": job.platform.model_dump(
            include={"torch", "os", "machine", "gpu", "compute_capability", "driver", "tensorrt"}
        ),
        "sources": hash_sources(job.family, "compile.tensorrt"),
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def compile_plan(job: PlanJob) -> EngineFile:
    """Make a plan and the inspector's report of it, unless those with the same key are there.

    Raises:
        BackendUnavailable: TensorRT or torch's ONNX exporter is not installed.
        CompileError: export, parsing or building failed; with the last lines that TensorRT logged.
        CheckpointError: the stage's part cannot be loaded.
    """
    trt = import_tensorrt()
    if job.spec.compute_dtype == "float8":
        raise CompileError(f"stage {job.spec.name}: plans have no float8 here; use --precision bf16")
    engine = describe_plan(job)
    plan, report = job.bundle / engine.path, job.bundle / engine.report
    if not (plan.is_file() and report.is_file()):
        plan.parent.mkdir(parents=True, exist_ok=True)
        # a name with a dot in front is no part of the bundle
        with tempfile.TemporaryDirectory(dir=job.bundle, prefix=".onnx-") as folder:
            onnx_file = _export(job, Path(folder) / "stage.onnx")
            _make(trt, job, onnx_file, plan, report)
    return _with_facts(engine, report)


def _export(job: PlanJob, path: Path) -> Path:
    spec = job.spec
    dtype = MODULE_DTYPES[spec.compute_dtype]
    module = get_family(job.family).load_stage(job.bundle / "checkpoint", spec, dtype)
    return export_onnx(module, spec, path, min_batch=1, max_batch=job.batch_sizes[-1])


def _make(trt: Any, job: PlanJob, onnx_file: Path, plan: Path, report: Path) -> None:
    """Build a plan, ask the inspector of it, and write both complete or not at all, the plan last."""
    logger = make_logger(trt)
    serialized = build_serialized(trt, logger, job, onnx_file)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(serialized)
    if engine is None:
        raise CompileError(f"stage {job.spec.name}: the plan does not load: {last_lines(logger)}")
    inspector = engine.create_engine_inspector()
    inspected = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    try:
        facts = read_plan_report(inspected)
    except ValueError as error:
        raise CompileError(f"stage {job.spec.name}: {error}") from None
    said = {
        "tensorrt": trt.__version__,
        "scratch_bytes": int(engine.device_memory_size_v2),
        "fused_attention": facts.fused_attention,
        "softmaxes": facts.softmaxes,
        "inspector": json.loads(inspected),
    }
    report.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    atomic_write(plan, serialized)


def _with_facts(engine: EngineFile, report: Path) -> EngineFile:
    said = read_json(report)
    fields = ("scratch_bytes", "fused_attention")
    return engine.model_copy(update={field: said[field] for field in fields})


def build_serialized(trt: Any, logger: Any, job: PlanJob, onnx_file: Path) -> bytes:
    """Parse an ONNX file and build its plan, with what earlier builds on this kind of GPU have timed.

    Args:
        trt: the `tensorrt` module.
        logger: as `make_logger` makes it.
        job: what to build.
        onnx_file: of the stage, weights beside it if they are large.

    Raises:
        CompileError: TensorRT does not read the file, or does not build it; with its own words.
    """
    where = f"stage {job.spec.name}"
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{error.node_operator()} (node {error.node_name()}): {error.desc()}" for error in errors]
        raise CompileError(
            f"{where}: TensorRT cannot read the ONNX file: {'; '.join(said) or last_lines(logger)}"
        )
    config = builder.create_builder_config()
    config.builder_optimization_level = job.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows names only
    if job.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_bytes)
    if job.spec.compute_dtype == "float32":
        config.clear_flag(trt.BuilderFlag.TF32)  # else products are made of 10 bits of 23
    for low, high in job.profiles:
        profile = builder.create_optimization_profile()
        for tensor in job.spec.inputs:
            smallest, largest = (low, *tensor.shape), (high, *tensor.shape)
            profile.set_shape(tensor.name, smallest, largest, largest)
        if config.add_optimization_profile(profile) < 0:
            raise CompileError(f"{where}: TensorRT refused batches of {low} to {high}: {last_lines(logger)}")
    cache_file = timing_cache_file(job)
    cache = _timing_cache(config, cache_file)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise CompileError(f"{where}: TensorRT did not build a plan: {last_lines(logger)}")
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    cache_file.write_bytes(memoryview(cache.serialize()))
    return bytes(memoryview(plan))


def network_flags(trt: Any) -> int:
    """What `create_network` is told: strongly typed, which needs no saying from TensorRT 11 on."""
    if int(trt.__version__.split(".")[0]) >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def timing_cache_file(job: PlanJob) -> Path:
    """Where timings of kernels are kept, for one kind of GPU and one TensorRT: those of others mislead.

    It begins with a dot and so is no part of the bundle.
    """
    platform = job.platform
    words = f"{platform.gpu} {platform.compute_capability} {platform.tensorrt}".lower()
    return job.bundle / "engines" / f".timing-{re.sub(r'[^a-z0-9.]+', '-', words).strip('-')}.cache"


def _timing_cache(config: Any, path: Path) -> Any:
    """Give the builder the timings of earlier builds, or none if it does not want them."""
    for blob in ([path.read_bytes()] if path.is_file() else []) + [b""]:
        cache = config.create_timing_cache(blob)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    raise CompileError("TensorRT refused an empty timing cache")
