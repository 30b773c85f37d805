"""What is measured: samplers and what came of them at each seed, over all seeds, and between two of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engines.gate.report import Spread

STUDENT_T = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""95 % quantiles of Student's t for 2 seeds and more."""


@dataclass(frozen=True, slots=True)
class Row:
    """One sampler of the table.

    Attributes:
        key: stable name, for example "teacher-50-cfg".
        label: what the table calls it.
        source: "real" or "vae" (of real renders), "teacher" or "student".
        num_steps, guidance_scale: how teacher and student sample.
    """

    key: str
    label: str
    source: Literal["real", "vae", "teacher", "student"]
    num_steps: int = 0
    guidance_scale: float = 1.0

    @property
    def nfe(self) -> int:
        return self.num_steps * (1 if self.guidance_scale == 1.0 else 2)

    @property
    def cost(self) -> int:
        """Rough work per picture, in transformer evaluations; decoding and reading it cost about four."""
        return self.nfe + 4


@dataclass(frozen=True, slots=True)
class Measurement:
    """One row at one seed.

    Attributes:
        accuracy: percent of pictures that show all that was asked, per kind of prompt and over "all"; empty
            where there is no judge.
        frechet: Fréchet distance to real renders, or to the teacher's pictures, in percent of their variance.
        diversity: mean distance of two pictures of one prompt, in the same features.
        scores: mean over pictures of each score, by its name.
    """

    accuracy: dict[str, float]
    frechet: float
    diversity: float | None = None
    scores: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one row takes, and what comes of it from the same noise.

    Attributes:
        seconds: per picture, prompts to pixels.
        paired: distance to the teacher's pictures of most steps, in percent of that between its own pictures
            of different prompts.
    """

    seconds: float
    paired: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One row over all seeds."""

    row: Row
    accuracy: dict[str, Spread]
    frechet: Spread
    scores: dict[str, Spread]
    measurements: tuple[Measurement, ...]

    @classmethod
    def of(cls, row: Row, measurements: Sequence[Measurement]) -> Summary:
        return cls(
            row,
            {
                group: Spread.of([one.accuracy[group] for one in measurements])
                for group in measurements[0].accuracy
            },
            Spread.of([one.frechet for one in measurements]),
            {name: Spread.of([one.scores[name] for one in measurements]) for name in measurements[0].scores},
            tuple(measurements),
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more one row has than another over the same prompts and noise.

    Attributes:
        mean: over seeds.
        error: its standard error; None with one seed.
        num_seeds: how many there were.
    """

    mean: float
    error: float | None
    num_seeds: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
        """Pair the seeds."""
        each = [a - b for a, b in zip(ours, theirs, strict=True)]
        error = statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
        return cls(statistics.fmean(each), error, len(each))

    @property
    def lowest(self) -> float:
        """Below it the true difference lies in 1 of 20 cases; -inf with one seed, which says nothing."""
        return self.mean - self._reach

    @property
    def highest(self) -> float:
        """As `lowest`, above."""
        return self.mean + self._reach

    @property
    def _reach(self) -> float:
        if self.error is None:
            return math.inf
        return STUDENT_T[min(self.num_seeds, len(STUDENT_T) + 1) - 2] * self.error

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.mean:+.2f}, of one seed"
        return f"{self.mean:+.2f} (90 % interval {self.lowest:+.2f} to {self.highest:+.2f})"


Measured = Sequence[tuple[Row, Sequence[Measurement]]]
"""Rows in the table's order, with one measurement per seed."""


def difference(
    row: Row, ours: Sequence[Measurement], best: str, theirs: Sequence[Measurement]
) -> dict[str, Any]:
    """How a row differs from another over the same prompts and noise: mean, and standard error over seeds.

    A standard error is None with one seed.
    """
    values = {"frechet": ([a.frechet for a in ours], [b.frechet for b in theirs])}
    if "all" in ours[0].accuracy:
        values["accuracy"] = ([a.accuracy["all"] for a in ours], [b.accuracy["all"] for b in theirs])
    for name in ours[0].scores:
        values[name] = ([a.scores[name] for a in ours], [b.scores[name] for b in theirs])
    found = {name: Difference.of(*each) for name, each in values.items()}
    return {
        "key": row.key,
        "label": row.label,
        "against": best,
        **{name: {"mean": one.mean, "standard_error": one.error} for name, one in found.items()},
    }
