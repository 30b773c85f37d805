"""Stages of a bundle: text, denoise and decode, each on whichever engine serves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from engines.bundle import Manifest, StageSpec, TensorSpec
from engines.families.spec import get_family
from engines.runtime.aotinductor import AotInductorEngine, Constants


class Engine(Protocol):
    """Something that runs one stage for batches of `min_batch` to `max_batch`; AOTInductor or eager."""

    min_batch: int
    max_batch: int

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor: ...


class EagerEngine:
    """The family's own module, run by torch as it is."""

    def __init__(self, module: nn.Module, max_batch: int) -> None:
        self.min_batch, self.max_batch = 1, max_batch
        self._module = module

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        with torch.inference_mode():
            output: Tensor = self._module(*inputs)
        return output


class Stage:
    """One stage: checks its inputs, picks an engine, pads where the engine needs it.

    Args:
        spec: what goes in and what comes out.
        engines: at least one; together they cover batches of 1 to `max_batch`, if need be by padding.
        max_batch: largest batch accepted.
    """

    def __init__(self, spec: StageSpec, engines: Sequence[Engine], max_batch: int) -> None:
        self.spec = spec
        self.max_batch = max_batch
        self._plan = [pick_engine(batch, engines) for batch in range(1, max_batch + 1)]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run one batch.

        Args:
            inputs: as `spec.inputs`, the batch first.

        Returns:
            (B, ...) as `spec.output`; rows are the same whatever the batch around them, up to float rounding.

        Raises:
            ValueError: an input has another dtype or shape, or the batch is too large.
        """
        batch = self._check(inputs)
        engine, padded = self._plan[batch - 1]
        if padded != batch:
            inputs = tuple(pad_rows(tensor, padded) for tensor in inputs)
        return engine([tensor.contiguous() for tensor in inputs])[:batch]

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


def load_eager_stage(bundle: Path, manifest: Manifest, spec: StageSpec) -> Stage:
    """Load a stage from the checkpoint, uncompiled.

    Raises:
        CheckpointError: the part cannot be loaded.
    """
    module = get_family(manifest.family).load_stage(bundle / "checkpoint", spec, torch.float32)
    return Stage(spec, [EagerEngine(module, manifest.max_batch)], manifest.max_batch)


def load_compiled_stage(bundle: Path, manifest: Manifest, spec: StageSpec, constants: Constants) -> Stage:
    """Load a stage from its compiled packages.

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
        )
        for engine in manifest.engines
        if (engine.stage, engine.bucket) == (spec.name, spec.bucket)
    ]
    return Stage(spec, engines, manifest.max_batch)
