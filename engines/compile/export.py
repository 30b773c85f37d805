"""A stage's wrapper as an exported program, and inputs to trace and compare it with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from engines.bundle.stages import StageSpec, TensorSpec
from engines.errors import CompileError


def example_inputs(spec: StageSpec, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs that look like real ones: unit-variance floats, integers over their whole range, prefix masks.

    Args:
        spec: the stage.
        batch: rows.
        seed: same seed, same inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_example(tensor, batch, generator) for tensor in spec.inputs)


def _example(spec: TensorSpec, batch: int, generator: torch.Generator) -> Tensor:
    shape = (batch, *spec.shape)
    if spec.maximum is None:
        return torch.randn(shape, generator=generator)
    if spec.name == "mask":
        lengths = torch.randint(1, spec.shape[0] + 1, (batch, 1), generator=generator)
        return (torch.arange(spec.shape[0]) < lengths).to(torch.int64)
    return torch.randint(0, spec.maximum + 1, shape, generator=generator)


def export_stage(
    module: nn.Module,
    spec: StageSpec,
    *,
    min_batch: int,
    max_batch: int,
    device: torch.device | str = "cpu",
) -> ExportedProgram:
    """Trace a stage for batches of `min_batch` to `max_batch`, on the device where the module is.

    Raises:
        CompileError: the module cannot be traced, or works for fewer batch sizes than asked for.
    """
    # a batch of 1 would be traced as the constant 1
    example_batch = min_batch if min_batch == max_batch else min(max(2, min_batch), max_batch)
    inputs = tuple(tensor.to(device) for tensor in example_inputs(spec, example_batch))
    dynamic_shapes: tuple[dict[int, Dim], ...] | None = None
    if min_batch != max_batch:
        batch = Dim("batch", min=min_batch, max=max_batch)
        dynamic_shapes = tuple({0: batch} for _ in inputs)
    try:
        with torch.no_grad():
            return export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # torch.export raises what it likes
        raise CompileError(f"stage {spec.name}: export failed: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
