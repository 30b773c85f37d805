"""Job: one accepted request, from enqueue to its single final answer. Pure data: no Redis, no torch, no HTTP.

A job asks for one or more samples. What a sample is (an image, a video) is known to the model that draws it,
and to the `OutputRef`s that come back; nothing here or in the queue assumes that it is one, or an image.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from typing import Any

from engines.bundle.bucket import Bucket

MAX_SEED = 2**63
UNMEASURED_MS = 100.0
"""What a sample is taken to cost where nothing was measured: turns and deadlines need a number."""
# `json.dumps` makes an encoder anew for each call that asks for anything but the default.
_encode_sorted = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


class JobKind(StrEnum):
    """What a job's samples are."""

    IMAGE = "image"
    VIDEO = "video"


ID_PREFIX = {JobKind.IMAGE: "img", JobKind.VIDEO: "vid"}
_JOB_ID = re.compile(rf"(?:{'|'.join(ID_PREFIX.values())})_([0-9a-f]{{12}})[0-9a-f]{{20}}")
_HOUR = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}")


class JobStatus(StrEnum):
    """Where a job stands: QUEUED -> RUNNING -> DONE, FAILED or CANCELLED; these three never change.

    A job whose worker died stays RUNNING until another starts its next attempt.
    """

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({JobStatus.DONE, JobStatus.FAILED, JobStatus.CANCELLED})


class Priority(StrEnum):
    """Share of the workers when all three have waiting jobs: 8 : 3 : 1 (server/queue/lua/_pump.lua)."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class JobErrorCode(StrEnum):
    """Why the server ends a job without results; README.md lists them for clients.

    DEADLINE: it passed. POISON: each worker that started it died. STORAGE: the result store did not answer.
    OUT_OF_MEMORY: one sample does not fit. GENERATION_FAILED: the engine failed on it. INVALID_REQUEST: its
    record cannot be read. NOT_SERVED: no bundle that generates such samples is served any longer.
    INTERNAL: the finished samples could not be packed.
    """

    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    POISON = "poison"
    STORAGE = "storage"
    OUT_OF_MEMORY = "out_of_memory"
    GENERATION_FAILED = "generation_failed"
    INVALID_REQUEST = "invalid_request"
    NOT_SERVED = "not_served"
    INTERNAL = "internal"


class Variant(StrEnum):
    """What a stored file is to its job: one of the samples that were asked for, or a small picture of one."""

    SAMPLE = "sample"
    THUMBNAIL = "thumbnail"
    SPRITESHEET = "spritesheet"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a job is to generate: what was asked for, with every default filled in.

    Made once, when a request is submitted. From then on nobody asks again whether a model serves it.

    Attributes:
        num_samples: at least 1. Sample `i` is generated with `sample_seed(seed, i)`.
        bucket: height and width in pixels, and number of frames.
        num_steps: denoiser calls per sample.
        output_format: png, jpeg or webp; mp4 or webm.
        quality: 0 to 100 for jpeg and webp; None leaves it to the packer.
        fps: frames per second of a video; None for images.
        remix_of: the video whose settings these are, with another prompt.
    """

    prompt: str
    num_samples: int = 1
    bucket: Bucket
    seed: int
    num_steps: int
    output_format: str
    quality: int | None = None
    fps: int | None = None
    remix_of: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """Why a job failed: a stable code for programs, a sentence for people.

    Attributes:
        code: a `JobErrorCode`, or one of `engines/errors.py`; another version of the server may know more.
    """

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputRef:
    """One file of a finished job in the result store. The bytes are at `key`, never in Redis.

    Attributes:
        key: `<job>/<attempt>-<i>.<ext>`, so no attempt overwrites another.
        width, height: of the file's picture, in pixels.
        frames: 1 for an image.
        seed: the seed that draws exactly this sample again with n = 1.
    """

    key: str
    content_type: str
    size_bytes: int
    width: int
    height: int
    frames: int
    seed: int
    variant: Variant = Variant.SAMPLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One accepted request.

    Attributes:
        id: `img_…` or `vid_…` from `new_job_id`.
        model: bundle name; also the queue class.
        cost_ms: predicted engine time of all its samples, in full batches; at least 0.001.
        fingerprint: of the request; the same idempotency key with another fingerprint is a mismatch.
        attempt: how often a worker has started it.
        deadline_ms: unix ms after which it is failed with code `deadline` instead of started.
        progress: 0..100, denoising steps done.
        outputs: the samples, in order, and after them the small pictures of a video.
        timing: ms by stage: queue, batch_wait, encode, denoise, decode, pack, store.
        warnings: what its result does not show of what was asked, and why.
        worker: consumer name of the last worker that started it.
        version: of the bundle that runs it, or is to run it again; once it is done, of the one that drew it.
        deleted_ms: when the client had its results deleted; they count as gone from then on.
    """

    id: str
    kind: JobKind
    model: str
    request: GenerationRequest
    cost_ms: float
    fingerprint: str
    created_ms: int
    deadline_ms: int
    priority: Priority = Priority.NORMAL
    tenant: str = "public"
    status: JobStatus = JobStatus.QUEUED
    attempt: int = 0
    started_ms: int | None = None
    finished_ms: int | None = None
    progress: int = 0
    outputs: tuple[OutputRef, ...] = ()
    error: JobError | None = None
    timing: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    worker: str | None = None
    version: str | None = None
    traceparent: str | None = None
    deleted_ms: int | None = None

    def output(self, variant: Variant) -> OutputRef | None:
        """The first file of a kind, or None: workers of earlier versions made no previews."""
        return next((output for output in self.outputs if output.variant is variant), None)

    @property
    def samples(self) -> tuple[OutputRef, ...]:
        """What was asked for, without the small pictures."""
        return tuple(output for output in self.outputs if output.variant is Variant.SAMPLE)

    @property
    def finished(self) -> bool:
        """True once the job has its final answer."""
        return self.status in TERMINAL


def fingerprint(
    request: GenerationRequest,
    *,
    model: str | None = None,
    seed_given: bool = True,
    max_steps_under_load: int | None = None,
) -> str:
    """sha256 (hex) of what is asked for: two requests that differ in it are not the same.

    Spelled out field by field: it must stay what it is, however requests are stored.

    Args:
        request: of a job.
        model: the one that was asked, if it is to count.
        seed_given: False for a seed that was drawn for the request: asking again without one is the same.
        max_steps_under_load: what the client agrees to.
    """
    asked: dict[str, Any] = {
        "prompt": request.prompt,
        "n": request.num_samples,
        "height": request.bucket.height,
        "width": request.bucket.width,
        "frames": request.bucket.frames,
        "seed": request.seed if seed_given else None,
        "num_steps": request.num_steps,
        "output_format": request.output_format,
        "output_compression": request.quality,
    }
    if request.fps is not None:
        asked["fps"] = request.fps
    if request.remix_of is not None:
        asked["remix_of"] = request.remix_of
    if model is not None:
        asked["model"] = model
    if max_steps_under_load is not None:
        asked["max_steps_under_load"] = max_steps_under_load
    return hashlib.sha256(_encode_sorted(asked).encode()).hexdigest()


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a job, 0..2**63-1."""
    return (seed + index) % MAX_SEED


def is_over(job: Job, ttl_s: float, now_ms: int) -> bool:
    """True from `ttl_s` after the end of a job with results, or once they are deleted: they count as gone."""
    if job.status is not JobStatus.DONE:
        return False
    return job.deleted_ms is not None or (job.finished_ms or 0) + ttl_s * 1000 <= now_ms


@lru_cache(maxsize=1024)
def model_tag(model: str) -> str:
    """Four hex digits that end every job id of `model`, so an id alone leads to its queue class."""
    return hashlib.sha256(model.encode()).hexdigest()[:4]


def new_job_id(kind: str, model: str, now_ms: int) -> str:
    """A new id: kind prefix, 48 bits of time (ids sort by age), 64 random bits, the model's tag.

    Raises:
        ValueError: unknown kind.
    """
    return f"{ID_PREFIX[JobKind(kind)]}_{now_ms:012x}{secrets.token_hex(8)}{model_tag(model)}"


def created_ms_of(job_id: str) -> int | None:
    """When an id was made, in unix ms; None if it is not a job id at all."""
    found = _JOB_ID.fullmatch(job_id)
    return int(found[1], 16) if found else None


def result_folders(job_id: str) -> list[str]:
    """Where in the store a job's files lie: new ones in the first folder; earlier versions had the other."""
    created_ms = created_ms_of(job_id)
    try:
        hour = datetime.fromtimestamp((created_ms or 0) / 1000, UTC)
    except (ValueError, OverflowError):  # no clock has ever made this id
        return [job_id]
    return [job_id] if created_ms is None else [f"{hour:%Y-%m-%dT%H}/{job_id}", job_id]


def begun_ms_of(folder: str) -> int:
    """Unix ms before which no file can have come into a folder of the store that has this name, an hour or a
    job id; 0 where the name does not tell.
    """
    if _HOUR.fullmatch(folder):
        try:
            return round(datetime.strptime(f"{folder}+0000", "%Y-%m-%dT%H%z").timestamp() * 1000)
        except ValueError:  # 2026-13-99T25
            return 0
    return created_ms_of(folder) or 0


def new_job(
    *,
    kind: JobKind,
    model: str,
    request: GenerationRequest,
    now_ms: int,
    deadline_ms: int,
    priority: Priority = Priority.NORMAL,
    tenant: str = "public",
    traceparent: str | None = None,
    asked: str | None = None,
    cost_ms: float | None = None,
) -> Job:
    """A queued job with a fresh id.

    Args:
        asked: fingerprint of what was asked for; None takes that of `request`.
        cost_ms: predicted engine time; None where nothing was measured.
    """
    return Job(
        id=new_job_id(kind, model, now_ms),
        kind=kind,
        model=model,
        request=request,
        cost_ms=UNMEASURED_MS * request.num_samples if cost_ms is None else cost_ms,
        fingerprint=fingerprint(request) if asked is None else asked,
        created_ms=now_ms,
        deadline_ms=deadline_ms,
        priority=priority,
        tenant=tenant,
        traceparent=traceparent,
    )
