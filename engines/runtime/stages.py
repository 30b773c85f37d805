"""Stages of a bundle: text, denoise and decode, each on whichever engine serves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from engines.bundle.manifest import Manifest
from engines.bundle.stages import Backend, ComputeDType, StageName, StageSpec, TensorSpec
from engines.families.spec import FamilySpec, get_family
from engines.runtime.aotinductor import AotInductorEngine, Constants
from engines.runtime.conv3d import use_onednn

CPU = torch.device("cpu")

MODULE_DTYPES: dict[ComputeDType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,  # what is not quantised
}
"""Dtype of a module's weights, by what its stage computes in."""


class Engine(Protocol):
    """Something that runs one stage for batches of `min_batch` to `max_batch`."""

    min_batch: int
    max_batch: int

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]: ...


class EagerEngine:
    """The family's own module, run by torch as it is."""

    def __init__(self, module: nn.Module, max_batch: int) -> None:
        self.min_batch, self.max_batch = 1, max_batch
        self._module = module

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            outputs: Tensor | tuple[Tensor, ...] = self._module(*inputs)
        return (outputs,) if isinstance(outputs, Tensor) else outputs


class Stage:
    """One stage: checks its inputs, picks an engine, pads where the engine needs it.

    Args:
        spec: what goes in and what comes out.
        engines: at least one; together they cover batches of 1 to `max_batch`, if need be by padding.
        max_batch: largest batch accepted.
        device: where the engines compute; inputs are moved there, outputs stay.
    """

    def __init__(
        self, spec: StageSpec, engines: Sequence[Engine], max_batch: int, device: torch.device = CPU
    ) -> None:
        self.spec = spec
        self.max_batch = max_batch
        self.device = device
        self._plan = [pick_engine(batch, engines) for batch in range(1, max_batch + 1)]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run one batch.

        Args:
            inputs: as `spec.inputs`, the batch first.

        Returns:
            As `spec.outputs`, the batch first; rows are the same whatever the batch around them, up to float
            rounding.

        Raises:
            ValueError: an input has another dtype or shape, or the batch is too large.
        """
        batch = self._check(inputs)
        engine, padded = self._plan[batch - 1]
        inputs = tuple(tensor.to(self.device, non_blocking=True) for tensor in inputs)
        if padded != batch:
            inputs = tuple(pad_rows(tensor, padded) for tensor in inputs)
        outputs = engine([tensor.contiguous() for tensor in inputs])
        return tuple(tensor[:batch] for tensor in outputs)

    def engine_for(self, batch: int) -> tuple[Engine, int]:
        """The engine that runs `batch` rows, and the size that they are padded to."""
        return self._plan[batch - 1]

    def route(self, batch: int, engine: Engine, padded: int) -> None:
        """Have `engine` run `batch` rows from now on, padded to `padded`."""
        assert engine.min_batch <= padded <= engine.max_batch
        assert batch <= padded
        self._plan[batch - 1] = (engine, padded)

    def _check(self, inputs: Sequence[Tensor]) -> int:
        specs = self.spec.inputs
        if len(inputs) != len(specs):
            raise ValueError(f"stage {self.spec.name} takes {len(specs)} tensors, not {len(inputs)}")
        batch = inputs[0].shape[0]
        if not 1 <= batch <= self.max_batch:
            raise ValueError(f"stage {self.spec.name} takes batches of 1 to {self.max_batch}, not {batch}")
        for tensor, spec in zip(inputs, specs, strict=True):
            if tensor.dtype != torch_dtype(spec) or tuple(tensor.shape) != (batch, *spec.shape):
                raise ValueError(
                    f"stage {self.spec.name} takes {spec.name} as {spec.dtype} {(batch, *spec.shape)}, "
                    f"not {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
                )
        return batch


def torch_dtype(spec: TensorSpec) -> torch.dtype:
    """The torch dtype that a manifest's dtype names."""
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def pick_engine(batch: int, engines: Sequence[Engine]) -> tuple[Engine, int]:
    """Choose an engine for `batch` rows and the size to pad them to.

    One compiled for exactly this size comes first, then one whose range covers it, then padding to the next
    larger size: a padded row costs as much as a real one.

    Raises:
        ValueError: no engine takes so many rows.
    """
    covering = [engine for engine in engines if engine.min_batch <= batch <= engine.max_batch]
    if covering:
        return min(covering, key=lambda engine: engine.max_batch - engine.min_batch), batch
    larger = [engine for engine in engines if engine.min_batch > batch]
    if not larger:
        raise ValueError(f"no engine takes a batch of {batch}")
    engine = min(larger, key=lambda engine: engine.min_batch)
    return engine, engine.min_batch


def pad_rows(tensor: Tensor, batch: int) -> Tensor:
    """Repeat the last row up to `batch` rows: real values, so nothing in a mask or a norm degenerates."""
    return torch.cat([tensor, tensor[-1:].expand(batch - tensor.shape[0], *tensor.shape[1:])])


def load_module(
    family: FamilySpec, checkpoint: Path, spec: StageSpec, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The family's module of one stage, with its weights, on a device.

    Raises:
        CheckpointError: a part of the checkpoint cannot be loaded.
    """
    if device.type == "cpu":
        module = family.load_stage(checkpoint, spec, dtype)
        use_onednn(module)
        return module
    # made on the device: what weights are initialised with before they are read takes a CPU minutes
    with device:
        module = family.load_stage(checkpoint, spec, dtype)
    return nn.Module.to(module, device)


class EagerStages:
    """The stages of a bundle, uncompiled. All buckets share the modules, and so the weights.

    Args:
        bundle: the bundle directory.
        manifest: of it.
        device: where they compute.
        reference: in float32, as the reference that compiled code is compared with. Otherwise as they are
            served: in float32 on a CPU, and on a GPU in what compiled code computes in, float8 aside.
    """

    def __init__(
        self, bundle: Path, manifest: Manifest, device: torch.device = CPU, *, reference: bool = True
    ) -> None:
        self._checkpoint = bundle / "checkpoint"
        self._manifest = manifest
        self._device = device
        self._full = reference or device.type == "cpu"
        self._modules: dict[StageName, nn.Module] = {}

    def load(self, spec: StageSpec) -> Stage:
        """One of them.

        Raises:
            CheckpointError: a part of the checkpoint cannot be loaded.
        """
        manifest = self._manifest
        if spec.name not in self._modules:
            family = get_family(manifest.family)
            dtype = torch.float32 if self._full else MODULE_DTYPES[spec.compute_dtype]
            self._modules[spec.name] = load_module(family, self._checkpoint, spec, dtype, self._device)
        engine = EagerEngine(self._modules[spec.name], manifest.max_batch)
        return Stage(spec, [engine], manifest.max_batch, self._device)


def load_compiled_stage(bundle: Path, manifest: Manifest, spec: StageSpec, constants: Constants) -> Stage:
    """Load a stage from its compiled packages, onto the device of `constants`.

    Raises:
        BundleError: a package or a constant is missing, damaged, or cannot be loaded here.
        ValueError: the packages do not cover every batch size.
    """
    engines = [
        AotInductorEngine(
            bundle / engine.path,
            constants.bind(spec, engine),
            min_batch=engine.min_batch,
            max_batch=engine.max_batch,
            device=constants.device,
        )
        for engine in manifest.engines
        if (engine.backend, engine.stage, engine.bucket) == (Backend.AOTINDUCTOR, spec.name, spec.bucket)
    ]
    return Stage(spec, engines, manifest.max_batch, constants.device)
