"""Admission: accept a job, or refuse it with the time at which asking again makes sense. Pure functions.

Few-step students cost nearly the same every time, so the bundle's measured latency table predicts when a job
that joins the queue now would be finished. Who is refused learns it at once, instead of after a timeout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

NO_WORKER_RETRY_MS = 5_000.0
MIN_RETRY_MS = 50.0


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
        running: jobs that workers hold.
        num_workers: live workers.
        max_batch: samples that one worker runs at once.
    """

    waiting: int
    running: int
    num_workers: int
    max_batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The answer to one job.

    Attributes:
        reason: why it is refused; None admits it.
        eta_ms: predicted time until it is finished; None with no worker to predict for.
        retry_after_ms: when a refused job would probably be admitted.
    """

    reason: Refusal | None = None
    eta_ms: float | None = None
    retry_after_ms: float | None = None


def decide(
    load: Load, batch_ms: Callable[[int], float], *, num_samples: int, max_waiting: int, deadline_ms: float
) -> Decision:
    """Admit a job unless the queue is full or the job could not be finished before its deadline.

    With no live worker a job is admitted while there is room: it waits for one.

    Args:
        load: the queue as it is now.
        batch_ms: predicted time of one batch of the given number of samples, 1..max_batch.
        num_samples: samples that the job asks for.
        max_waiting: jobs that may wait.
        deadline_ms: time that the job has.
    """
    eta_ms = predict_eta_ms(load, batch_ms, num_samples=num_samples)
    if load.waiting >= max_waiting:
        drain_ms = None if eta_ms is None else (load.waiting - max_waiting + 1) * _ms_per_job(load, batch_ms)
        return Decision(
            reason=Refusal.QUEUE,
            eta_ms=eta_ms,
            retry_after_ms=NO_WORKER_RETRY_MS if drain_ms is None else max(MIN_RETRY_MS, drain_ms),
        )
    if eta_ms is not None and eta_ms > deadline_ms:
        return Decision(
            reason=Refusal.DEADLINE, eta_ms=eta_ms, retry_after_ms=max(MIN_RETRY_MS, eta_ms - deadline_ms)
        )
    return Decision(eta_ms=eta_ms)


def predict_eta_ms(
    load: Load, batch_ms: Callable[[int], float], *, num_samples: int, ahead: int | None = None
) -> float | None:
    """Predicted time until a job is finished; None with no live worker.

    Jobs ahead count as one sample each, run in full batches: the queue does not know their sizes. That errs
    on the early side where many ask for n > 1.

    Args:
        load: the queue as it is now.
        batch_ms: predicted time of one batch of the given number of samples.
        num_samples: samples that the job asks for.
        ahead: jobs served before it; by default all that wait and run.
    """
    if load.num_workers == 0:
        return None
    ahead = load.waiting + load.running if ahead is None else ahead
    own_ms = math.ceil(num_samples / load.max_batch) * batch_ms(min(num_samples, load.max_batch))
    return ahead * _ms_per_job(load, batch_ms) + own_ms


def _ms_per_job(load: Load, batch_ms: Callable[[int], float]) -> float:
    """How often a saturated system finishes one job."""
    return batch_ms(load.max_batch) / (load.max_batch * load.num_workers)
