"""Compiled packages in memory: AOTInductor code whose weights are the checkpoint's own tensors.

A package holds code only. The names of its constants, and where each one lies, are in the header of the
safetensors file beside it (see `Binding`); constants that no checkpoint has, such as position tables, are in
that file itself. Every package that needs a tensor shares one copy of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.types import StringConstraints
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.bundle.manifest import EngineFile
from engines.bundle.stages import DType, StageSpec
from engines.errors import BundleError, CheckpointError
from engines.families.checkpoint import check_safetensors, current_name, weight_files
from engines.runtime.rowwise import quantise_rows
from engines.runtime.unlocked import UnlockedPackage, can_unlock, not_loaded

BINDINGS = "bindings"
"""Key of the header entry that maps constant names to `Binding`s, as JSON."""


class Binding(BaseModel):
    """Where one constant of a package comes from, and the form in which the code expects it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: Annotated[str, StringConstraints(min_length=1)]
    """Its `current_name` in the safetensors of a part of the checkpoint, or in this file if `own`."""
    part: str | None = None
    """Folder under `checkpoint/`; None: the stage's first part."""
    own: bool = False
    dtype: DType | Literal["float8_e4m3fn"]
    stride: tuple[int, ...] | None = None
    """None: contiguous."""
    rowwise: Literal["weight", "scale"] | None = None
    """The code wants what `quantise_rows` makes of the tensor: its float8 weight, or the scales of the
    rows."""
    device: Literal["cpu"] | None = None
    """None: where the code runs. Code for a GPU may keep a number on the CPU."""


_BINDINGS = TypeAdapter(dict[str, Binding])


def dump_bindings(bindings: Mapping[str, Binding]) -> dict[str, str]:
    """Header entries for the safetensors file beside a package."""
    return {BINDINGS: _BINDINGS.dump_json(dict(bindings), exclude_defaults=True).decode()}


class Constants:
    """Tensors of one bundle, each read once in each form that some package expects.

    Args:
        bundle: the bundle directory.
        device: where the packages run.
    """

    def __init__(self, bundle: Path, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._bundle = bundle
        self._tensors: dict[tuple[Path, Binding], Tensor] = {}

    def bind(self, spec: StageSpec, engine: EngineFile) -> dict[str, Tensor]:
        """All constants of one package, by the names that it uses.

        Raises:
            BundleError: the header is damaged, or a tensor is missing from the checkpoint.
        """
        own = self._bundle / engine.constants
        bindings = read_bindings(own, engine.constants)
        sources = {name: self._source(spec, own, binding) for name, binding in bindings.items()}
        missing = {source for source in sources.values() if source not in self._tensors}
        for place in sorted({place for place, _ in missing}):
            wanted = {binding for where, binding in missing if where == place}
            for file in [own] if place == own else weight_files(place):
                wanted -= self._read(place, file, wanted)
            if wanted:
                name = min(binding.tensor for binding in wanted)
                raise BundleError(f"checkpoint.{place.name}.{name}", f"missing, but {engine.path} needs it")
        return {name: self._tensors[source] for name, source in sources.items()}

    def _source(self, spec: StageSpec, own: Path, binding: Binding) -> tuple[Path, Binding]:
        """Where a constant lies: the file beside the package, or a part's folder."""
        part = self._bundle / "checkpoint" / (binding.part or spec.parts[0])
        return (own if binding.own else part, binding)

    def _read(self, place: Path, file: Path, wanted: set[Binding]) -> set[Binding]:
        """Read what `file` has of `wanted`; return what was found."""
        try:
            check_safetensors(file)
            with safe_open(file, framework="pt") as stream:
                stored = {current_name(name): name for name in stream.keys()}  # noqa: SIM118
                found = {binding for binding in wanted if binding.tensor in stored}
                for binding in found:
                    tensor = _as_bound(stream.get_tensor(stored[binding.tensor]), binding, self.device)
                    self._tensors[place, binding] = self._same(tensor, binding) if binding.own else tensor
        except (CheckpointError, SafetensorError) as error:
            raise BundleError(f"files.{file.relative_to(self._bundle).as_posix()}", str(error)) from None
        return found

    def _same(self, tensor: Tensor, binding: Binding) -> Tensor:
        """The equal tensor that came with another package, say for another batch size; else this one."""
        others = (other for (_, found), other in self._tensors.items() if found == binding)
        return next((other for other in others if torch.equal(other, tensor)), tensor)


def read_bindings(path: Path, name: str) -> dict[str, Binding]:
    """Where each constant of a package comes from.

    Args:
        path: the safetensors file beside the package.
        name: its path inside the bundle, for messages.

    Raises:
        BundleError: the file or its header is damaged.
    """
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as stream:
            return _BINDINGS.validate_json((stream.metadata() or {})[BINDINGS])
    except (
        CheckpointError,
        SafetensorError,
        KeyError,
        OSError,
        json.JSONDecodeError,
        ValidationError,
    ) as error:
        raise BundleError(
            f"files.{name}", f"no constants can be read from it ({type(error).__name__})"
        ) from None


def _as_bound(tensor: Tensor, binding: Binding, device: torch.device) -> Tensor:
    tensor = tensor.to(device if binding.device is None else binding.device)
    if binding.rowwise is not None:
        weight, scale = quantise_rows(tensor.to(torch.bfloat16))  # as the compiler saw it
        return weight if binding.rowwise == "weight" else scale
    tensor = tensor.to(getattr(torch, binding.dtype))
    if binding.stride is None:
        return tensor.contiguous()
    empty = torch.empty_strided(tensor.shape, binding.stride, dtype=tensor.dtype, device=tensor.device)
    return empty.copy_(tensor)


def load_package(path: Path, device: torch.device | str = "cpu") -> torch._C._aoti.AOTIModelPackageLoader:
    """Load the code of a package; its constants are still missing.

    This is the C++ loader itself: `torch._inductor.package` wraps it, and takes seconds to import. Single
    threaded: the pool of models that it keeps otherwise waits for events, which no CUDA graph may contain.

    Raises:
        BundleError: the file is no package, or its code cannot be linked here.
    """
    device = torch.device(device)
    model_name, run_single_threaded, num_runners = "model", True, 1
    device_index = (device.index or 0) if device.type == "cuda" else -1
    try:
        return torch._C._aoti.AOTIModelPackageLoader(
            str(path), model_name, run_single_threaded, num_runners, device_index
        )
    except RuntimeError as error:
        raise not_loaded(path, error) from None


class AotInductorEngine:
    """One loaded package. Inputs must be as they were when it was compiled: it does not check.

    Args:
        path: the `.pt2` file.
        constants: tensors by the package's names; used in place, so they live as long as this object.
        min_batch: smallest batch the code was compiled for.
        max_batch: largest one.
        device: where it runs; on a GPU on the current stream.

    Raises:
        BundleError: the code cannot be loaded, or needs other constants.
    """

    def __init__(
        self,
        path: Path,
        constants: dict[str, Tensor],
        *,
        min_batch: int,
        max_batch: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.min_batch, self.max_batch = min_batch, max_batch
        on_cpu = torch.device(device).type == "cpu"
        # On a GPU a call returns as soon as its work is queued.
        self._run: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = (
            UnlockedPackage(path, constants)
            if on_cpu and can_unlock(path)
            else LockedPackage(path, constants, device)
        )

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the package on one batch."""
        return self._run(inputs)


class LockedPackage:
    """One package in torch's own loader, which holds Python's lock while a call lasts.

    Args and errors as of `AotInductorEngine`.
    """

    def __init__(self, path: Path, constants: Mapping[str, Tensor], device: torch.device | str) -> None:
        self._loader = load_package(path, device)
        if set(self._loader.get_constant_fqns()) != set(constants):
            raise BundleError(
                f"files.engines/{path.name}", "its constants are not those of the file beside it"
            )
        self._constants = constants
        use_inactive, check_full_update, user_managed = False, True, True
        self._loader.load_constants(dict(constants), use_inactive, check_full_update, user_managed)

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the package on one batch."""
        return tuple(self._loader.boxed_run(list(inputs)))
