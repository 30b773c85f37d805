"""Ways to form batches, as `server.worker.batch_policy.decide` is called: ours, and what others do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.worker.batch_policy import Row, Run, Wait, decide
from server.worker.simulation import Policy, SimulatedJob


def fixed_delay(delay_ms: float) -> Policy:
    """As Triton, TorchServe and LitServe do: run when a batch is full, or its oldest has waited so long."""

    def policy(
        rows: Sequence[Row[SimulatedJob]], *, now_ms: float, max_batch: int, **_: Any
    ) -> Run[SimulatedJob] | Wait:
        batch = tuple(rows[:max_batch])
        left_ms = delay_ms - (now_ms - min(row.leased_job.came_ms for row in batch))
        return Wait(left_ms) if len(batch) < max_batch and left_ms > 0 else Run(batch)

    return policy


def no_batches(rows: Sequence[Row[SimulatedJob]], **_: Any) -> Run[SimulatedJob]:
    """One after the other."""
    return Run((rows[0],))


OURS = "ours"
POLICIES: dict[str, Policy] = {
    OURS: decide,
    "no delay": fixed_delay(0.0),
    "5 ms": fixed_delay(5.0),
    "20 ms": fixed_delay(20.0),
    "50 ms": fixed_delay(50.0),
    "no batches": no_batches,
}
"""By name; those with a time are fixed delays."""
