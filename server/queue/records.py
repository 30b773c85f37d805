"""Records that travel through Redis, and their hash and JSON forms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from functools import lru_cache
from typing import Any

from engines.bundle.bucket import Bucket
from server.job import (
    UNMEASURED_MS,
    GenerationRequest,
    Job,
    JobError,
    JobKind,
    JobStatus,
    OutputRef,
    Priority,
    Variant,
)

MAX_REQUEST_BYTES = 64 * 1024

# `json.dumps` makes an encoder anew for each call that asks for anything but the default.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_OUTPUT_FIELDS = tuple(one.name for one in fields(OutputRef))
_bucket = lru_cache(maxsize=256)(Bucket)


class UnreadableJobError(ValueError):
    """A job's record says something that this version does not know, or lacks something."""


class EnqueueStatus(StrEnum):
    """Outcome of `JobQueue.enqueue`; only OK and DUP mean that a job exists."""

    OK = "ok"
    DUP = "dup"
    MISMATCH = "mismatch"
    QUEUE_FULL = "queue_full"
    TENANT_FULL = "tenant_full"
    MEMORY = "memory"
    LATE = "late"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is predicted for a job before the queue says what work is ahead of it.

    Attributes:
        max_ahead_ms: with more work of unfinished jobs before it a new one is LATE.
        own_ms: from its start until it is finished.
        per_work: how long it waits for work ahead of it, over that work.
    """

    max_ahead_ms: float
    own_ms: float
    per_work: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EnqueueResult:
    """Whether a job was accepted.

    Attributes:
        job_id: the accepted job; for DUP and MISMATCH the one that already holds the idempotency key.
        position: jobs of the class that were waiting before it, an upper bound of those served earlier.
        ahead_ms: predicted engine time of all that were unfinished before it.
    """

    status: EnqueueStatus
    job_id: str | None = None
    position: int = 0
    ahead_ms: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A live worker, as it announces itself.

    Attributes:
        id: consumer name, unique per process life.
        version: content hash of the bundle it serves.
        backend: what really runs: "eager", "aotinductor", ...
        max_batch: most rows it runs at once.
        batch_ms: predicted engine time of its dearest batch: as much work is to wait for it in its lane.
        buckets, num_steps: what the bundle draws; empty: anything.
        warnings: why it runs slower than it could, in words for `/readyz` and the log.
    """

    id: str
    model: str
    kind: str
    version: str
    backend: str
    max_batch: int
    batch_ms: float
    pid: int
    host: str
    started_ms: int
    warnings: tuple[str, ...] = ()
    buckets: tuple[str, ...] = ()
    num_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a worker is, by what it has done last.

    Attributes:
        ratio: what batches take, over the latency table of its bundle.
        beside_ms: from a job's last pixel until its results are stored and announced.
    """

    ratio: float = 1.0
    beside_ms: float = 0.0


NO_PACE = Pace()
"""Of a worker that has done nothing yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStats:
    """One class at one moment.

    Attributes:
        waiting: queued jobs by priority.
        waiting_ms: predicted engine time of those.
        running_ms: of the jobs that workers hold, from their start.
        dead: dead letters that are kept.
        kept: finished jobs that are known.
        forgotten: finished jobs that were forgotten before their time because memory was short, ever.
        pace: of the live workers together.
        margin: by how much waiting took longer than predicted, in all but one of twenty cases.
    """

    waiting: Mapping[Priority, int]
    running: int
    oldest_age_ms: int
    dead: int
    kept: int = 0
    forgotten: int = 0
    waiting_ms: float = 0.0
    running_ms: float = 0.0
    pace: Pace = NO_PACE
    margin: float = 1.0
    workers: tuple[WorkerInfo, ...]

    @property
    def total_waiting(self) -> int:
        """Queued jobs over all priorities."""
        return sum(self.waiting.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisHealth:
    """What Redis says of itself.

    Attributes:
        used_bytes, limit_bytes: its memory; a limit of 0 is none.
        aof_ok: the append-only file is on, and the last write to it went well.
        delayed_fsyncs: times since its start that a write waited for an earlier fsync.
        commands_per_s: what it runs now.
    """

    used_bytes: int
    limit_bytes: int
    aof_ok: bool
    delayed_fsyncs: int
    commands_per_s: float

    @property
    def memory_use(self) -> float:
        """Share of the limit that is used; 0 where there is no limit."""
        return self.used_bytes / self.limit_bytes if self.limit_bytes else 0.0


def dump_worker(info: WorkerInfo) -> str:
    """JSON form of a `WorkerInfo`."""
    return json.dumps(asdict(info))


def load_worker(text: str) -> WorkerInfo:
    """Inverse of `dump_worker`."""
    read: dict[str, Any] = json.loads(text)
    read.setdefault("batch_ms", UNMEASURED_MS * read["max_batch"])  # by a worker of an earlier version
    fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in read.items()}
    return WorkerInfo(**fields)


def dump_pace(pace: Pace) -> str:
    """Both numbers, a space between them."""
    return f"{pace.ratio:.4g} {pace.beside_ms:.4g}"


def load_pace(text: str | None) -> Pace:
    """Inverse of `dump_pace`; None is what a worker of an earlier version tells."""
    return Pace(*map(float, text.split())) if text else NO_PACE


def dump_request(request: GenerationRequest) -> str:
    """JSON form of a job's request; `lua/_pump.lua` reads its height, width, frames and num_steps.

    Raises:
        ValueError: larger than MAX_REQUEST_BYTES; big inputs belong in the result store.
    """
    fields: dict[str, Any] = {
        "prompt": request.prompt,
        "height": request.bucket.height,
        "width": request.bucket.width,
        "frames": request.bucket.frames,
        "seed": request.seed,
        "num_steps": request.num_steps,
        "n": request.num_samples,
        "output_format": request.output_format,
        "output_compression": request.quality,
    }
    if request.fps is not None:
        fields["fps"] = request.fps
    if request.remix_of is not None:
        fields["remix_of"] = request.remix_of
    text = _encode(fields)
    size = len(text.encode())
    if size > MAX_REQUEST_BYTES:
        raise ValueError(f"request of {size} bytes: at most {MAX_REQUEST_BYTES} go through the queue")
    return text


def load_request(text: str) -> GenerationRequest:
    """Inverse of `dump_request`.

    Raises:
        UnreadableJobError: another version wrote it, or something is amiss with it.
    """
    try:
        read = json.loads(text)
        quality, fps = read.get("output_compression"), read.get("fps")
        return GenerationRequest(
            prompt=str(read["prompt"]),
            num_samples=max(1, int(read["n"])),
            bucket=_bucket(int(read["height"]), int(read["width"]), int(read.get("frames") or 1)),
            seed=int(read["seed"]),
            num_steps=int(read["num_steps"]),
            output_format=str(read["output_format"]),
            quality=None if quality is None else int(quality),
            fps=None if fps is None else int(fps),
            remix_of=read.get("remix_of"),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnreadableJobError(f"unreadable request: {error!r}") from error


def dump_cost(cost_ms: float) -> int:
    """Microseconds, as the scripts add them up: whole, so that what comes and goes leaves nothing behind."""
    return max(1, math.ceil(cost_ms * 1000))


def dump_outlook(outlook: Outlook | None) -> tuple[int | str, int | str, str]:
    """The last three arguments of lua/enqueue.lua."""
    if outlook is None:
        return "", "", ""
    most_us, own_us = math.floor(outlook.max_ahead_ms * 1000), math.ceil(outlook.own_ms * 1000)
    return most_us, own_us, repr(outlook.per_work)


def dump_outputs(outputs: Sequence[OutputRef]) -> str:
    """JSON form of a job's outputs."""
    return json.dumps([{name: getattr(output, name) for name in _OUTPUT_FIELDS} for output in outputs])


def load_outputs(text: str) -> tuple[OutputRef, ...]:
    """Inverse of `dump_outputs`; files of earlier versions, which made no previews, are samples."""
    return tuple(
        OutputRef(**{**output, "variant": Variant(output.get("variant", Variant.SAMPLE))})
        for output in json.loads(text)
    )


def dump_error(error: JobError) -> str:
    """JSON form of a job's error."""
    return json.dumps(asdict(error))


def load_job(model: str, job_id: str, fields: Mapping[str, str]) -> Job:
    """The job in hash `keys.job_key` (field names: server/README.md, "Keys").

    Raises:
        UnreadableJobError: another version wrote it, or something is amiss with it.
    """
    try:
        return _load_job(model, job_id, fields)
    except UnreadableJobError as error:
        raise UnreadableJobError(f"record of job {job_id}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableJobError(f"record of job {job_id} is unreadable: {error!r}") from error


def _load_job(model: str, job_id: str, fields: Mapping[str, str]) -> Job:
    request = load_request(fields["request"])
    kind = JobKind(fields["kind"])
    if kind is JobKind.VIDEO and not request.fps:
        raise ValueError("a video without frames per second")
    return Job(
        id=job_id,
        kind=kind,
        model=model,
        request=request,
        cost_ms=int(fields.get("cost_us", 0)) / 1000,
        fingerprint=fields["fingerprint"],
        created_ms=int(fields["created_ms"]),
        deadline_ms=int(fields["deadline_ms"]),
        priority=Priority(fields["priority"]),
        tenant=fields["tenant"],
        status=JobStatus(fields["status"]),
        attempt=int(fields["attempt"]),
        started_ms=int(fields["started_ms"]) if "started_ms" in fields else None,
        finished_ms=int(fields["finished_ms"]) if "finished_ms" in fields else None,
        progress=int(fields.get("progress", 0)),
        outputs=load_outputs(fields.get("outputs", "[]")),
        error=JobError(**json.loads(fields["error"])) if "error" in fields else None,
        timing=json.loads(fields.get("timing", "{}")),
        warnings=tuple(json.loads(fields.get("warnings", "[]"))),
        worker=fields.get("worker"),
        version=fields.get("version") if int(fields["attempt"]) else None,  # dealt out is not yet started
        traceparent=fields.get("traceparent") or None,
        deleted_ms=int(fields["deleted_ms"]) if "deleted_ms" in fields else None,
    )
