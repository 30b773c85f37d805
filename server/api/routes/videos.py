"""Videos: `POST /v1/videos` and the jobs behind it, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from server.api.dependencies import Services, ServicesDep, link
from server.api.errors import (
    FpsNotServedError,
    InvalidFormError,
    InvalidJsonError,
    InvalidRequestError,
    JobNotFoundError,
    LengthNotServedError,
    RangeNotSatisfiableError,
    RouteNotFoundError,
    UnsupportedMediaTypeError,
    UnsupportedParameterError,
    VariantNotFoundError,
)
from server.api.jobs import (
    POLL_MS,
    content_headers,
    count_cancelled,
    eta_of,
    find_job,
    has_good_copy,
    is_expired,
    range_of,
    read,
    require_done,
    unknown_job,
)
from server.api.routes.openapi import (
    BODY_ERRORS,
    CONTENT_ERRORS,
    CREATE_ERRORS,
    IdempotencyKey,
    documented,
    is_json,
    json_response,
    media_type_of,
)
from server.api.schemas import Body, RemixRequest, VideoDeleted, VideoJob, VideoList, VideoRequest
from server.api.submit import Accepted, accept
from server.api.views import video_job
from server.job import Job, JobKind, Variant, created_ms_of, is_over
from server.tracing import current_span, trace_of

router = APIRouter(prefix="/v1/videos", tags=["videos"])

VARIANTS = {"video": Variant.SAMPLE, "thumbnail": Variant.THUMBNAIL, "spritesheet": Variant.SPRITESHEET}
"""OpenAI's names."""
VARIANT_HELP = (
    "`video`: MP4 or WebM, as was asked for. `thumbnail`: the middle frame, WebP. `spritesheet`: JPEG of all "
    "frames, or of 64 at even distances, row by row, as many columns as the square root of their number, "
    "rounded up."
)
CONTENT_TYPES = ("video/mp4", "video/webm", "image/webp", "image/jpeg")
TENANT = "public"
POLL_HEADER = "openai-poll-after-ms"
"""How long OpenAI's client waits between two looks at a video; it goes by the first answer."""
MIN_POLL_MS = 100.0
LOOKS_PER_VIDEO = 10

BodyT = TypeVar("BodyT", bound=Body)

logger = logging.getLogger(__name__)


async def video_request(request: Request) -> VideoRequest:
    """The body of a request for a video."""
    return await _body_of(request, VideoRequest)


async def remix_request(request: Request) -> RemixRequest:
    """The body of a request for a remix."""
    return await _body_of(request, RemixRequest)


async def _body_of(request: Request, schema: type[BodyT]) -> BodyT:
    """JSON, or the form that OpenAI's client sends.

    Raises:
        UnsupportedMediaTypeError: it is declared as something else, or is a form that another site's page
            sends: browsers let any page do that, and ask first before they send JSON.
        InvalidJsonError, InvalidFormError: it does not parse.
        RequestValidationError: a field is wrong.
    """
    media_type = media_type_of(request)
    try:
        if is_json(media_type):
            return schema.model_validate(await _json_of(request))
        if media_type == "multipart/form-data" and not _is_foreign(request):
            return schema.model_validate_strings(await _form_of(request), strict=False)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from None
    raise UnsupportedMediaTypeError(
        f"content-type {media_type or '(none)'} is not supported here; send application/json, or from the "
        "same site multipart/form-data",
        param="content-type",
    )


async def _json_of(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):  # also for bytes that are no UTF-8, and numbers of 5000 digits
        raise InvalidJsonError("the body is not valid JSON") from None


async def _form_of(request: Request) -> dict[str, str]:
    """Fields of a form; of a file its name, for no field takes one."""
    try:
        async with request.form() as form:
            return {
                name: (value.filename or "file") if isinstance(value, UploadFile) else value
                for name, value in form.multi_items()
            }
    except HTTPException as error:
        raise InvalidFormError(f"the body is not a valid form: {error.detail}") from None


def _is_foreign(request: Request) -> bool:
    return request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none")


def _json_or_form(schema: type[Body]) -> dict[str, Any]:
    media_types = ("application/json", "multipart/form-data")
    content = {media_type: {"schema": schema.model_json_schema()} for media_type in media_types}
    return {"requestBody": {"required": True, "content": content}}


@router.post(
    "",
    summary="Make a video",
    response_model=VideoJob,
    responses=documented(
        *BODY_ERRORS,
        InvalidFormError,
        *CREATE_ERRORS,
        LengthNotServedError,
        FpsNotServedError,
        UnsupportedParameterError,
    ),
    openapi_extra=_json_or_form(VideoRequest),
)
async def create_video(
    request: Request,
    services: ServicesDep,
    body: Annotated[VideoRequest, Depends(video_request)],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Accept a job and answer at once; poll the URL in Location."""
    if refused := body.unsupported():
        param, message = refused
        raise UnsupportedParameterError(message, param=param)
    return await _created(services, request, await accept(services, body, idempotency_key))


@router.post(
    "/{job_id}/remix",
    summary="Make a video like another one",
    response_model=VideoJob,
    responses=documented(
        *BODY_ERRORS,
        InvalidFormError,
        JobNotFoundError,
        *CREATE_ERRORS,
        LengthNotServedError,
        FpsNotServedError,
    ),
    openapi_extra=_json_or_form(RemixRequest),
)
async def remix_video(
    job_id: str,
    request: Request,
    services: ServicesDep,
    body: Annotated[RemixRequest, Depends(remix_request)],
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Another prompt with the model, size, length, steps and seed of a video, finished or not."""
    job = await find_job(services, job_id, JobKind.VIDEO)
    as_before = VideoRequest(
        prompt=body.prompt,
        model=job.model,
        size=job.request.bucket.size,
        frames=job.request.bucket.frames,
        fps=job.request.fps,
        seed=job.request.seed,
        steps=job.request.num_steps,
        output_format="webm" if job.request.output_format == "webm" else "mp4",
    )
    accepted = await accept(services, as_before, idempotency_key, remix_of=job.id)
    return await _created(services, request, accepted)


async def _created(services: Services, request: Request, accepted: Accepted) -> Response:
    request.state.replayed = accepted.attached  # read by the middleware
    request.state.job_id = accepted.job_id
    job = await find_job(services, accepted.job_id, JobKind.VIDEO)
    if accepted.attached:
        current_span.get().link(trace_of(job))
    view = await _view(services, request, job)
    return json_response(view, headers={**_poll_header(view), "location": _url(request, "get_video", job)})


@router.get(
    "",
    summary="List videos",
    responses=documented(InvalidRequestError),
)
async def list_videos(
    request: Request,
    services: ServicesDep,
    after: Annotated[str | None, Query(description="Last id of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query(description="By age; desc: the newest first.")] = "desc",
) -> VideoList:
    """Videos that were neither deleted nor forgotten, a page at a time."""
    if after is not None and created_ms_of(after) is None:
        raise InvalidRequestError(f"after: {after!r} is no video id", param="after")
    models = await services.catalog.models()
    jobs, has_more = await services.queue.listing(
        [name for name, model in models.items() if model.kind is JobKind.VIDEO],
        tenant=TENANT,
        after=after,
        limit=limit,
        newest_first=order == "desc",
    )
    # The store is not asked: a list need not know what was removed there before its time.
    data = list(await asyncio.gather(*(_view(services, request, job, ask_store=False) for job in jobs)))
    return VideoList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=has_more,
    )


@router.get(
    "/{job_id}",
    summary="Look a video up",
    response_model=VideoJob,
    responses=documented(JobNotFoundError, InvalidRequestError),
)
async def get_video(job_id: str, request: Request, services: ServicesDep) -> Response:
    """The job as it stands."""
    view = await _view(services, request, await find_job(services, job_id, JobKind.VIDEO))
    return json_response(view, headers=_poll_header(view))


@router.delete(
    "/{job_id}",
    summary="Cancel or delete a video",
    responses=documented(JobNotFoundError, InvalidRequestError),
)
async def delete_video(job_id: str, services: ServicesDep) -> VideoDeleted:
    """At once while it is queued, at the next step while it runs; a finished one's file is removed."""
    before = await find_job(services, job_id, JobKind.VIDEO)
    job = await services.queue.delete(job_id)
    if job is None:
        raise unknown_job(job_id, JobKind.VIDEO)
    count_cancelled(services, before, job)
    for output in job.outputs:
        try:
            await asyncio.to_thread(services.store.delete, output.key)
        except OSError as error:  # nobody is given it any more; expiry removes it
            logger.warning("not deleted: %s", error, extra={"job_id": job_id})
    return VideoDeleted(id=job_id)


@router.get(
    "/{job_id}/content",
    summary="Download a video",
    response_class=Response,
    responses={
        **documented(
            *CONTENT_ERRORS, VariantNotFoundError, RangeNotSatisfiableError, UnsupportedParameterError
        ),
        200: {"description": "The file.", "content": {media_type: {} for media_type in CONTENT_TYPES}},
        206: {
            "description": "The part of it that `Range` asks for.",
            "content": {media_type: {} for media_type in CONTENT_TYPES},
        },
        304: {"description": "The client's copy is still good."},
    },
)
async def get_video_content(
    job_id: str,
    request: Request,
    services: ServicesDep,
    variant: Annotated[str, Query(description=VARIANT_HELP)] = "video",
) -> Response:
    """The file, or a part of it, so that a player can seek. It never changes."""
    if variant not in VARIANTS:
        raise UnsupportedParameterError(
            f"variant={variant} is not supported; allowed are {', '.join(VARIANTS)}", param="variant"
        )
    job = await find_job(services, job_id, JobKind.VIDEO)
    await require_done(services, job)
    output = job.output(VARIANTS[variant])
    if output is None:
        raise VariantNotFoundError(f"video {job_id} was made without a {variant}", param="variant")
    headers = {**content_headers(services, job, output, job_id), "accept-ranges": "bytes"}
    if has_good_copy(request, output):
        return Response(status_code=304, headers=headers)
    try:
        part = range_of(request, output)
    except RangeNotSatisfiableError as error:
        error.extra_headers["content-range"] = f"bytes */{output.size_bytes}"
        raise
    if part is not None:
        headers["content-range"] = f"bytes {part.start}-{part.end - 1}/{output.size_bytes}"
    return Response(
        await read(services, output, part),
        status_code=200 if part is None else 206,
        media_type=output.content_type,
        headers=headers,
    )


@router.post("/{rest:path}", include_in_schema=False)
async def no_such_operation(rest: str) -> None:
    """Edits, extensions, characters.

    Raises:
        RouteNotFoundError: always.
    """
    raise RouteNotFoundError(f"there is no /v1/videos/{rest}; videos are made from text alone")


async def _view(services: Services, request: Request, job: Job, *, ask_store: bool = True) -> VideoJob:
    position = None if job.finished else await services.queue.position(job)
    over = (
        await is_expired(services, job)
        if ask_store
        else is_over(job, services.settings.result_ttl_s, services.now_ms())
    )
    return video_job(
        job,
        url=_url(request, "get_video_content", job),
        result_ttl_s=services.settings.result_ttl_s,
        eta_ms=None if job.finished else await eta_of(services, job, position),
        queue_position=position,
        expired=over,
    )


def _url(request: Request, route: str, job: Job) -> str:
    return link(request, route, job.id)


def _poll_header(view: VideoJob) -> Mapping[str, str]:
    """Look ten times while it is made, and no more often than makes sense."""
    poll_ms = POLL_MS if view.eta_s is None else view.eta_s * 1000 / LOOKS_PER_VIDEO
    return {POLL_HEADER: str(round(min(POLL_MS, max(MIN_POLL_MS, poll_ms))))}
