"""How long a stage takes: the table from which the server predicts, admits and batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from engines.bundle.latency import LatencyRow
from engines.bundle.stages import Backend, StageSpec
from engines.compile.export import example_inputs
from engines.runtime.stages import Stage
from engines.runtime.timing import MAX_CALLS, MIN_CALLS, median_ms

__all__ = ["MAX_CALLS", "MIN_CALLS", "measure_stage", "median_ms"]


def measure_stage(
    spec: StageSpec, stage: Stage, backend: Backend, batch_sizes: Iterable[int], budget_s: float = 0.25
) -> list[LatencyRow]:
    """Time one stage at each batch size; on a GPU its memory, too."""
    rows = []
    for batch in batch_sizes:
        inputs = tuple(tensor.to(stage.device) for tensor in example_inputs(spec, batch))
        ms = median_ms(lambda inputs=inputs: stage(*inputs), budget_s, stage.device)  # type: ignore[misc]
        rows.append(
            LatencyRow(
                stage=spec.name,
                bucket=spec.bucket,
                batch=batch,
                backend=backend,
                ms=round(ms, 3),
                peak_bytes=_peak_bytes(stage, inputs),
            )
        )
    return rows


def _peak_bytes(stage: Stage, inputs: tuple[torch.Tensor, ...]) -> int | None:
    """Memory that a call takes on a GPU beyond what is there before; None elsewhere."""
    if stage.device.type != "cuda":
        return None
    torch.cuda.synchronize(stage.device)
    before = torch.cuda.memory_allocated(stage.device)
    torch.cuda.reset_peak_memory_stats(stage.device)
    stage(*inputs)
    torch.cuda.synchronize(stage.device)
    return int(torch.cuda.max_memory_allocated(stage.device) - before)
