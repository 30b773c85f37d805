"""What one call of a stage takes, and what a batch takes by that. No torch here."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from engines.bundle.bucket import Bucket
from engines.bundle.stages import Backend, BucketLabel, Model, StageName


class LatencyRow(Model):
    """Median time of one call of one stage."""

    stage: StageName
    bucket: BucketLabel | None
    batch: int
    backend: Backend
    ms: float
    graph_ms: float | None = None
    """The same replayed as a CUDA graph; None where that was not measured or cannot be."""
    peak_bytes: int | None = None
    """Memory that the call takes beyond weights and inputs; measured on a GPU, None elsewhere."""

    @property
    def served_ms(self) -> float:
        """What a call takes as it is served: by a graph where that is faster."""
        return self.ms if self.graph_ms is None else min(self.ms, self.graph_ms)


def stage_ms(
    rows: Iterable[LatencyRow], stage: StageName, bucket: Bucket, batch: int, backend: Backend
) -> float:
    """Milliseconds of one call of one stage, between measured batch sizes by straight line.

    Raises:
        ValueError: nothing was measured for this stage, bucket and backend.
    """
    points = sorted(
        (row.batch, row.served_ms)
        for row in rows
        if (row.stage, row.backend) == (stage, backend) and row.bucket in (None, bucket)
    )
    if not points:
        raise ValueError(f"no latency was measured for {stage} at {bucket.label} with {backend}")
    return _interpolate(points, batch)


def _interpolate(points: Sequence[tuple[int, float]], batch: int) -> float:
    """Value at `batch`: on the line between neighbours, beyond the last point in proportion to it."""
    batches = [point[0] for point in points]
    right = bisect_left(batches, batch)
    if right == len(points):
        return points[-1][1] * batch / points[-1][0]
    if right == 0 or batches[right] == batch:
        return points[right][1]
    (b0, ms0), (b1, ms1) = points[right - 1], points[right]
    return ms0 + (ms1 - ms0) * (batch - b0) / (b1 - b0)
