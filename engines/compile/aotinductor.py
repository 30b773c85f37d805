"""One stage compiled with AOTInductor into a package without weights, and the file that names its constants.

Runs in a process of its own per stage, several at a time: tracing and code generation hold Python's lock, and
the C++ compiler uses one core.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from engines.bundle import DType, EngineFile, StageSpec
from engines.compile.export import export_stage
from engines.errors import CompileError
from engines.families.checkpoint import read_json, tensor_shapes
from engines.families.spec import get_family
from engines.families.weights import load_weights
from engines.platform import Platform
from engines.runtime.aotinductor import Binding, dump_bindings, load_package

INDUCTOR_CONFIG: dict[str, Any] = {
    # weights stay in the checkpoint: one copy for all packages, and a package outlives retraining
    "aot_inductor.package_constants_in_so": False,
    # else weights of up to 8 elements, such as the last convolution's bias, are written into the code
    "always_keep_tensor_constants": True,
    # takes 25 s of compiler time and 300 MB of disk, and saves 5 s on each of three packages
    "aot_inductor.precompile_headers": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """One package to make.

    Attributes:
        family: as in `student.json`.
        spec: the stage.
        min_batch: smallest batch it must take.
        max_batch: largest one.
        num_threads: of the process that will run it; baked into the loops.
        bundle: the bundle directory; the checkpoint is there already.
        platform: this machine.
    """

    family: str
    spec: StageSpec
    min_batch: int
    max_batch: int
    num_threads: int
    bundle: Path
    platform: Platform

    @property
    def label(self) -> str:
        """Name for people, and the start of the file name."""
        return self.spec.name if self.spec.bucket is None else f"{self.spec.name}-{self.spec.bucket.label}"


def describe_engine(job: CompileJob) -> EngineFile:
    """The package that `job` makes, with its key; whether or not it exists yet."""
    key = compile_key(job)
    stem = f"engines/{job.label}-{key[:12]}"
    return EngineFile(
        stage=job.spec.name,
        bucket=job.spec.bucket,
        backend="aotinductor",
        min_batch=job.min_batch,
        max_batch=job.max_batch,
        path=f"{stem}.pt2",
        constants=f"{stem}.safetensors",
        key=key,
    )


def compile_key(job: CompileJob) -> str:
    """Hash of all the generated code depends on: shapes, configs, sources, versions, CPU; not weights."""
    part = job.bundle / "checkpoint" / job.spec.part
    package = Path(__file__).parent.parent
    sources = [package / "families" / f"{job.family}.py", package / "compile" / "export.py", Path(__file__)]
    ingredients = {
        "spec": job.spec.model_dump(mode="json"),
        "batches": [job.min_batch, job.max_batch],
        "num_threads": job.num_threads,
        "config": read_json(part / "config.json"),
        "shapes": tensor_shapes(part),
        "inductor": INDUCTOR_CONFIG,
        "platform": job.platform.model_dump(include={"torch", "os", "machine", "libc", "cpu_flags"}),
        "libraries": {name: metadata.version(name) for name in ("diffusers", "transformers")},
        "sources": [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources],
    }
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def compile_stage(job: CompileJob) -> EngineFile:
    """Make a package, unless one with the same key is there.

    Both files appear complete or not at all, the package last.

    Raises:
        CompileError: export or compilation failed.
        CheckpointError: the stage's part cannot be loaded.
    """
    engine = describe_engine(job)
    package, constants = job.bundle / engine.path, job.bundle / engine.constants
    if package.is_file() and constants.is_file():
        return engine
    torch.set_num_threads(job.num_threads)
    checkpoint = job.bundle / "checkpoint"
    dtype = getattr(torch, job.spec.compute_dtype)
    module = get_family(job.family).load_stage(checkpoint, job.spec, dtype)
    program = export_stage(module, job.spec, min_batch=job.min_batch, max_batch=job.max_batch)
    partial = package.with_name(f"partial-{package.name}")
    _compile(program, partial, job)
    bindings, own = bind_constants(
        load_package(partial).get_constant_fqns(),
        _named_tensors(module, program),
        load_weights(checkpoint / job.spec.part),
    )
    save_file(own, constants, dump_bindings(bindings))
    # safetensors makes files for their owner alone; the package has what the user's umask gives
    constants.chmod(partial.stat().st_mode & 0o777)
    partial.replace(package)
    return engine


def _compile(program: ExportedProgram, path: Path, job: CompileJob) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_cache_dir(str(Path(tempfile.gettempdir()) / "inductor")):
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(INDUCTOR_CONFIG))
    except Exception as error:  # inductor raises what it likes, the C++ compiler's output included
        raise CompileError(
            f"stage {job.spec.name}: {type(error).__name__}: {last_error_line(error)}"
        ) from error


def last_error_line(error: Exception) -> str:
    """The line of a compiler's long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "no message")


def _named_tensors(module: nn.Module, program: ExportedProgram) -> dict[str, Tensor]:
    lifted = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    # `remove_duplicate=False`: a tied tensor is known by all its names
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return {**lifted, **buffers, **parameters}


def bind_constants(
    names: Iterable[str], tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Binding], dict[str, Tensor]]:
    """Find out where each constant of a package can be read from later.

    Args:
        names: constants of the package.
        tensors: what the module was compiled with, by those names (and others).
        weights: the checkpoint part's safetensors, as they are on disk.

    Returns:
        A binding per name, and the tensors that the checkpoint does not have.

    Raises:
        CompileError: a constant belongs neither to the module nor to the program.
    """
    bindings: dict[str, Binding] = {}
    own: dict[str, Tensor] = {}
    for name in names:
        tensor = tensors.get(name)
        if tensor is None:
            raise CompileError(f"constant {name} is neither in the module nor in the exported program")
        key = _find_weight(name, tensors, weights)
        bindings[name] = Binding(
            tensor=key or name,
            own=key is None,
            dtype=cast("DType", str(tensor.dtype).removeprefix("torch.")),
            stride=None if tensor.is_contiguous() else tensor.stride(),
        )
        if key is None:
            own[name] = tensor.detach().contiguous()
    return bindings, own


def _find_weight(name: str, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str | None:
    """The checkpoint's name of a module's tensor, under whichever of its names it was stored."""
    tensor = tensors[name]
    aliases = [other for other, value in tensors.items() if value.data_ptr() == tensor.data_ptr()]
    for alias in [name, *aliases]:
        # a wrapper holds a whole part under one attribute, or parts of it under their own names
        for key in (alias, alias.partition(".")[2]):
            stored = weights.get(key)
            if (
                stored is not None
                and stored.shape == tensor.shape
                and torch.equal(stored.to(tensor.dtype), tensor)
            ):
                return key
    return None
