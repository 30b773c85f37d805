"""How long a stage takes: the table from which the server predicts, admits and batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

from engines.bundle import Backend, LatencyRow, StageSpec
from engines.compile.export import example_inputs
from engines.runtime.stages import Stage

MIN_CALLS = 3
MAX_CALLS = 30


def median_ms(call: Callable[[], object], budget_s: float = 0.25) -> float:
    """Median wall time of `call` in milliseconds, after one call that does not count.

    Args:
        call: what to time.
        budget_s: stop after this long, but not before `MIN_CALLS`; at the latest after `MAX_CALLS`.
    """
    call()
    times_ms: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(times_ms) < MIN_CALLS or (len(times_ms) < MAX_CALLS and time.perf_counter() < deadline):
        start = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times_ms)


def measure_stage(
    spec: StageSpec, stage: Stage, backend: Backend, batch_sizes: Iterable[int], budget_s: float = 0.25
) -> list[LatencyRow]:
    """Time one stage at each batch size."""
    rows = []
    for batch in batch_sizes:
        inputs = example_inputs(spec, batch)
        ms = median_ms(lambda inputs=inputs: stage(*inputs), budget_s)  # type: ignore[misc]
        rows.append(
            LatencyRow(stage=spec.name, bucket=spec.bucket, batch=batch, backend=backend, ms=round(ms, 3))
        )
    return rows
