"""Pace: what batches take on this machine at this moment, over what the bundle's latency table says.

The table was measured when the bundle was built, on a machine that did nothing else. Beside an api, a
database and other workers the same engine may take half as long again. Who plans by the table alone then
believes that small batches keep up when they do not.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from statistics import median

from engines.bundle.bucket import Bucket

Table = Callable[[Bucket, int, int], float | None]
"""(bucket, num_steps, batch) -> ms; None where nothing was measured."""

# The median over so many batches, or jobs: a minute in which the process was frozen is one of them.
NUM_BATCHES = 15
# What the table says counts as so many at first: the very first batches find cold caches.
NUM_BELIEVED = 5


class RecentMedian:
    """Of the last `NUM_BATCHES` values. May be told from any thread."""

    def __init__(self, believed: float, num_believed: int) -> None:
        """`believed` counts as so many values at first."""
        self._lock = threading.Lock()
        self._values = deque([believed] * num_believed, maxlen=NUM_BATCHES)

    def observe(self, value: float) -> float:
        """Take one more value; the median with it."""
        with self._lock:
            self._values.append(value)
            return median(self._values)


class PacedCost:
    """A `CostModel`: the table's times at the pace of the last batches. Used by the engine's thread."""

    def __init__(self, table: Table) -> None:
        """Begins with what the table says."""
        self._table = table
        self._recent = RecentMedian(1.0, NUM_BELIEVED)
        self.pace = 1.0
        """Stays 1 where the table has nothing to compare batches with."""

    def __call__(self, bucket: Bucket, num_steps: int, batch: int) -> float:
        """Expected ms of a batch; where nothing was measured, every batch is taken to cost the same."""
        table_ms = self._table(bucket, num_steps, batch)
        return 1.0 if table_ms is None else self.pace * table_ms

    def observe(self, bucket: Bucket, num_steps: int, batch: int, took_ms: float) -> None:
        """Note what a batch took, all of whose samples were drawn with so many steps."""
        table_ms = self._table(bucket, num_steps, batch)
        if table_ms is not None:
            self.pace = self._recent.observe(took_ms / table_ms)
