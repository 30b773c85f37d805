"""Scalers: what decides how many workers there are, as Kubernetes' HorizontalPodAutoscaler does it. Pure.

Every `SYNC_S` the autoscaler reads a metric and computes a number of replicas: for an external metric with
`AverageValue`, as KEDA makes them, ceil(metric / threshold); for utilisation, ceil(replicas * share /
target). A change of less than 10 % is none. What it does about it is bounded by its behaviour: so many more
in a period; so many fewer, and only what nobody has needed for the length of the stabilisation window.
(kubernetes.io, "Horizontal Pod Autoscaling", algorithm details; autoscaling/v2 scaling policies.)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

SYNC_S = 15.0
TOLERANCE = 0.1
# As deploy/k8s/overlays/keda/scale.yaml asks for workers that draw images.
BUSY = 0.75
DRAIN_S = 15.0
WINDOW_S = 120.0


class Observed(Protocol):
    """What a scaler can see of a fleet."""

    @property
    def num_workers(self) -> int:
        """Those that serve or start."""

    @property
    def backlog_ms(self) -> float:
        """Engine time of what waits."""

    def busy(self, since_ms: float, now_ms: float) -> float:
        """Mean number of engines that ran."""

    def offered(self, since_ms: float, now_ms: float) -> float:
        """Engine time, in full batches, that came in, by time."""


Metric = Callable[[Observed, float], float]
"""(fleet, now in ms) -> how many workers are wanted, not rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How fast replicas may come and go; the defaults are those of deploy/k8s/overlays/keda/scale.yaml."""

    least: int = 1
    most: int = 8
    up: int = 2
    up_period_s: float = 60.0
    down: int = 1
    down_period_s: float = 120.0
    stabilisation_s: float = 600.0


@dataclass(slots=True)
class Autoscaler:
    """One HorizontalPodAutoscaler."""

    wanted: Metric
    behaviour: Behaviour
    _recommended: deque[tuple[float, int]] = field(default_factory=deque)
    _changes: deque[tuple[float, int]] = field(default_factory=deque)

    def replicas(self, fleet: Observed, now_ms: float) -> int:
        """How many there are to be now."""
        how, current, now_s = self.behaviour, fleet.num_workers, now_ms / 1000
        wanted = self.wanted(fleet, now_ms)
        if abs(wanted - current) <= TOLERANCE * current:
            wanted = current
        recommended = min(how.most, max(how.least, math.ceil(wanted - 1e-9)))
        self._recommended.append((now_s, recommended))
        while self._recommended[0][0] < now_s - how.stabilisation_s:
            self._recommended.popleft()
        if recommended < current:  # the most that was wanted lately
            recommended = min(current, max(count for _, count in self._recommended))
        if recommended > current:
            recommended = min(recommended, current + how.up - self._changed(now_s, how.up_period_s, 1))
        else:
            recommended = max(recommended, current - how.down + self._changed(now_s, how.down_period_s, -1))
        if recommended != current:
            self._changes.append((now_s, recommended - current))
        return recommended

    def _changed(self, now_s: float, period_s: float, sign: int) -> int:
        """Replicas that came (sign 1) or went (-1) in the last period."""
        while self._changes and self._changes[0][0] < now_s - 3600:
            self._changes.popleft()
        return sum(abs(by) for when_s, by in self._changes if when_s > now_s - period_s and by * sign > 0)


def by_backlog(threshold_s: float) -> Metric:
    """Seconds of engine time that wait, per worker no more than the threshold."""
    return lambda fleet, _: fleet.backlog_ms / 1000 / threshold_s


def by_utilisation(target: float, window_s: float = WINDOW_S) -> Metric:
    """Share of the time in which engines run: what scaling by CPU or GPU load sees."""
    return lambda fleet, now_ms: fleet.busy(max(0.0, now_ms - 1000 * window_s), now_ms) / target


def by_demand(target: float = BUSY, drain_s: float = DRAIN_S, window_s: float = WINDOW_S) -> Metric:
    """Workers that what comes in keeps so busy, and as many more as do what waits in `drain_s`."""

    def wanted(fleet: Observed, now_ms: float) -> float:
        offered = fleet.offered(max(0.0, now_ms - 1000 * window_s), now_ms)
        return offered / target + fleet.backlog_ms / 1000 / drain_s

    return wanted
