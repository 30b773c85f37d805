"""Traces of jobs and batches, over a worker with a real engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from server.job import Job, JobStatus
from server.queue.job_queue import JobQueue
from server.settings import WorkerSettings
from server.worker.process import EXIT_ENGINE_LOST
from tests.server.collector import Collector, SeenSpan
from tests.server.conftest import poll, poll_async
from tests.server.worker.running import (
    MODEL,
    ObservedPipeline,
    RunningWorker,
    ended,
    enqueue,
    has_progressed,
    job_of,
)

STAGES = ["queue", "batch_wait", "encode", "denoise", "decode", "pack", "store"]
SECRET = "a heron that nobody may hear of"


@pytest.fixture
def start_traced(
    settings: WorkerSettings, pipeline: ObservedPipeline, collector: Collector
) -> Iterator[Callable[[], RunningWorker]]:
    workers: list[RunningWorker] = []

    def start() -> RunningWorker:
        workers.append(RunningWorker(replace(settings, otlp_endpoint=collector.url), pipeline))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


def traced_job(prompt: str, number: int, *, flags: str = "01", **request: int) -> Job:
    """Its trace id is its number."""
    return replace(job_of(prompt, **request), traceparent=f"00-{number:032x}-{number:016x}-{flags}")


def of_trace(spans: list[SeenSpan], number: int) -> SeenSpan:
    (span,) = [span for span in spans if span.trace_id == f"{number:032x}"]
    return span


async def test_jobs_of_a_batch_and_the_batch_are_linked_and_the_stages_lie_within_the_attempt(
    queue: JobQueue,
    start_traced: Callable[[], RunningWorker],
    pipeline: ObservedPipeline,
    collector: Collector,
) -> None:
    one, two = traced_job(SECRET, 1, num_steps=2), traced_job("two", 2, num_steps=2)
    others = [traced_job("unsampled", 3, flags="00", num_steps=2), job_of("untraced", num_steps=2)]
    await enqueue(queue, one, two, *others)
    worker = start_traced()
    for job in (one, two, *others):
        assert (await ended(queue, job)).outputs
    worker.stop()

    assert len(pipeline.batches) == 1
    processed, batch = collector.named(f"process {MODEL}"), collector.one(f"batch {MODEL}")
    assert len(processed) == 2
    for number, job in ((1, one), (2, two)):
        span = of_trace(processed, number)
        assert (span.service, span.kind, span.parent_id) == ("tdm-worker", "consumer", f"{number:016x}")
        assert span.begun_ns == job.created_ms * 1_000_000
        assert span.links == {batch.place}
        assert not span.is_error
        facts = {name.removeprefix("tdm."): value for name, value in span.attributes.items()}
        assert facts.pop("messaging.client.id") == batch.attributes["messaging.client.id"]
        assert facts == {
            "messaging.destination.name": MODEL,
            "messaging.message.id": job.id,
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.system": "redis",
            "attempt": 1,
            "backend": "eager",
            "bucket": "64x64",
            "job.id": job.id,
            "job.kind": "image",
            "job.outcome": "done",
            "model": MODEL,
            "num_samples": 1,
            "num_steps": 2,
            "version": pipeline.manifest.version,
        }
        assert collector.children(span) == STAGES
        stages = [child for child in collector.spans if child.parent_id == span.span_id]
        assert all(stage.begun_ns <= stage.ended_ns <= span.ended_ns for stage in stages)
    assert batch.links == {span.place for span in processed}
    assert (batch.parent_id, batch.attributes["tdm.batch.num_samples"]) == ("", 4)
    assert (batch.attributes["messaging.batch.message_count"], batch.attributes["tdm.batch.capacity"]) == (
        4,
        4,
    )
    assert len(collector.spans) == 2 * (1 + len(STAGES)) + 1
    assert all(SECRET.encode() not in body for body in collector.bodies)


async def test_batch_of_which_nobody_wants_a_trace_has_none(
    queue: JobQueue, start_traced: Callable[[], RunningWorker], collector: Collector
) -> None:
    jobs = [
        traced_job("unsampled", 3, flags="00"),
        job_of("untraced"),
        replace(job_of("odd"), traceparent="x"),
    ]
    await enqueue(queue, *jobs)
    worker = start_traced()
    for job in jobs:
        assert (await ended(queue, job)).outputs
    worker.stop()

    assert collector.bodies == []


async def test_job_of_several_batches_is_linked_to_each(
    queue: JobQueue, start_traced: Callable[[], RunningWorker], collector: Collector
) -> None:
    job = traced_job("a red cube", 1, n=6, num_steps=1)
    await enqueue(queue, job)
    worker = start_traced()
    await ended(queue, job)
    worker.stop()

    span, batches = collector.one(f"process {MODEL}"), collector.named(f"batch {MODEL}")
    assert span.links == {batch.place for batch in batches}
    assert len({batch.trace_id for batch in batches}) == len(batches) == 2
    assert sorted(collector.children(span)) == sorted([*STAGES, "encode", "denoise", "decode"])


async def test_failure_says_its_code_and_nothing_of_its_message(
    queue: JobQueue,
    start_traced: Callable[[], RunningWorker],
    pipeline: ObservedPipeline,
    collector: Collector,
) -> None:
    pipeline.error = RuntimeError(SECRET)
    bad, good = traced_job("boom", 1), traced_job("fine", 2)
    await enqueue(queue, bad, good)
    worker = start_traced()
    for job in (bad, good):
        await ended(queue, job)
    worker.stop()

    processed, batches = collector.named(f"process {MODEL}"), collector.named(f"batch {MODEL}")
    failed, drawn = of_trace(processed, 1), of_trace(processed, 2)
    assert (failed.is_error, failed.attributes["error.type"]) == (True, "generation_failed")
    assert (failed.attributes["tdm.job.outcome"], drawn.attributes["tdm.job.outcome"]) == ("failed", "done")
    assert not drawn.is_error
    both, first, second = batches
    assert [batch.is_error for batch in batches] == [True, True, False]
    assert failed.links == {both.place, first.place}
    assert drawn.links == {both.place, second.place}
    assert all(SECRET.encode() not in body for body in collector.bodies)


async def test_cancelled_attempt_is_no_error(
    queue: JobQueue,
    start_traced: Callable[[], RunningWorker],
    pipeline: ObservedPipeline,
    collector: Collector,
) -> None:
    pipeline.braked = True
    job = traced_job("a red cube", 1)
    await enqueue(queue, job)
    worker = start_traced()
    poll(lambda: pipeline.batches)
    pipeline.allow(1)
    await poll_async(lambda: has_progressed(queue, job, 25))
    await queue.cancel(job.id)
    pipeline.allow(1)
    await poll_async(lambda: has_progressed(queue, job, 50))  # the same heartbeat hears of it
    pipeline.release()
    assert (await ended(queue, job)).status is JobStatus.CANCELLED
    worker.stop()

    span = collector.one(f"process {MODEL}")
    assert (span.attributes["tdm.job.outcome"], span.is_error) == ("cancelled", False)


async def test_job_past_its_deadline_is_settled_in_its_trace_without_an_attempt(
    queue: JobQueue, start_traced: Callable[[], RunningWorker], collector: Collector
) -> None:
    late = replace(traced_job("late", 1), deadline_ms=job_of("now").created_ms + 1)
    await enqueue(queue, late)
    worker = start_traced()
    await ended(queue, late)
    worker.stop()

    span = collector.one(f"settle {MODEL}")
    assert (span.trace_id, span.parent_id, span.kind) == (f"{1:032x}", f"{1:016x}", "client")
    assert (span.is_error, span.attributes["error.type"]) == (True, "deadline")
    assert [span.name for span in collector.spans] == [f"settle {MODEL}"]


async def test_lost_device_is_why_an_attempt_ended_whose_job_goes_on_elsewhere(
    queue: JobQueue,
    start_traced: Callable[[], RunningWorker],
    pipeline: ObservedPipeline,
    collector: Collector,
) -> None:
    pipeline.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    await enqueue(queue, traced_job("boom", 1))
    assert start_traced().join() == EXIT_ENGINE_LOST

    span, batch = collector.one(f"process {MODEL}"), collector.one(f"batch {MODEL}")
    assert span.attributes["tdm.job.outcome"] == "left"
    assert span.links == {batch.place}
    for one in (span, batch):
        assert (one.is_error, one.attributes["error.type"]) == (True, "device_lost")
