"""Images: `POST /v1/images`, its OpenAI alias, and the jobs behind both."""

from __future__ import annotations

import asyncio
import base64
import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from server.api.dependencies import Services, ServicesDep, link
from server.api.errors import (
    ApiError,
    DeadlineExceededError,
    InvalidRequestError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobPoisonedError,
    NoLongerServedError,
    ResultExpiredError,
    ShuttingDownError,
    StoreUnavailableError,
    UnsupportedParameterError,
)
from server.api.jobs import (
    ClientGoneError,
    cancel,
    cancel_if_queued,
    content_headers,
    eta_of,
    expired,
    find_job,
    has_good_copy,
    is_expired,
    read,
    require_done,
    unknown_job,
    wait_for_job,
)
from server.api.routes.openapi import (
    BODY_ERRORS,
    CONTENT_ERRORS,
    CREATE_ERRORS,
    IdempotencyKey,
    documented,
    json_response,
    require_json,
)
from server.api.schemas import DrawingRequest, GenerationsRequest, GenerationsResponse, ImageJob, ImageRequest
from server.api.submit import Accepted, accept, check_compression
from server.api.views import (
    ContentUrl,
    etag_of,
    failure_of,
    generations_response,
    image_job,
    server_timing,
)
from server.job import Job, JobKind, JobStatus
from server.tracing import current_span, trace_of

router = APIRouter(prefix="/v1/images", tags=["images"])

IMAGE_TYPES = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}

_WAIT = re.compile(r"\bwait\s*=\s*(\d{1,6})\b")

WAITING_ERRORS: tuple[type[ApiError], ...] = (
    UnsupportedParameterError,
    StoreUnavailableError,
    JobFailedError,
    JobPoisonedError,
    NoLongerServedError,
    JobCancelledError,
    DeadlineExceededError,
    ResultExpiredError,
)
"""What an answer that comes with the images can be instead."""


@router.post(
    "",
    summary="Draw images",
    response_model=ImageJob,
    responses={
        **documented(*BODY_ERRORS, *CREATE_ERRORS, *WAITING_ERRORS),
        200: {
            "description": "The images; with n=1 and `Accept: image/png` (jpeg, webp) the bytes of it.",
            "content": {media_type: {} for media_type in IMAGE_TYPES},
        },
        202: {"model": ImageJob, "description": "Not finished within the wait: poll the URL in Location."},
    },
    dependencies=[Depends(require_json)],
)
async def create_image(
    body: ImageRequest,
    request: Request,
    services: ServicesDep,
    idempotency_key: IdempotencyKey = None,
    prefer: Annotated[str, Header(description="`wait=N`: seconds to wait for the images.")] = "",
    accept_header: Annotated[str, Header(alias="Accept")] = "",
) -> Response:
    """Wait for the images and answer with them, or after the wait with the job that will have them."""
    body, raw = _negotiate(body, accept_header)
    check_compression(body)  # of the format that it will be
    accepted, job = await _submit(
        services, request, body, idempotency_key, wait_s=_wait_s(body, prefer, services.settings.max_wait_s)
    )
    ttl_s = services.settings.result_ttl_s
    if accepted.attached and await is_expired(services, job):
        raise expired(job)
    if not job.finished:
        view = image_job(
            job,
            content_url=_content_url(request),
            result_ttl_s=ttl_s,
            eta_ms=accepted.eta_ms,
            queue_position=accepted.position,
        )
        location = link(request, "get_image", job.id)
        return json_response(view, status_code=202, headers={"location": location})
    if job.status is not JobStatus.DONE:
        raise failure_of(job)
    headers = {"server-timing": server_timing(job)}
    if raw:
        output = job.outputs[0]
        headers |= {"x-job-id": job.id, "x-seed": str(output.seed), "etag": etag_of(output)}
        headers["x-steps"] = str(job.request.num_steps)
        return Response(await read(services, output), media_type=output.content_type, headers=headers)
    images_b64 = await _images_b64(services, job) if body.response_format == "b64_json" else None
    view = image_job(job, content_url=_content_url(request), result_ttl_s=ttl_s, images_b64=images_b64)
    return json_response(view, headers=headers)


@router.post(
    "/generations",
    summary="Draw images (OpenAI's shape)",
    response_model=GenerationsResponse,
    responses=documented(*BODY_ERRORS, *CREATE_ERRORS, *WAITING_ERRORS, ShuttingDownError),
    dependencies=[Depends(require_json)],
)
async def create_image_openai(
    body: GenerationsRequest,
    request: Request,
    services: ServicesDep,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """What OpenAI's client calls. It cannot poll, so this waits until the job's deadline."""
    if refused := body.unsupported():
        param, message = refused
        raise UnsupportedParameterError(message, param=param)
    check_compression(body)
    deadline_s = services.settings.job_deadline_s
    accepted, job = await _submit(services, request, body, idempotency_key, wait_s=deadline_s)
    if accepted.attached and await is_expired(services, job):
        raise expired(job)
    if not job.finished:
        if idempotency_key is None:
            await cancel_if_queued(services, job.id)
        if services.draining.is_set():
            raise ShuttingDownError(
                "the server is shutting down; send the request again", retry_after_ms=1000
            )
        raise DeadlineExceededError(f"job {job.id} was not finished within {deadline_s:g} s")
    if job.status is not JobStatus.DONE:
        raise failure_of(job)
    images_b64 = await _images_b64(services, job) if body.response_format == "b64_json" else None
    view = generations_response(job, content_url=_content_url(request), images_b64=images_b64)
    return json_response(view, headers={"server-timing": server_timing(job)})


@router.get("/{job_id}", summary="Look a job up", responses=documented(JobNotFoundError, InvalidRequestError))
async def get_image(job_id: str, request: Request, services: ServicesDep) -> ImageJob:
    """The job as it stands, with its images once it is completed."""
    return await _view(services, request, await find_job(services, job_id, JobKind.IMAGE))


@router.delete(
    "/{job_id}", summary="Cancel a job", responses=documented(JobNotFoundError, InvalidRequestError)
)
async def cancel_image(job_id: str, request: Request, services: ServicesDep) -> ImageJob:
    """At once while it is queued, at the next step while it runs; a finished job stays as it is."""
    job = await cancel(services, await find_job(services, job_id, JobKind.IMAGE))
    if job is None:
        raise unknown_job(job_id, JobKind.IMAGE)
    return await _view(services, request, job)


@router.get(
    "/{job_id}/content",
    summary="Download one image",
    response_class=Response,
    responses={
        **documented(*CONTENT_ERRORS),
        200: {"description": "The bytes.", "content": {media_type: {} for media_type in IMAGE_TYPES}},
        304: {"description": "The client's copy is still good."},
    },
)
async def get_image_content(
    job_id: str,
    request: Request,
    services: ServicesDep,
    index: Annotated[int, Query(ge=0, description="Which of the job's n images.")] = 0,
) -> Response:
    """The bytes of one finished image. They never change, so clients may keep them."""
    job = await find_job(services, job_id, JobKind.IMAGE)
    await require_done(services, job)
    if index >= len(job.outputs):
        raise InvalidRequestError(
            f"index {index} is out of range; job {job_id} has images 0 to {len(job.outputs) - 1}",
            param="index",
        )
    output = job.outputs[index]
    headers = content_headers(services, job, output, f"{job_id}-{index}")
    if has_good_copy(request, output):
        return Response(status_code=304, headers=headers)
    return Response(await read(services, output), media_type=output.content_type, headers=headers)


async def _submit(
    services: Services, request: Request, body: DrawingRequest, idempotency_key: str | None, *, wait_s: float
) -> tuple[Accepted, Job]:
    """Enqueue a request and wait for its job; the job is returned as it stands when the wait ends.

    Raises:
        ApiError: it was refused.
        ClientGoneError: the client left. Its job is cancelled if it still waits in the queue, unless the
            request had an idempotency key: then the client, or its retry, may still come for it.
    """
    accepted = await accept(services, body, idempotency_key)
    request.state.replayed = accepted.attached  # read by the middleware, whatever the answer will be
    request.state.job_id = accepted.job_id
    try:
        job = await wait_for_job(services, request, accepted.job_id, wait_s)
    except ClientGoneError:
        if idempotency_key is None:
            await cancel_if_queued(services, accepted.job_id)
        raise
    if job is None:
        raise unknown_job(accepted.job_id, JobKind.IMAGE)
    if accepted.attached:
        current_span.get().link(trace_of(job))
    else:
        services.metrics.observe_eta(job, accepted.eta_ms)
    return accepted, job


def _negotiate(body: ImageRequest, accept_header: str) -> tuple[ImageRequest, bool]:
    """Whether the client wants the bytes themselves, and the request in the format it wants them in.

    Raises:
        InvalidRequestError: it does, but asks for several images.
    """
    wanted = [part.partition(";")[0].strip().lower() for part in accept_header.split(",")]
    images = [media_type for media_type in wanted if media_type in IMAGE_TYPES or media_type == "image/*"]
    if not images or "application/json" in wanted:
        return body, False
    if body.n != 1:
        raise InvalidRequestError(
            f"n={body.n} images do not fit one {images[0]} response; n must be 1", param="n"
        )
    if f"image/{body.output_format}" not in images and images[0] in IMAGE_TYPES:
        body = body.model_copy(update={"output_format": IMAGE_TYPES[images[0]]})
    return body, True


def _wait_s(body: ImageRequest, prefer: str, longest_s: float) -> float:
    """How long to wait: what the body asks for, else what `Prefer` does, and at most `longest_s`."""
    if body.wait_s is not None:
        return min(body.wait_s, longest_s)
    if preferred := _WAIT.search(prefer):
        return min(float(preferred[1]), longest_s)
    return 0.0 if "respond-async" in prefer else longest_s


async def _view(services: Services, request: Request, job: Job) -> ImageJob:
    position = None if job.finished else await services.queue.position(job)
    return image_job(
        job,
        content_url=_content_url(request),
        result_ttl_s=services.settings.result_ttl_s,
        eta_ms=None if job.finished else await eta_of(services, job, position),
        queue_position=position,
        expired=await is_expired(services, job),
    )


def _content_url(request: Request) -> ContentUrl:
    return lambda job_id, index: f"{link(request, 'get_image_content', job_id)}?index={index}"


async def _images_b64(services: Services, job: Job) -> list[str]:
    contents = await asyncio.gather(*(read(services, output) for output in job.outputs))
    return [base64.b64encode(content).decode("ascii") for content in contents]
