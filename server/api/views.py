"""Views: how a job looks from outside. Pure functions from `Job` to bodies and headers."""

from __future__ import annotations

from collections.abc import Callable

from server.api.errors import (
    ApiError,
    DeadlineExceededError,
    JobCancelledError,
    JobFailedError,
    JobPoisonedError,
    NoLongerServedError,
    StoreUnavailableError,
)
from server.api.schemas import GenerationsResponse, ImageData, ImageJob, JobErrorView, Status, VideoJob
from server.job import Job, JobErrorCode, JobStatus, OutputRef

STATUS: dict[JobStatus, Status] = {
    JobStatus.QUEUED: "queued",
    JobStatus.RUNNING: "in_progress",
    JobStatus.DONE: "completed",
    JobStatus.FAILED: "failed",
    JobStatus.CANCELLED: "failed",
}

# Name outside -> name in `Job.timing`, in the order in which a job lives through them.
STAGES = {
    "queue": "queue",
    "batch": "batch_wait",
    "encode": "encode",
    "denoise": "denoise",
    "decode": "decode",
    "pack": "pack",
    "store": "store",
}

FAILURES: dict[str, type[ApiError]] = {
    JobErrorCode.DEADLINE: DeadlineExceededError,
    JobErrorCode.POISON: JobPoisonedError,
    JobErrorCode.NOT_SERVED: NoLongerServedError,
    JobErrorCode.STORAGE: StoreUnavailableError,
}
"""Codes of `JobError` that have a class of their own here; the rest are `generation_failed`."""

ContentUrl = Callable[[str, int], str]
"""Job id and index of the image -> absolute URL of its bytes."""


def seconds_of(frames: int, fps: int) -> str:
    """From the first frame to the last, as OpenAI's API writes it."""
    return f"{(frames - 1) / fps:g}"


def timing_of(job: Job) -> dict[str, float]:
    """Milliseconds per stage, and from accepted to finished as `total`."""
    timing = {name: round(job.timing[key], 3) for name, key in STAGES.items() if key in job.timing}
    if job.finished_ms is not None:
        timing["total"] = float(job.finished_ms - job.created_ms)
    return timing


def server_timing(job: Job) -> str:
    """The Server-Timing header, which browsers show among a request's timings."""
    return ", ".join(f"{stage};dur={spent_ms:g}" for stage, spent_ms in timing_of(job).items())


def image_job(
    job: Job,
    *,
    content_url: ContentUrl,
    result_ttl_s: int,
    images_b64: list[str] | None = None,
    eta_ms: float | None = None,
    queue_position: int | None = None,
    expired: bool = False,
) -> ImageJob:
    """A job as `GET /v1/images/{id}` shows it.

    Args:
        job: finished or not.
        content_url: makes the URL of one image.
        result_ttl_s: how long its images are kept.
        images_b64: the images' bytes in base64, where the client wants them in the body.
        eta_ms: predicted time until it is finished.
        queue_position: jobs ahead of it.
        expired: it was completed, and its images are gone.
    """
    request = job.request
    waiting = job.status is JobStatus.QUEUED
    return ImageJob(
        id=job.id,
        status="expired" if expired else STATUS[job.status],
        model=job.model,
        version=job.version,
        created=job.created_ms // 1000,
        completed_at=None if job.finished_ms is None else job.finished_ms // 1000,
        expires_at=None if job.finished_ms is None else job.finished_ms // 1000 + result_ttl_s,
        progress=100 if job.status is JobStatus.DONE else job.progress,
        queue_position=queue_position if waiting else None,
        eta_s=None if job.finished or eta_ms is None else round(eta_ms / 1000, 3),
        prompt=request.prompt,
        n=request.num_samples,
        size=request.bucket.size,
        seed=request.seed,
        steps=request.num_steps,
        output_format=request.output_format,
        data=[] if expired else image_data(job, content_url, images_b64),
        warnings=list(job.warnings),
        timing_ms=timing_of(job),
        error=_error_view(job),
    )


def video_job(
    job: Job,
    *,
    url: str,
    result_ttl_s: int,
    eta_ms: float | None = None,
    queue_position: int | None = None,
    expired: bool = False,
) -> VideoJob:
    """A job as `GET /v1/videos/{id}` shows it; arguments as of `image_job`, and the URL of its file."""
    request = job.request
    assert request.fps is not None, f"video job {job.id} without frames per second"
    done = job.status is JobStatus.DONE and not expired
    over_ms = job.deleted_ms if job.status is JobStatus.DONE else None
    if over_ms is None and job.finished_ms is not None:
        over_ms = job.finished_ms + result_ttl_s * 1000
    return VideoJob(
        id=job.id,
        created_at=job.created_ms // 1000,
        status="expired" if expired else STATUS[job.status],
        model=job.model,
        version=job.version,
        progress=100 if job.status is JobStatus.DONE else job.progress,
        seconds=seconds_of(request.bucket.frames, request.fps),
        size=request.bucket.size,
        prompt=request.prompt,
        completed_at=None if job.finished_ms is None else job.finished_ms // 1000,
        expires_at=None if over_ms is None else over_ms // 1000,
        error=_error_view(job),
        remixed_from_video_id=request.remix_of,
        url=url if done else None,
        size_bytes=job.outputs[0].size_bytes if done else None,
        frames=request.bucket.frames,
        fps=request.fps,
        output_format="webm" if request.output_format == "webm" else "mp4",
        seed=request.seed,
        steps=request.num_steps,
        queue_position=queue_position if job.status is JobStatus.QUEUED else None,
        eta_s=None if job.finished or eta_ms is None else round(eta_ms / 1000, 3),
        warnings=list(job.warnings),
        timing_ms=timing_of(job),
    )


def generations_response(
    job: Job, *, content_url: ContentUrl, images_b64: list[str] | None
) -> GenerationsResponse:
    """A finished job in OpenAI's shape."""
    return GenerationsResponse(
        created=job.created_ms // 1000,
        data=image_data(job, content_url, images_b64),
        output_format=job.request.output_format,
        size=job.request.bucket.size,
        id=job.id,
        model=job.model,
        version=job.version,
        seed=job.request.seed,
        steps=job.request.num_steps,
        warnings=list(job.warnings),
        timing_ms=timing_of(job),
    )


def image_data(job: Job, content_url: ContentUrl, images_b64: list[str] | None) -> list[ImageData]:
    """One entry per finished image: its bytes or, where the client did not ask for them, where they lie.

    Never both: clients that find a URL fetch it, also where they may not.
    """
    return [
        ImageData(
            url=None if images_b64 else content_url(job.id, index),
            b64_json=images_b64[index] if images_b64 else None,
            seed=output.seed,
            width=output.width,
            height=output.height,
            content_type=output.content_type,
            size_bytes=output.size_bytes,
        )
        for index, output in enumerate(job.outputs)
    ]


def failure_of(job: Job) -> ApiError:
    """What a client that asks for the result is told when the job ended without one."""
    if job.status is JobStatus.CANCELLED:
        return JobCancelledError(f"job {job.id} was cancelled")
    code, message = (
        (job.error.code, job.error.message) if job.error else ("unknown", "no reason was recorded")
    )
    return FAILURES.get(code, JobFailedError)(f"job {job.id} failed ({code}): {message}")


def etag_of(output: OutputRef) -> str:
    """Strong ETag of one image: the key names the job and the attempt, and what it holds never changes."""
    return f'"{output.key.rpartition("/")[0].rpartition("/")[2]}-{output.key.rpartition("/")[2]}"'


def _error_view(job: Job) -> JobErrorView | None:
    if job.status is JobStatus.CANCELLED:
        return JobErrorView(code=JobErrorCode.CANCELLED, message="the job was cancelled")
    return JobErrorView(code=job.error.code, message=job.error.message) if job.error else None
