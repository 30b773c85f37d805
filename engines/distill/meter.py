"""What is measured of a run between two reports."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch import Tensor

from engines.distill.distributed import World


class Meter:
    """Averages over the iterations between two reports, of rows also per step of each K.

    Args:
        num_steps: the K that are trained.
    """

    def __init__(self, num_steps: Mapping[int, float]) -> None:
        self.labels = [f"{count}.{step + 1}" for count in sorted(num_steps) for step in range(count)]
        self._first = {count: self.labels.index(f"{count}.1") for count in num_steps}
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._norms: dict[str, float] = {}
        self._iterations = 0
        self._started = time.perf_counter()

    def add(
        self, num_steps: Tensor, step: Tensor, rows: Mapping[str, Tensor], norms: Mapping[str, float]
    ) -> None:
        """Add one iteration.

        Args:
            num_steps, step: (B,) the K of each row, and which of its steps.
            rows: (B,) losses or distances by name.
            norms: of the gradients.
        """
        first = torch.tensor([self._first[int(count)] for count in num_steps])
        for name, values in {"rows": torch.ones(len(first)), **rows}.items():
            sums = self.sums.setdefault(name, torch.zeros(len(self.labels), dtype=torch.float64))
            sums.index_add_(0, first + step.cpu(), values.detach().cpu().double())
        for name, norm in norms.items():
            self._norms[name] = self._norms.get(name, 0.0) + norm
        self._iterations += 1

    def flush(self, world: World) -> dict[str, object]:
        """Return the averages over all processes, ready for JSON, and start anew.

        Rows named "x_loss" are averaged over all under that name, and per step under "x_losses"; others per
        step alone.
        """
        self.sums = {name: world.sum(sums) for name, sums in self.sums.items()}
        count = self.sums.pop("rows")
        losses = {name: sums for name, sums in self.sums.items() if name.endswith("_loss")}
        metrics: dict[str, object] = {name: _round(sums.sum() / count.sum()) for name, sums in losses.items()}
        metrics |= {name: round(norm / self._iterations, 6) for name, norm in self._norms.items()}
        metrics["seconds_per_iteration"] = round((time.perf_counter() - self._started) / self._iterations, 4)
        for name, sums in self.sums.items():
            metrics[name.replace("_loss", "_losses")] = {
                label: _round(total / rows)
                for label, total, rows in zip(self.labels, sums, count, strict=True)
                if rows > 0
            }
        self._reset()
        return metrics


def _round(value: Tensor) -> float:
    return round(value.item(), 6)
