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
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from engines.bundle.manifest import EngineFile
from engines.bundle.platform import Device, Platform
from engines.bundle.stages import Backend, DType, StageSpec
from engines.compile.cpu_layers import rewrite_for_cpu
from engines.compile.export import export_stage
from engines.compile.fp8 import has_float8, quantise_denoiser
from engines.compile.sources import hash_sources
from engines.errors import CompileError
from engines.families.checkpoint import read_json, tensor_shapes
from engines.families.image_vae import DecodeStage
from engines.families.spec import get_family
from engines.families.weights import load_weights
from engines.runtime.aotinductor import Binding, dump_bindings, load_package
from engines.runtime.rowwise import quantise_rows
from engines.runtime.stages import MODULE_DTYPES, load_module

INDUCTOR_CONFIG: dict[str, Any] = {
    # weights stay in the checkpoint: one copy for all packages, and a package outlives retraining
    "aot_inductor.package_constants_in_so": False,
    # else weights of up to 8 elements, such as the last convolution's bias, are written into the code
    "always_keep_tensor_constants": True,
    # takes 25 s of compiler time and 300 MB of disk, and saves 5 s on each of three packages
    "aot_inductor.precompile_headers": False,
}

CUDA_INDUCTOR_CONFIG: dict[str, Any] = {
    **INDUCTOR_CONFIG,
    # kernels are chosen by timing them; with what PyTorch's own flux-fast sets
    "max_autotune": True,
    "coordinate_descent_tuning": True,
    "conv_1x1_as_mm": True,
    "epilogue_fusion": False,
}
"""Packages for a GPU. `triton.cudagraphs` would be ignored: graphs are captured by
`runtime/cuda_graphs.py`."""


SCALE_SUFFIX = "_scale"
"""Of the scales of a `RowwiseLinear`'s weight."""

GPU_CACHE = ".inductor"
"""Folder in a bundle that is being built for a GPU."""


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
        device: "cpu" or "cuda".
    """

    family: str
    spec: StageSpec
    min_batch: int
    max_batch: int
    num_threads: int
    bundle: Path
    platform: Platform
    device: Device = "cpu"

    @property
    def label(self) -> str:
        """Name for people, and the start of the file name."""
        return self.spec.label if self.min_batch != self.max_batch else f"{self.spec.label}-b{self.min_batch}"

    @property
    def cache_dir(self) -> Path:
        """Where the compiler keeps what it made on the way. Timing a GPU's kernels takes many minutes: an
        interrupted build finds what was timed.
        """
        return self.bundle / GPU_CACHE if self.device == "cuda" else Path(tempfile.gettempdir()) / "inductor"

    @property
    def inductor_config(self) -> dict[str, Any]:
        """What the compiler is told."""
        return dict(CUDA_INDUCTOR_CONFIG if self.device == "cuda" else INDUCTOR_CONFIG)


def describe_engine(job: CompileJob) -> EngineFile:
    """The package that `job` makes, with its key; whether or not it exists yet."""
    key = compile_key(job)
    stem = f"engines/{job.label}-{key[:12]}"
    return EngineFile(
        stage=job.spec.name,
        bucket=job.spec.bucket,
        backend=Backend.AOTINDUCTOR,
        min_batch=job.min_batch,
        max_batch=job.max_batch,
        path=f"{stem}.pt2",
        constants=f"{stem}.safetensors",
        key=key,
    )


def compile_key(job: CompileJob) -> str:
    """Hash of all the generated code depends on: shapes, configs, sources, versions, CPU; not weights."""
    parts = [job.bundle / "checkpoint" / part for part in job.spec.parts]
    fields = {"torch", "os", "machine", "libc", "cpu_flags"}
    if job.device == "cuda":
        fields |= {"gpu", "compute_capability", "cuda"}
    ingredients = {
        "spec": job.spec.model_dump(mode="json"),
        "batches": [job.min_batch, job.max_batch],
        "num_threads": job.num_threads,
        "configs": [read_json(part / "config.json") for part in parts],
        "shapes": [tensor_shapes(part) for part in parts],
        "inductor": job.inductor_config,
        "device": job.device,
        "platform": job.platform.model_dump(include=fields),
        "libraries": {name: metadata.version(name) for name in ("diffusers", "transformers")},
        "sources": hash_sources(job.family, "compile.aotinductor"),
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
    module = load_for_compiling(job)
    program = export_stage(
        module, job.spec, min_batch=job.min_batch, max_batch=job.max_batch, device=job.device
    )
    partial = package.with_name(f"partial-{package.name}")
    _compile(program, partial, job)
    bindings, own = bind_constants(
        load_package(partial, job.device).get_constant_fqns(),
        _named_tensors(module, program),
        {part: load_weights(checkpoint / part) for part in job.spec.parts},
        torch.device(job.device),
    )
    save_file(own, constants, dump_bindings(bindings))
    # safetensors makes files for their owner alone; the package has what the user's umask gives
    constants.chmod(partial.stat().st_mode & 0o777)
    partial.replace(package)
    return engine


def load_for_compiling(job: CompileJob) -> nn.Module:
    """The stage's module as it is compiled: on its device, in its dtype, layers replaced by faster ones.

    Raises:
        CompileError: the device does not multiply in float8.
        CheckpointError: the stage's part cannot be loaded.
    """
    spec, device = job.spec, torch.device(job.device)
    family, checkpoint = get_family(job.family), job.bundle / "checkpoint"
    module = load_module(family, checkpoint, spec, MODULE_DTYPES[spec.compute_dtype], device)
    if job.device == "cpu":
        rewrite_for_cpu(module, channels_last=isinstance(module, DecodeStage))
    if spec.compute_dtype == "float8":
        if not has_float8(device):
            raise CompileError(
                f"stage {spec.name}: this GPU ({job.platform.gpu}) does not multiply in float8"
            )
        if not quantise_denoiser(module):
            raise CompileError(f"stage {spec.name}: no layer of it can be float8; use --precision bf16")
    return module


def _compile(program: ExportedProgram, path: Path, job: CompileJob) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_cache_dir(str(job.cache_dir)):
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=job.inductor_config)
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
    names: Iterable[str],
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Mapping[str, Tensor]],
    device: torch.device | None = None,
) -> tuple[dict[str, Binding], dict[str, Tensor]]:
    """Find out where each constant of a package can be read from later.

    Args:
        names: constants of the package.
        tensors: what the module was compiled with, by those names (and others).
        weights: safetensors of the stage's parts, by part, as they are on disk.
        device: where the package runs; by default wherever its tensors are.

    Returns:
        A binding per name, and the tensors that the checkpoint does not have.

    Raises:
        CompileError: a constant belongs neither to the module nor to the program.
    """
    bindings: dict[str, Binding] = {}
    own: dict[str, Tensor] = {}
    first = next(iter(weights))
    for name in names:
        tensor = tensors.get(name)
        if tensor is None:
            raise CompileError(f"constant {name} is neither in the module nor in the exported program")
        part, key = _find_weight(name, tensors, weights) or (None, None)
        bindings[name] = Binding(
            tensor=key or name,
            part=None if part == first else part,
            own=key is None,
            dtype=cast("DType", str(tensor.dtype).removeprefix("torch.")),
            stride=None if tensor.is_contiguous() else tensor.stride(),
            rowwise=_rowwise_role(name, tensors) if key is not None else None,
            device="cpu" if device is not None and tensor.device.type != device.type else None,
        )
        if key is None:
            own[name] = tensor.detach().contiguous()
    return bindings, own


def _rowwise_role(name: str, tensors: Mapping[str, Tensor]) -> Literal["weight", "scale"] | None:
    """What a constant is to a `RowwiseLinear`, if it is of one."""
    if name.endswith(SCALE_SUFFIX):
        return "scale"
    return "weight" if f"{name}{SCALE_SUFFIX}" in tensors else None


def _find_weight(
    name: str, tensors: Mapping[str, Tensor], weights: Mapping[str, Mapping[str, Tensor]]
) -> tuple[str, str] | None:
    """The checkpoint's part and name of a module's tensor, under whichever of its names it was stored."""
    tensor = tensors[name]
    role = _rowwise_role(name, tensors)
    aliases = [
        other
        for other, value in tensors.items()
        if value.data_ptr() == tensor.data_ptr() and value.shape == tensor.shape
    ]
    for part, stored_tensors in weights.items():
        for alias in [name, *aliases]:
            # a wrapper holds a whole part under one attribute, or parts of it under their own names
            base = alias.removesuffix(SCALE_SUFFIX) if role == "scale" else alias
            inner = base.partition(".")[2]
            for key in (base, inner, f"text_model.{inner}"):  # the last: CLIP as transformers 4 wrote it
                stored = stored_tensors.get(key)
                if stored is not None and _is_made_of(tensor, stored, role):
                    return part, key
    return None


def _is_made_of(tensor: Tensor, stored: Tensor, role: Literal["weight", "scale"] | None) -> bool:
    """Whether a module's tensor is what loading makes of a stored one."""
    if role is None:
        return stored.shape == tensor.shape and torch.equal(stored.to(tensor.device).to(tensor.dtype), tensor)
    if stored.ndim != 2 or stored.shape[0] != tensor.shape[0]:
        return False
    weight, scale = quantise_rows(stored.to(tensor.device, torch.bfloat16))
    # float8 has no comparison of its own
    return torch.equal(scale, tensor) if role == "scale" else torch.equal(weight.float(), tensor.float())
