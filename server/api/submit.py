"""Intake: one request body becomes one queued job, or a typed refusal."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from engines.bundle.manifest import Manifest
from server.api.admission import (
    MIN_RETRY_MS,
    NO_WORKER_RETRY_MS,
    Decision,
    Load,
    Refusal,
    decide,
    drain_ms,
    late_ms,
    own_ms,
    predict_eta_ms,
    predict_latest_ms,
    predict_outlook,
)
from server.api.catalog import ServedModel
from server.api.dependencies import Services
from server.api.errors import (
    ApiError,
    IdempotencyMismatchError,
    InvalidHeaderError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
    QueueFullError,
    TenantFullError,
    UnsupportedParameterError,
)
from server.api.offer import pick_bucket, pick_fewer_steps, pick_fps, pick_steps, pick_video_bucket
from server.api.schemas import DrawingRequest, SampleRequest, VideoRequest
from server.api.spans import sending
from server.cost import job_cost_ms
from server.job import UNMEASURED_MS, GenerationRequest, Job, JobKind, fingerprint, new_job
from server.queue.records import EnqueueResult, EnqueueStatus, Outlook

MAX_RANDOM_SEED = 2**32
"""Random seeds stay below this: JavaScript clients read integers beyond 2**53 wrongly."""

MEMORY_RETRY_MS = 5_000.0
"""A full Redis gets room when jobs end, or when somebody gives it more: not at once."""

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """A job that exists now.

    Attributes:
        attached: the idempotency key was known, so this is the job of an earlier request.
        position: jobs ahead of it when it was accepted.
        eta_ms: predicted time until it is finished; None with no live worker, and if nothing was measured.
    """

    job_id: str
    attached: bool
    position: int
    eta_ms: float | None


async def accept(
    services: Services, body: SampleRequest, idempotency_key: str | None, *, remix_of: str | None = None
) -> Accepted:
    """Check a request against the model it names, predict its finish, and enqueue it.

    Args:
        remix_of: the video that the request takes all but its prompt from.

    Raises:
        ApiError: the class says why; nothing was enqueued.
    """
    _check_key(idempotency_key)
    _check_prompt(body.prompt, services.settings.max_prompt_chars)
    kind = _kind_of(body)
    deadline_ms = round(services.settings.deadline_s(kind) * 1000)
    model = await services.catalog.find(body.model, kind=kind)
    request = replace(_complete(body, model.manifest), remix_of=remix_of)
    asked = _fingerprint(body, request, model.name)
    load = model.load
    decision, batch_ms = _decide(services, model, request, load, deadline_ms)
    fewest = _steps_under_load(body, request, model.manifest)
    if decision.is_hurried and fewest < request.num_steps:
        request = replace(request, num_steps=fewest)
        decision, batch_ms = _decide(services, model, request, load, deadline_ms)
    # A known key must find its job even when no new one is admitted: the queue says which it is.
    if decision.reason and idempotency_key is None:
        raise _refused(decision.reason, decision, services, model)

    own = own_ms(load, batch_ms, request.num_samples)
    now_ms = services.now_ms()
    job = new_job(
        kind=kind,
        model=model.name,
        request=request,
        now_ms=now_ms,
        deadline_ms=now_ms + deadline_ms,
        asked=asked,
        cost_ms=job_cost_ms(batch_ms, request.num_samples, load.max_batch),
    )
    outlook = predict_outlook(load, own, deadline_ms)
    result = await _enqueue(services, body, job, idempotency_key, admit=not decision.reason, outlook=outlook)
    eta_ms = predict_eta_ms(load, own, ahead_ms=result.ahead_ms)
    if result.status not in (EnqueueStatus.OK, EnqueueStatus.DUP) or result.job_id is None:
        latest_ms = predict_latest_ms(load, own, ahead_ms=result.ahead_ms)
        raise _refused_by_queue(
            result, decision, services, model, latest_ms=latest_ms, deadline_ms=deadline_ms
        )
    if result.status is EnqueueStatus.OK:
        services.metrics.accepted_work.labels(model.name).inc(job.cost_ms / 1000)
    else:
        eta_ms = decision.eta_ms
    return Accepted(
        job_id=result.job_id,
        attached=result.status is EnqueueStatus.DUP,
        position=result.position,
        eta_ms=eta_ms if model.batch_ms(request.bucket, request.num_steps) else None,
    )


def _decide(
    services: Services, model: ServedModel, request: GenerationRequest, load: Load, deadline_ms: int
) -> tuple[Decision, Callable[[int], float]]:
    """Whether there is room for a job, and what its batches take by their number of samples."""
    batch_ms = model.batch_ms(request.bucket, request.num_steps)
    batch_ms = batch_ms or (lambda num_samples: UNMEASURED_MS * num_samples)
    decision = decide(
        load,
        batch_ms,
        num_samples=request.num_samples,
        max_waiting=services.settings.max_queue,
        deadline_ms=deadline_ms,
    )
    return decision, batch_ms


def _steps_under_load(body: SampleRequest, request: GenerationRequest, manifest: Manifest) -> int:
    """What the client agrees to have its job drawn in.

    Raises:
        StepsNotServedError: the model needs more than that.
    """
    if body.max_steps_under_load is None:
        return request.num_steps
    return min(request.num_steps, pick_fewer_steps(body.max_steps_under_load, manifest))


async def _enqueue(
    services: Services,
    body: SampleRequest,
    job: Job,
    idempotency_key: str | None,
    *,
    admit: bool,
    outlook: Outlook | None,
) -> EnqueueResult:
    """Ask the queue to take a job, in this request's trace; one that its key's holder is the same as is that.

    Args:
        admit: take it if no other job has its key.
        outlook: when it will be finished.
    """
    with sending(services.tracing, job) as span:
        job = replace(job, traceparent=span.traceparent)
        result = await services.queue.enqueue(
            job, idempotency_key=idempotency_key, admit=admit, outlook=outlook
        )
        if result.status is EnqueueStatus.MISMATCH and await _is_same(services, body, result.job_id):
            result = replace(result, status=EnqueueStatus.DUP)
        if result.status is EnqueueStatus.DUP and result.job_id is not None:  # that one was sent before
            span.set(
                {"messaging.message.id": result.job_id, "tdm.job.id": result.job_id, "tdm.replayed": True}
            )
        elif result.status is not EnqueueStatus.OK:
            span.fail(result.status)
    return result


def _kind_of(body: SampleRequest) -> JobKind:
    return JobKind.VIDEO if isinstance(body, VideoRequest) else JobKind.IMAGE


def _complete(body: SampleRequest, manifest: Manifest) -> GenerationRequest:
    """What is asked for, with every default filled in, and a random seed where it was left open.

    How the pictures are handed over (`response_format`, `wait_s`, ...) is no part of it.

    Raises:
        InvalidRequestError: the model does not offer it.
    """
    seed = secrets.randbelow(MAX_RANDOM_SEED) if body.seed is None else body.seed
    if isinstance(body, VideoRequest):
        fps = pick_fps(body.fps, manifest)
        return GenerationRequest(
            prompt=body.prompt,
            bucket=pick_video_bucket(body, manifest, fps),
            seed=seed,
            num_steps=pick_steps(body.steps, manifest),
            output_format=body.output_format,
            fps=fps,
        )
    assert isinstance(body, DrawingRequest)
    return GenerationRequest(
        prompt=body.prompt,
        num_samples=body.n,
        bucket=pick_bucket(body.size, manifest),
        seed=seed,
        num_steps=pick_steps(body.steps, manifest),
        output_format=body.output_format,
        quality=body.output_compression,
    )


def _fingerprint(body: SampleRequest, request: GenerationRequest, model: str) -> str:
    """Of what was asked: a repeated request without a seed is still the same request."""
    return fingerprint(
        request,
        model=model,
        seed_given=body.seed is not None,
        max_steps_under_load=body.max_steps_under_load,
    )


async def _is_same(services: Services, body: SampleRequest, holder_id: str | None) -> bool:
    """Whether a request without a model is the holder's all the same: which model such a request gets changes
    with the workers that live.
    """
    holder = await services.queue.get(holder_id) if body.model is None and holder_id else None
    model = (await services.catalog.models()).get(holder.model) if holder else None
    if holder is None or model is None or holder.kind is not _kind_of(body):
        return False
    try:
        request = _complete(body, model.manifest)
    except InvalidRequestError:
        return False
    return _fingerprint(body, request, model.name) == holder.fingerprint


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


def _check_key(idempotency_key: str | None) -> None:
    if idempotency_key is not None and not _IDEMPOTENCY_KEY.fullmatch(idempotency_key):
        raise InvalidHeaderError(
            "Idempotency-Key must be 1 to 255 visible ASCII characters", param="Idempotency-Key"
        )


def _check_prompt(prompt: str, max_chars: int) -> None:
    if len(prompt) > max_chars:
        raise PromptTooLongError(
            f"prompt has {len(prompt)} characters; at most {max_chars} are allowed", param="prompt"
        )


_REASONS = {
    EnqueueStatus.QUEUE_FULL: Refusal.QUEUE,
    EnqueueStatus.TENANT_FULL: Refusal.TENANT,
    EnqueueStatus.MEMORY: Refusal.MEMORY,
}


def _count_refusal(services: Services, model: ServedModel, reason: Refusal) -> None:
    services.metrics.jobs_rejected.labels(model.name, model.kind, reason).inc()


def _refused(reason: Refusal, decision: Decision, services: Services, model: ServedModel) -> ApiError:
    """Count a refusal by prediction, and say why."""
    _count_refusal(services, model, reason)
    if decision.reason is Refusal.DEADLINE:
        message = (
            f"a job may take {(decision.latest_ms or 0) / 1000:.1f} s now, "
            f"and its deadline is {services.settings.deadline_s(model.kind):g} s; try again later"
        )
    else:
        message = (
            f"{model.stats.total_waiting} jobs wait for {model.name}, which is all that may; try again later"
        )
    return QueueFullError(message, retry_after_ms=decision.retry_after_ms)


def _refused_by_queue(
    result: EnqueueResult,
    decision: Decision,
    services: Services,
    model: ServedModel,
    *,
    latest_ms: float | None,
    deadline_ms: int,
) -> ApiError:
    """Count a job that the queue did not take, and say why.

    Args:
        result: what the queue says.
        decision: what was predicted before it was asked; a known key asks it all the same.
        latest_ms: predicted with what the queue knows to be ahead.
        deadline_ms: how long the job may take.
    """
    if decision.reason and result.status is EnqueueStatus.QUEUE_FULL:
        return _refused(decision.reason, decision, services, model)
    if result.status is EnqueueStatus.LATE and latest_ms is not None:  # others came since the load was read
        retry_after_ms = late_ms(latest_ms, deadline_ms)
        late = Decision(reason=Refusal.DEADLINE, latest_ms=latest_ms, retry_after_ms=retry_after_ms)
        return _refused(Refusal.DEADLINE, late, services, model)
    _count_refusal(services, model, _REASONS.get(result.status, Refusal.IDEMPOTENCY))
    return _enqueue_error(result, decision, services, model)


def _enqueue_error(
    result: EnqueueResult, decision: Decision, services: Services, model: ServedModel
) -> ApiError:
    status, max_waiting = result.status, services.settings.max_queue
    # For want of anything better: when one job of its size will have been done.
    retry_after_ms = max(MIN_RETRY_MS, decision.retry_after_ms or decision.eta_ms or NO_WORKER_RETRY_MS)
    if status is EnqueueStatus.MISMATCH:
        return IdempotencyMismatchError(
            "this Idempotency-Key was used with another request; use a new key", param="Idempotency-Key"
        )
    if status is EnqueueStatus.TENANT_FULL:
        return TenantFullError("you have as many jobs in flight as you may", retry_after_ms=retry_after_ms)
    if status is EnqueueStatus.MEMORY:
        return OverloadedError(
            "the queue's memory is full, and nothing in it is finished; try again later",
            retry_after_ms=max(MEMORY_RETRY_MS, retry_after_ms),
        )
    load = replace(model.load, waiting=result.position, waiting_ms=result.ahead_ms)
    return QueueFullError(
        f"{max_waiting} jobs wait for {model.name}, which is all that may; try again later",
        retry_after_ms=drain_ms(load, max_waiting),
    )
