"""Intake: one request body becomes one queued job, or a typed refusal."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace

from engines.bucket import Bucket
from engines.bundle import Manifest
from server.admission import MIN_RETRY_MS, NO_WORKER_RETRY_MS, Decision, decide
from server.catalog import ServedModel
from server.errors import (
    ApiError,
    IdempotencyMismatchError,
    InvalidHeaderError,
    OverloadedError,
    PromptTooLongError,
    QueueFullError,
    SizeNotServedError,
    StepsNotServedError,
    TenantFullError,
    UnsupportedParameterError,
)
from server.job import fingerprint, new_job
from server.queue.records import EnqueueStatus
from server.schemas import DrawingRequest
from server.services import Services

MAX_RANDOM_SEED = 2**32
"""Random seeds stay below this: JavaScript clients read integers beyond 2**53 wrongly."""

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A job that exists now.

    Attributes:
        attached: the idempotency key was known, so this is the job of an earlier request.
        position: jobs ahead of it when it was accepted.
        eta_ms: predicted time until it is finished; None with no live worker.
    """

    job_id: str
    attached: bool
    position: int
    eta_ms: float | None


async def accept(services: Services, body: DrawingRequest, idempotency_key: str | None) -> Accepted:
    """Check a request against the model it names, predict its finish, and enqueue it.

    Raises:
        ApiError: the class says why; nothing was enqueued.
    """
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise InvalidHeaderError(
            "Idempotency-Key must be 1 to 255 visible ASCII characters", param="Idempotency-Key"
        )
    _check_prompt(body.prompt, services.settings.max_prompt_chars)
    model = await services.catalog.find(body.model, kind="image")
    bucket = pick_bucket(body.size, model.manifest)
    num_steps = pick_steps(body.steps, model.manifest)
    decision = decide(
        model.load,
        model.batch_ms(bucket, num_steps),
        num_samples=body.n,
        max_waiting=services.settings.max_queue,
        deadline_ms=services.settings.job_deadline_s * 1000,
    )
    # A known key must find its job even when no new one would be admitted.
    if decision.reason and idempotency_key is None:
        _count_refusal(services, model, decision.reason)
        raise _refusal(decision, services, model)

    asked = {
        "prompt": body.prompt,
        "n": body.n,
        "height": bucket.height,
        "width": bucket.width,
        "frames": bucket.frames,
        "seed": body.seed,
        "num_steps": num_steps,
        "output_format": body.output_format,
        "output_compression": body.output_compression,
    }
    now_ms = services.now_ms()
    seed = secrets.randbelow(MAX_RANDOM_SEED) if body.seed is None else body.seed
    job = new_job(
        kind="image",
        model=model.name,
        request={**asked, "seed": seed},
        now_ms=now_ms,
        deadline_ms=now_ms + round(services.settings.job_deadline_s * 1000),
    )
    # The fingerprint is of what was asked: a repeated request without a seed is still the same request.
    job = replace(job, fingerprint=fingerprint({**asked, "model": model.name}))
    with services.metrics.redis_op.labels("enqueue").time():
        result = await services.queue.enqueue(job, idempotency_key=idempotency_key)
    if result.status not in (EnqueueStatus.OK, EnqueueStatus.DUP) or result.job_id is None:
        _count_refusal(services, model, _REASONS.get(result.status, "idempotency"))
        raise _enqueue_error(result.status, decision, services, model)
    return Accepted(
        job_id=result.job_id,
        attached=result.status is EnqueueStatus.DUP,
        position=result.position,
        eta_ms=decision.eta_ms,
    )


def pick_bucket(size: str, manifest: Manifest) -> Bucket:
    """The bucket of a `WIDTHxHEIGHT` size; `auto` is the model's first one.

    Raises:
        SizeNotServedError: the bundle has no such bucket.
    """
    if size == "auto":
        return manifest.buckets[0]
    width, height = (int(part) for part in size.split("x"))
    for bucket in manifest.buckets:
        if (bucket.width, bucket.height) == (width, height):
            return bucket
    allowed = ", ".join(f"{bucket.width}x{bucket.height}" for bucket in manifest.buckets)
    raise SizeNotServedError(
        f"{manifest.name} does not draw {size}; allowed are: auto, {allowed}", param="size"
    )


def pick_steps(steps: int | None, manifest: Manifest) -> int:
    """The number of steps asked for, or the model's default.

    Raises:
        StepsNotServedError: the student was not distilled for it.
    """
    if steps is None:
        return manifest.default_num_steps
    if steps not in manifest.num_steps:
        allowed = ", ".join(str(number) for number in sorted(manifest.num_steps))
        raise StepsNotServedError(
            f"{manifest.name} does not draw in {steps} steps; allowed are: {allowed}", param="steps"
        )
    return steps


def check_compression(body: DrawingRequest) -> None:
    """PNG has no quality to lower.

    Raises:
        UnsupportedParameterError: a compression below 100 was asked for with png.
    """
    if body.output_format == "png" and body.output_compression not in (None, 100):
        raise UnsupportedParameterError(
            "output_compression applies to jpeg and webp; with png the only allowed value is 100",
            param="output_compression",
        )


def _check_prompt(prompt: str, max_chars: int) -> None:
    if len(prompt) > max_chars:
        raise PromptTooLongError(
            f"prompt has {len(prompt)} characters; at most {max_chars} are allowed", param="prompt"
        )


_REASONS = {
    EnqueueStatus.QUEUE_FULL: "queue",
    EnqueueStatus.TENANT_FULL: "tenant",
    EnqueueStatus.MEMORY: "memory",
}


def _count_refusal(services: Services, model: ServedModel, reason: str) -> None:
    services.metrics.jobs_rejected.labels(model.name, reason).inc()


def _refusal(decision: Decision, services: Services, model: ServedModel) -> ApiError:
    if decision.reason == "deadline":
        message = (
            f"a job would take about {(decision.eta_ms or 0) / 1000:.1f} s now, "
            f"and its deadline is {services.settings.job_deadline_s:g} s; try again later"
        )
    else:
        message = (
            f"{model.stats.total_waiting} jobs wait for {model.name}, which is all that may; try again later"
        )
    return QueueFullError(message, retry_after_ms=decision.retry_after_ms)


def _enqueue_error(
    status: EnqueueStatus, decision: Decision, services: Services, model: ServedModel
) -> ApiError:
    # The load that was read a moment ago still had room, so what it predicts for one job is the best hint
    # there is.
    retry_after_ms = max(MIN_RETRY_MS, decision.retry_after_ms or decision.eta_ms or NO_WORKER_RETRY_MS)
    if status is EnqueueStatus.MISMATCH:
        return IdempotencyMismatchError(
            "this Idempotency-Key was used with another request; use a new key", param="Idempotency-Key"
        )
    if status is EnqueueStatus.TENANT_FULL:
        return TenantFullError("you have as many jobs in flight as you may", retry_after_ms=retry_after_ms)
    if status is EnqueueStatus.MEMORY:
        return OverloadedError("the queue is out of memory; try again later", retry_after_ms=retry_after_ms)
    return QueueFullError(
        f"{services.settings.max_queue} jobs wait for {model.name}, which is all that may; try again later",
        retry_after_ms=retry_after_ms,
    )
