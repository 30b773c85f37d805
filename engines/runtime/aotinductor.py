"""Compiled packages in memory: AOTInductor code whose weights are the checkpoint's own tensors.

A package holds code only. The names of its constants, and where each one lies, are in the header of the
safetensors file beside it (see `Binding`); constants that no checkpoint has, such as position tables, are in
that file itself. Every package that needs a tensor shares one copy of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.types import StringConstraints
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engines.bundle import DType, EngineFile, StageSpec
from engines.errors import BundleError, CheckpointError
from engines.families.checkpoint import check_safetensors, weight_files

BINDINGS = "bindings"
"""Key of the header entry that maps constant names to `Binding`s, as JSON."""


class Binding(BaseModel):
    """Where one constant of a package comes from, and the form in which the code expects it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: Annotated[str, StringConstraints(min_length=1)]
    """Name in the checkpoint part's safetensors, or in this file if `own`."""
    own: bool = False
    dtype: DType
    stride: tuple[int, ...] | None = None
    """None: contiguous."""


_BINDINGS = TypeAdapter(dict[str, Binding])


def dump_bindings(bindings: Mapping[str, Binding]) -> dict[str, str]:
    """Header entries for the safetensors file beside a package."""
    return {BINDINGS: _BINDINGS.dump_json(dict(bindings), exclude_defaults=True).decode()}


class Constants:
    """Tensors of one bundle, each read once in each form that some package expects.

    Args:
        bundle: the bundle directory.
    """

    def __init__(self, bundle: Path) -> None:
        self._bundle = bundle
        self._tensors: dict[tuple[Path, Binding], Tensor] = {}

    def bind(self, spec: StageSpec, engine: EngineFile) -> dict[str, Tensor]:
        """All constants of one package, by the names that it uses.

        Raises:
            BundleError: the header is damaged, or a tensor is missing from the checkpoint.
        """
        own = self._bundle / engine.constants
        bindings = _read_bindings(own, engine.constants)
        missing = {
            binding
            for binding in bindings.values()
            if (self._source(spec, own, binding)) not in self._tensors
        }
        part = self._bundle / "checkpoint" / spec.part
        files = weight_files(part) if any(not binding.own for binding in missing) else []
        for file in [*files, own]:
            wanted = {binding for binding in missing if binding.own == (file == own)}
            missing -= self._read(spec, file, own, wanted)
        if missing:
            name = min(binding.tensor for binding in missing)
            raise BundleError(f"checkpoint.{spec.part}.{name}", f"missing, but {engine.path} needs it")
        return {name: self._tensors[self._source(spec, own, binding)] for name, binding in bindings.items()}

    def _source(self, spec: StageSpec, own: Path, binding: Binding) -> tuple[Path, Binding]:
        return (own if binding.own else Path(spec.part), binding)

    def _read(self, spec: StageSpec, file: Path, own: Path, wanted: set[Binding]) -> set[Binding]:
        """Read what `file` has of `wanted`; return what was found."""
        try:
            check_safetensors(file)
            with safe_open(file, framework="pt") as stream:
                present = set(stream.keys())
                found = {binding for binding in wanted if binding.tensor in present}
                for binding in found:
                    tensor = _as_bound(stream.get_tensor(binding.tensor), binding)
                    self._tensors[self._source(spec, own, binding)] = tensor
        except (CheckpointError, SafetensorError) as error:
            raise BundleError(f"files.{file.relative_to(self._bundle).as_posix()}", str(error)) from None
        return found


def _read_bindings(path: Path, name: str) -> dict[str, Binding]:
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


def _as_bound(tensor: Tensor, binding: Binding) -> Tensor:
    tensor = tensor.to(getattr(torch, binding.dtype))
    if binding.stride is None:
        return tensor.contiguous()
    return torch.empty_strided(tensor.shape, binding.stride, dtype=tensor.dtype).copy_(tensor)


def load_package(path: Path) -> torch._C._aoti.AOTIModelPackageLoader:
    """Load the code of a package; its constants are still missing.

    This is the C++ loader itself: `torch._inductor.package` wraps it, and takes seconds to import.

    Raises:
        BundleError: the file is no package, or its code cannot be linked here.
    """
    model_name, run_single_threaded, num_runners, device_index = "model", True, 1, -1
    try:
        return torch._C._aoti.AOTIModelPackageLoader(
            str(path), model_name, run_single_threaded, num_runners, device_index
        )
    except RuntimeError as error:
        raise BundleError(
            f"files.engines/{path.name}", f"cannot be loaded: {str(error).splitlines()[0]}"
        ) from None


class AotInductorEngine:
    """One loaded package. Inputs must be as they were when it was compiled: it does not check.

    Args:
        path: the `.pt2` file.
        constants: tensors by the package's names; used in place, so they live as long as this object.
        min_batch: smallest batch the code was compiled for.
        max_batch: largest one.

    Raises:
        BundleError: the code cannot be loaded, or needs other constants.
    """

    def __init__(self, path: Path, constants: dict[str, Tensor], *, min_batch: int, max_batch: int) -> None:
        self.min_batch, self.max_batch = min_batch, max_batch
        self._loader = load_package(path)
        if set(self._loader.get_constant_fqns()) != set(constants):
            raise BundleError(
                f"files.engines/{path.name}", "its constants are not those of the file beside it"
            )
        self._constants = constants
        use_inactive, check_full_update, user_managed = False, True, True
        self._loader.load_constants(constants, use_inactive, check_full_update, user_managed)

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Run the package on one batch."""
        (output,) = self._loader.boxed_run(list(inputs))
        assert isinstance(output, Tensor)
        return output
