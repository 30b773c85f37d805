"""The worker over a real engine: what it draws, what it survives, and what it leaves when it ends.

The engine is the real pipeline over a tiny random student; `ObservedPipeline` adds a log, a brake and faults.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.bucket import Bucket
from engines.runtime.pipeline import Sample
from server.job import Job, JobStatus, Variant, result_folders
from server.queue.connection import connect
from server.queue.job_queue import JobQueue
from server.queue.keys import stream_of
from server.queue.worker_queue import WorkerQueue
from server.settings import WorkerSettings
from server.store import ResultStore
from server.worker.packing import Provenance, prompt_hash, read_provenance
from tests.server.conftest import (
    let_leases_lapse,
    poll,
    poll_async,
    worker_info,
)
from tests.server.worker.running import (
    MAX_BATCH,
    MODEL,
    ObservedPipeline,
    RunningWorker,
    clip_of,
    code_of,
    distance,
    ended,
    enqueue,
    files_of,
    frames_of,
    has_progressed,
    job_of,
    pixels_of,
)


async def test_finished_job_has_its_pictures_and_says_how_long_each_stage_took(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], store: ResultStore, pipeline: ObservedPipeline
) -> None:
    job = job_of("a red cube", seed=2**63 - 1, n=2, num_steps=2)
    await enqueue(queue, job)
    worker = start_worker()
    done = await ended(queue, job)
    assert (done.status, done.progress, done.attempt) == (JobStatus.DONE, 100, 1)
    assert set(done.timing) == {"queue", "batch_wait", "encode", "denoise", "decode", "pack", "store"}
    assert [(ref.key, ref.seed) for ref in done.outputs] == [
        (f"{result_folders(job.id)[0]}/1-0.png", 2**63 - 1),
        (f"{result_folders(job.id)[0]}/1-1.png", 0),
    ]
    for ref in done.outputs:
        data = store.get(ref.key)
        assert (ref.size_bytes, ref.content_type, ref.frames) == (len(data), "image/png", 1)
        assert read_provenance(data) == Provenance(
            model=MODEL,
            version=pipeline.manifest.version,
            seed=ref.seed,
            num_steps=2,
            prompt_sha256=prompt_hash("a red cube"),
        )
    assert pixels_of(store, done).shape == (64, 64, 3)
    worker.stop()
    assert worker.metric("jobs_total", kind="image", outcome="done") == 1
    assert worker.metric("images_total") == 2
    assert worker.metric("job_stage_seconds_count", kind="image", stage="denoise") == 1


async def test_clips_are_drawn_as_mp4_files_of_their_frames(
    queue: JobQueue, video_worker: RunningWorker, store: ResultStore
) -> None:
    jobs = [clip_of("a red cube"), clip_of("a blue cone", seed=8, num_steps=2), clip_of("a red cube")]
    await enqueue(queue, *jobs)
    first, other, again = [await ended(queue, job) for job in jobs]

    assert {end.status for end in (first, other, again)} == {JobStatus.DONE}
    assert set(first.timing) == {"queue", "batch_wait", "encode", "denoise", "decode", "pack", "store"}
    ref, thumbnail, sheet = first.outputs
    assert [
        (one.variant, one.key.rpartition("/")[2], one.width, one.frames) for one in (thumbnail, sheet)
    ] == [
        (Variant.THUMBNAIL, "1-0-thumbnail.webp", 32, 1),
        (Variant.SPRITESHEET, "1-0-spritesheet.jpg", 96, 1),
    ]
    for one in (thumbnail, sheet):
        assert len(store.get(one.key)) == one.size_bytes
    data = store.get(ref.key)
    assert (ref.key, ref.content_type, ref.size_bytes) == (
        f"{result_folders(first.id)[0]}/1-0.mp4",
        "video/mp4",
        len(data),
    )
    assert (ref.width, ref.height, ref.frames, ref.seed) == (32, 32, 9, 7)
    pipeline = video_worker.pipeline
    assert read_provenance(data) == Provenance(
        model="tiny-cogvideox",
        version=pipeline.manifest.version,
        seed=7,
        num_steps=4,
        prompt_sha256=prompt_hash("a red cube"),
    )
    sample = Sample(prompt="a red cube", seed=7, num_steps=4, bucket=Bucket(32, 32, 9))
    (drawn,) = pipeline.run([sample])
    clip = frames_of(data)
    assert clip.shape == (9, 32, 32, 3)
    # A random student's clip is noise, which H.264 keeps least of all, and its chroma hardly.
    assert distance(clip, drawn) < 6
    assert distance(clip, frames_of(store.get(again.outputs[0].key))) < 1
    assert distance(clip, frames_of(store.get(other.outputs[0].key))) > 12
    video_worker.stop()
    assert video_worker.metric("jobs_total", kind="video", outcome="done") == 3
    assert video_worker.metric("video_frames_total") == 27


async def test_running_clip_tells_its_progress_and_stops_when_it_is_deleted(
    queue: JobQueue, video_worker: RunningWorker, settings: WorkerSettings
) -> None:
    pipeline = video_worker.pipeline
    pipeline.braked = True
    deleted, neighbour = clip_of("deleted"), clip_of("neighbour")
    await enqueue(queue, deleted, neighbour)
    poll(lambda: pipeline.batches)
    pipeline.allow(1)
    await poll_async(lambda: has_progressed(queue, deleted, 25))
    await queue.delete(deleted.id)
    pipeline.allow(1)
    await poll_async(lambda: has_progressed(queue, deleted, 50))  # the same heartbeat hears of it
    pipeline.release()

    end = await ended(queue, deleted)
    assert (end.status, code_of(end), end.outputs) == (JobStatus.CANCELLED, "cancelled", ())
    assert (await ended(queue, neighbour)).status is JobStatus.DONE
    assert {name.split("/")[1] for name in files_of(settings)} == {neighbour.id}


async def test_job_of_more_samples_than_a_batch_holds_is_drawn_in_several(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline, store: ResultStore
) -> None:
    job = job_of("a red cube", n=10, num_steps=1)
    await enqueue(queue, job)
    start_worker()
    done = await ended(queue, job)
    assert [ref.seed for ref in done.outputs] == list(range(7, 17))
    assert sum(len(batch) for batch in pipeline.batches) == 10
    assert len(pipeline.batches) >= 3
    first, second = pixels_of(store, done, 0), pixels_of(store, done, 9)
    assert np.abs(first - second).max() > 0


async def test_engine_that_is_slower_than_its_table_says_so_at_once(
    queue: JobQueue,
    settings: WorkerSettings,
    pipeline: ObservedPipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = [row.model_copy(update={"ms": 1e-3}) for row in pipeline.manifest.latency]
    monkeypatch.setattr(pipeline, "manifest", pipeline.manifest.model_copy(update={"latency": table}))
    worker = RunningWorker(replace(settings, lease_s=36_000.0), pipeline)  # the next announcement is far
    job = job_of("a red cube", n=MAX_BATCH * 8)
    await enqueue(queue, job)
    await ended(queue, job)

    async def told() -> bool:
        pace = (await queue.stats(MODEL)).pace
        return pace.ratio > 10 and pace.beside_ms > 0

    try:
        await poll_async(told)
        assert worker.metric("engine_pace_ratio") > 10
    finally:
        worker.stop()


async def test_same_seed_gives_the_same_picture_whatever_the_batch(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline, store: ResultStore
) -> None:
    pipeline.braked = True
    alone = job_of("a blue cone", seed=11)
    await enqueue(queue, alone)
    start_worker()
    poll(lambda: pipeline.batches)
    company = [
        job_of("a green sphere", seed=5, num_steps=2),
        job_of("a blue cone", seed=11),
        job_of("a cube", n=2),
    ]
    await enqueue(queue, *company)
    pipeline.release()
    first = await ended(queue, alone)
    others = [await ended(queue, job) for job in company]
    assert pipeline.batches[0] == ["a blue cone"]
    assert max(len(batch) for batch in pipeline.batches) > 1
    assert np.abs(pixels_of(store, first) - pixels_of(store, others[1])).max() <= 1
    assert np.abs(pixels_of(store, first) - pixels_of(store, others[0])).max() > 1


# what it survives


async def test_request_that_breaks_the_engine_fails_alone(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    jobs = [job_of(prompt) for prompt in ("a", "boom", "b", "c")]
    await enqueue(queue, *jobs)
    start_worker()
    ends = [await ended(queue, job) for job in jobs]
    assert [end.status for end in ends] == [JobStatus.DONE, JobStatus.FAILED, JobStatus.DONE, JobStatus.DONE]
    assert code_of(ends[1]) == "generation_failed"
    assert ["boom"] in pipeline.batches


async def test_batch_that_does_not_fit_is_split_and_the_next_ones_are_smaller(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.fits = 2
    jobs = [job_of(str(i), num_steps=1, n=MAX_BATCH) for i in range(3)]
    await enqueue(queue, *jobs)
    worker = start_worker()
    ends = [await ended(queue, job) for job in jobs]
    assert [end.status for end in ends] == [JobStatus.DONE] * 3
    sizes = [len(batch) for batch in pipeline.batches]
    assert max(sizes) > 2
    assert max(sizes[sizes.index(max(sizes)) + 1 :]) == 2
    assert worker.metrics.registry.get_sample_value("tdm_gpu_oom_total", {"gpu": "cpu"}) == 1


async def test_sample_that_does_not_fit_by_itself_fails_with_that_reason(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline
) -> None:
    pipeline.fits = 0
    job = job_of("a", n=2)
    await enqueue(queue, job)
    start_worker()
    assert code_of(await ended(queue, job)) == "out_of_memory"


async def test_request_that_cannot_be_read_fails_and_the_next_is_served(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], settings: WorkerSettings
) -> None:
    broken, fine = job_of("a"), job_of("b")
    await enqueue(queue, broken, fine)
    client = connect(settings.redis_url)
    key = f"q:2:{{{broken.model}}}:j:{broken.id}"
    client.hset(key, "request", str(client.hget(key, "request")).replace('"height":64', '"height":"tall"'))
    start_worker()
    assert (await ended(queue, fine)).status is JobStatus.DONE
    poll(lambda: client.hget(key, "status") == "failed")
    error = json.loads(str(client.hget(key, "error")))
    assert error["code"] == "invalid_request"
    assert "tall" in error["message"]
    client.close()


async def test_record_of_another_version_fails_that_job_and_the_next_is_served(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], settings: WorkerSettings
) -> None:
    strange, fine = job_of("a"), job_of("b")
    await enqueue(queue, strange, fine)
    client = connect(settings.redis_url)
    key = f"q:2:{{{strange.model}}}:j:{strange.id}"
    client.hset(key, "priority", "urgent")  # a priority that some newer api knows
    start_worker()
    assert (await ended(queue, fine)).status is JobStatus.DONE
    poll(lambda: client.hget(key, "status") == "failed")
    assert "urgent" in str(client.hget(key, "error"))
    client.close()


async def test_size_that_the_bundle_does_not_have_fails_alone(
    queue: JobQueue, start_worker: Callable[[], RunningWorker]
) -> None:
    wide, fine = job_of("a", bucket=Bucket(64, 512)), job_of("b")
    await enqueue(queue, wide, fine)
    start_worker()
    assert code_of(await ended(queue, wide)) == "not_served"
    assert (await ended(queue, fine)).status is JobStatus.DONE


async def die_over(queue: JobQueue, url: str, version: str, *jobs: Job) -> None:
    """Enqueue jobs and start them as a worker that then dies; their leases have lapsed."""
    await enqueue(queue, *jobs)
    dead = WorkerQueue(url, model=MODEL, version=version, consumer="dead")
    dead.beat(worker_info("dead", version=version), "{}")
    assert all(started.job is not None for started in dead.start(dead.read(len(jobs))))
    dead.close()
    client = connect(url)
    let_leases_lapse(client, stream=stream_of(MODEL, version), idle_ms=120_000)
    client.close()


async def test_retried_job_runs_alone(
    queue: JobQueue, start_worker: Callable[[], RunningWorker], pipeline: ObservedPipeline, url: str
) -> None:
    suspect = job_of("suspect")
    await die_over(queue, url, pipeline.manifest.version, suspect)
    innocent = [job_of(str(i)) for i in range(3)]
    await enqueue(queue, *innocent)
    worker = start_worker()
    ends = [await ended(queue, job) for job in (suspect, *innocent)]
    assert [end.attempt for end in ends] == [2, 1, 1, 1]
    assert all(len(batch) == 1 for batch in pipeline.batches if "suspect" in batch)
    worker.stop()
    assert worker.metric("job_redeliveries_total", cause="lease_lapsed") == 1


async def test_retried_job_is_not_started_while_another_is_being_stored(
    queue: JobQueue,
    start_worker: Callable[[], RunningWorker],
    pipeline: ObservedPipeline,
    url: str,
    tmp_path: Path,
) -> None:
    suspects = [job_of("one"), job_of("two")]
    await die_over(queue, url, pipeline.manifest.version, *suspects)
    obstacle = tmp_path / "results"
    obstacle.write_text("a file where the directory should be")
    worker = start_worker()
    tries = ("tdm_storage_op_seconds_count", {"op": "put"})
    poll(lambda: (worker.metrics.registry.get_sample_value(*tries) or 0) >= 3)
    assert len(pipeline.batches) == 1
    assert sorted([job.attempt for job in [await queue.get(job.id) for job in suspects] if job]) == [1, 2]

    obstacle.unlink()
    ends = [await ended(queue, job) for job in suspects]
    assert [(end.status, end.attempt) for end in ends] == [(JobStatus.DONE, 2)] * 2
