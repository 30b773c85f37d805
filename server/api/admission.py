"""Admission: accept a job, or refuse it with the time at which asking again makes sense. Pure functions.

Few-step students cost nearly the same every time, so the bundle's measured latency table predicts when a job
that joins the queue now would be finished, corrected by how long the workers' last batches really took. Who
is refused learns it at once, instead of after a timeout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from server.queue.records import Outlook

NO_WORKER_RETRY_MS = 5_000.0
MIN_RETRY_MS = 50.0
HURRY = 0.5
"""Share of its deadline that a job may need before it is drawn in fewer steps, where the client agrees."""


class Refusal(StrEnum):
    """Why a job is refused before it is in the queue; QUEUE and DEADLINE by prediction, too.

    QUEUE: too many wait. DEADLINE: it would be finished too late. TENANT: too many of this tenant's are in
    flight. MEMORY: Redis is full. IDEMPOTENCY: its key is another request's.
    """

    QUEUE = "queue"
    DEADLINE = "deadline"
    TENANT = "tenant"
    MEMORY = "memory"
    IDEMPOTENCY = "idempotency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What stands before a new job.

    Attributes:
        waiting: jobs in the queue.
        waiting_ms: predicted engine time of those.
        running_ms: of the jobs that workers hold, from their start.
        num_workers: live workers.
        max_batch: samples that one worker runs at once.
        pace: what the workers' batches take now, over what is predicted for them.
        beside_ms: what a job takes now once it is drawn.
        margin: by how much jobs lately waited longer than predicted, in all but one of twenty cases.
    """

    waiting: int
    waiting_ms: float
    running_ms: float
    num_workers: int
    max_batch: int
    pace: float = 1.0
    beside_ms: float = 0.0
    margin: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The answer to one job.

    Attributes:
        reason: why it is refused; None admits it.
        eta_ms: predicted time until it is finished; None with no worker to predict for.
        latest_ms: the same, and rarely later.
        is_hurried: fewer steps are better, where the client agrees.
        retry_after_ms: when a refused job would probably be admitted.
    """

    reason: Refusal | None = None
    eta_ms: float | None = None
    latest_ms: float | None = None
    is_hurried: bool = False
    retry_after_ms: float | None = None


def decide(
    load: Load, batch_ms: Callable[[int], float], *, num_samples: int, max_waiting: int, deadline_ms: float
) -> Decision:
    """Admit a job unless the queue is full or the job would hardly be finished before its deadline.

    With no live worker a job is admitted while there is room: it waits for one.

    Args:
        load: the queue as it is now.
        batch_ms: predicted time of one batch of the given number of samples, 1..max_batch.
        num_samples: samples that the job asks for.
        max_waiting: jobs that may wait.
        deadline_ms: time that the job has.
    """
    own = own_ms(load, batch_ms, num_samples)
    eta_ms = predict_eta_ms(load, own)
    latest_ms = predict_latest_ms(load, own)
    decided = Decision(
        eta_ms=eta_ms,
        latest_ms=latest_ms,
        is_hurried=latest_ms is not None and latest_ms > HURRY * deadline_ms,
    )
    if load.waiting >= max_waiting:
        return replace(decided, reason=Refusal.QUEUE, retry_after_ms=drain_ms(load, max_waiting))
    if latest_ms is not None and latest_ms > deadline_ms:
        return replace(decided, reason=Refusal.DEADLINE, retry_after_ms=late_ms(latest_ms, deadline_ms))
    return decided


def own_ms(load: Load, batch_ms: Callable[[int], float], num_samples: int) -> float:
    """How long a worker takes for a job that it has to itself, by the table.

    Args:
        load: the queue as it is now.
        batch_ms: predicted time of one batch of the given number of samples.
        num_samples: samples that the job asks for.
    """
    return math.ceil(num_samples / load.max_batch) * batch_ms(min(num_samples, load.max_batch))


def predict_eta_ms(load: Load, own: float, *, ahead_ms: float | None = None) -> float | None:
    """Predicted time until a job is finished; None with no live worker.

    Args:
        load: the queue as it is now.
        own: its own time, from `own_ms`.
        ahead_ms: by the table, of the jobs served before it; by default of all that wait and run.
    """
    if load.num_workers == 0:
        return None
    ahead_ms = load.waiting_ms + load.running_ms if ahead_ms is None else ahead_ms
    return load.pace * (ahead_ms / load.num_workers + own) + load.beside_ms


def predict_latest_ms(load: Load, own: float, *, ahead_ms: float | None = None) -> float | None:
    """When a job will be finished, and rarely later: the `predict_eta_ms` of one that has to wait for longer,
    by the margin. Who need not wait for others has none.
    """
    ahead_ms = load.waiting_ms + load.running_ms if ahead_ms is None else ahead_ms
    return predict_eta_ms(load, own, ahead_ms=load.margin * ahead_ms)


def predict_outlook(load: Load, own: float, deadline_ms: float) -> Outlook | None:
    """What the queue needs to know of a job; None with no live worker.

    Args:
        load: the queue as it is now.
        own: its own time, from `own_ms`.
        deadline_ms: time that the job has.
    """
    if load.num_workers == 0:
        return None
    per_work = load.pace / load.num_workers
    own_ms = load.pace * own + load.beside_ms
    most_ms = max(0.0, deadline_ms - own_ms) / (load.margin * per_work)
    return Outlook(max_ahead_ms=most_ms, own_ms=own_ms, per_work=per_work)


def drain_ms(load: Load, max_waiting: int) -> float:
    """When a full queue will probably have a free place: waiting jobs are taken to be of a size."""
    if load.num_workers == 0 or load.waiting == 0:
        return NO_WORKER_RETRY_MS
    num_to_go = max(1, load.waiting - max_waiting + 1)
    return max(MIN_RETRY_MS, num_to_go * load.pace * load.waiting_ms / load.waiting / load.num_workers)


def late_ms(eta_ms: float, deadline_ms: float) -> float:
    """How long until a job that would be too late by so much would not be."""
    return max(MIN_RETRY_MS, eta_ms - deadline_ms)
