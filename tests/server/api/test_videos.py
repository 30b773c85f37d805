"""`/v1/videos` over a real Valkey and a real store. The test plays the worker: nothing is left to timing."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import av
import httpx
import httpx2
import openai
import pytest

from engines.bucket import Bucket
from server.job import GenerationRequest, Job
from server.queue.connection import connect
from server.queue.worker_queue import Settled
from server.settings import Settings
from server.store import ResultStore
from server.worker.packing import prompt_hash, read_provenance
from tests.server.api.running import Api, Worker, error_of, running_api
from tests.server.manifests import make_video_manifest

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def settings(valkey_url: str, tmp_path: Any) -> Settings:
    client = connect(valkey_url)
    client.flushall()
    client.config_set("maxmemory", 0)
    client.close()
    return Settings(redis_url=valkey_url, data_dir=tmp_path, max_queue=3)


@pytest.fixture
async def api(settings: Settings) -> AsyncIterator[Api]:
    """An api process with an image model, `scenes`, and a video model, `clips`."""
    async with running_api(settings) as api:
        api.worker.announce()
        yield api


@pytest.fixture
def worker(settings: Settings, api: Api) -> Iterator[Worker]:
    """The one that serves `clips`."""
    worker = Worker(settings.redis_url, ResultStore(settings.results_url), manifest=make_video_manifest())
    worker.announce()
    yield worker
    worker.queue.close()
    worker.redis.close()


@pytest.fixture
async def client(api: Api) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(app=api.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as http:
        yield openai.AsyncOpenAI(base_url="http://server/v1", api_key="none", max_retries=0, http_client=http)


def num_frames(content: bytes) -> int:
    """Of an MP4 file, decoded."""
    with av.open(io.BytesIO(content), "r") as file:
        return len(list(file.decode(video=0)))


async def post(api: Api, body: Mapping[str, Any] | None = None, **options: Any) -> httpx.Response:
    return await api.client.post("/v1/videos", json={"prompt": "a red cube", **(body or {})}, **options)


async def look(api: Api, job_id: str) -> dict[str, Any]:
    response = await api.client.get(f"/v1/videos/{job_id}")
    assert response.status_code == 200, response.text
    video: dict[str, Any] = response.json()
    return video


async def make(api: Api, worker: Worker, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A finished video."""
    response = await post(api, body)
    assert response.status_code == 200, response.text
    await asyncio.to_thread(worker.draw)
    return await look(api, response.json()["id"])


async def test_video_is_followed_from_queue_to_file(api: Api, worker: Worker) -> None:
    created = await post(api, {"seed": 7, "steps": 2})

    assert created.status_code == 200
    video = created.json()
    job_id = video["id"]
    assert created.headers["location"] == f"http://server/v1/videos/{job_id}"
    assert (video["object"], video["status"], video["progress"], video["model"]) == (
        "video",
        "queued",
        0,
        "clips",
    )
    assert (video["seconds"], video["size"], video["frames"], video["fps"]) == ("1", "32x32", 9, 8)
    assert (video["prompt"], video["seed"], video["steps"]) == ("a red cube", 7, 2)
    assert (video["queue_position"], video["url"], video["error"]) == (0, None, None)
    assert video["eta_s"] > 0

    lease, started = await asyncio.to_thread(worker.start)
    await asyncio.to_thread(worker.queue.extend, {lease: 50})
    running = await look(api, job_id)
    assert (running["status"], running["progress"], running["queue_position"]) == ("in_progress", 50, None)
    assert running["completed_at"] is None

    await asyncio.to_thread(worker.finish, started)
    done = await look(api, job_id)
    assert (done["status"], done["progress"], done["eta_s"]) == ("completed", 100, None)
    assert done["expires_at"] == done["completed_at"] + api.services.settings.result_ttl_s
    assert done["timing_ms"]["denoise"] == 30.0
    content = await api.client.get(done["url"], headers={"accept": "application/binary"})
    assert (content.status_code, content.headers["content-type"]) == (200, "video/mp4")
    assert len(content.content) == done["size_bytes"] == int(content.headers["content-length"])
    assert "immutable" in content.headers["cache-control"]
    assert content.headers["content-disposition"] == f'inline; filename="{job_id}.mp4"'
    assert num_frames(content.content) == 9
    provenance = read_provenance(content.content)
    assert provenance is not None
    assert (provenance.seed, provenance.num_steps, provenance.prompt_sha256) == (
        7,
        2,
        prompt_hash("a red cube"),
    )


async def test_openais_client_makes_polls_downloads_lists_and_deletes(
    api: Api, worker: Worker, client: openai.AsyncOpenAI
) -> None:
    created = await client.videos.create(
        prompt="a red cube",
        model="clips",
        size="32x32",  # type: ignore[arg-type] # it sends any string
        seconds="2",  # type: ignore[arg-type]
        extra_body={"seed": 5, "steps": 1},
    )
    polling = asyncio.create_task(client.videos.poll(created.id))
    await asyncio.to_thread(worker.draw)
    video = await polling

    assert (video.status, video.seconds, video.size, video.progress) == ("completed", "2", "32x32", 100)
    assert video.model_extra is not None
    assert (video.model_extra["seed"], video.model_extra["steps"], video.model_extra["frames"]) == (5, 1, 17)
    content = await client.videos.download_content(video.id)
    assert num_frames(content.content) == 17
    assert [one.id async for one in client.videos.list(limit=1)] == [video.id]
    deleted = await client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    assert [one.id async for one in client.videos.list()] == []
    assert (await look(api, video.id))["status"] == "expired"


async def test_openais_client_is_told_what_is_wrong(
    api: Api, worker: Worker, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as size:
        await client.videos.create(prompt="a red cube", size="1280x720")
    with pytest.raises(openai.UnprocessableEntityError) as file:
        await client.videos.create(prompt="a red cube", input_reference=b"a picture")
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.videos.retrieve("video_123")
    with pytest.raises(openai.NotFoundError) as remix:
        await client.videos.remix("video_123", prompt="a blue cube")

    assert (size.value.code, size.value.param) == ("size_not_served", "size")
    assert "32x32, 32x48" in size.value.message
    assert (file.value.code, file.value.param) == ("unsupported_parameter", "input_reference")
    assert unknown.value.code == "job_not_found"
    assert remix.value.code == "route_not_found"


async def test_first_answer_says_how_often_to_look(api: Api, worker: Worker) -> None:
    created = await post(api)
    slow = worker.manifest.model_copy(update={"latency": []})  # never measured: a second is assumed
    await asyncio.to_thread(worker.queue.beat, worker.info, slow.model_dump_json())

    assert created.headers["openai-poll-after-ms"] == "100"
    looked = await api.client.get(created.headers["location"])
    assert 100 <= int(looked.headers["openai-poll-after-ms"]) <= 1000


@pytest.mark.parametrize(
    ("fields", "frames", "seconds", "size"),
    [
        ({}, 9, "1", "32x32"),
        ({"seconds": "2"}, 17, "2", "32x32"),
        ({"seconds": 2}, 17, "2", "32x32"),
        ({"seconds": 1.125}, 9, "1", "32x32"),
        ({"frames": 17}, 17, "2", "32x32"),
        ({"frames": 17, "seconds": "2", "fps": 8}, 17, "2", "32x32"),
        ({"size": "32x48"}, 9, "1", "32x48"),
    ],
)
async def test_length_and_size_choose_what_the_bundle_has(
    api: Api, worker: Worker, fields: dict[str, Any], frames: int, seconds: str, size: str
) -> None:
    as_json = (await post(api, fields)).json()
    form = {"prompt": (None, "a red cube"), **{name: (None, str(value)) for name, value in fields.items()}}
    as_form = (await api.client.post("/v1/videos", files=form)).json()

    for video in (as_json, as_form):
        assert (video["frames"], video["seconds"], video["size"]) == (frames, seconds, size)


@pytest.mark.parametrize(
    ("fields", "code", "param", "allowed"),
    [
        ({"seconds": "4"}, "length_not_served", "seconds", "1 s (9 frames), 2 s (17 frames)"),
        ({"frames": 10}, "length_not_served", "frames", "1 s (9 frames), 2 s (17 frames)"),
        ({"frames": 9, "seconds": 2}, "length_not_served", "frames", "1 s (9 frames), 2 s (17 frames)"),
        ({"size": "32x48", "seconds": 2}, "length_not_served", "seconds", "1 s (9 frames)"),
        ({"fps": 24}, "fps_not_served", "fps", "8"),
        ({"size": "1280x720"}, "size_not_served", "size", "auto, 32x32, 32x48"),
        ({"steps": 3}, "steps_not_served", "steps", "1, 2, 4"),
        ({"seconds": "long"}, "invalid_value", "seconds", "number"),
        ({"seconds": 0}, "invalid_value", "seconds", "greater than 0"),
        ({"seed": -1}, "invalid_value", "seed", "greater than or equal to 0"),
        ({"prompt": " "}, "invalid_value", "prompt", "at least 1"),
        ({"n": 2}, "unknown_parameter", "n", "not permitted"),
        ({"input_reference": "data"}, "unsupported_parameter", "input_reference", "text alone"),
        ({"model": "scenes"}, "wrong_kind", "model", "POST /v1/images"),
    ],
)
async def test_what_the_bundle_does_not_offer_is_refused_with_what_it_does(
    api: Api, worker: Worker, fields: dict[str, Any], code: str, param: str, allowed: str
) -> None:
    form = {
        "prompt": (None, "a red cube"),
        **{name: (None, str(value)) for name, value in fields.items()},
    }
    for response in (await post(api, fields), await api.client.post("/v1/videos", files=form)):
        assert error_of(response) == (422, code, param)
        assert allowed in response.json()["error"]["message"]
    assert worker.jobs() == []


@pytest.mark.parametrize(
    ("content", "content_type", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_json"),
        (b"[1]", "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"[" * 60_000, "application/json", 400, "invalid_json"),
        (b"{}", "application/json", 422, "missing_parameter"),
        (b"nonsense", "multipart/form-data", 400, "invalid_form"),
        (b"nonsense", "multipart/form-data; boundary=x", 400, "invalid_form"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 422, "missing_parameter"),
        (b"prompt=a", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"a", "text/plain", 415, "unsupported_media_type"),
        (b"x" * 70_000, "multipart/form-data; boundary=x", 413, "body_too_large"),
    ],
)
async def test_bad_bytes_are_a_typed_error(
    api: Api, worker: Worker, content: bytes, content_type: str, status: int, code: str
) -> None:
    response = await api.client.post("/v1/videos", content=content, headers={"content-type": content_type})

    assert error_of(response)[:2] == (status, code)


async def test_page_of_another_site_cannot_send_a_form(api: Api, worker: Worker) -> None:
    """Browsers send forms anywhere, and only before JSON do they ask the server."""
    for site, status in (("cross-site", 415), ("same-site", 415), ("same-origin", 200)):
        response = await api.client.post(
            "/v1/videos", files={"prompt": (None, "a")}, headers={"sec-fetch-site": site}
        )
        assert response.status_code == status


async def test_models_of_either_kind_are_found_without_a_name(api: Api, worker: Worker) -> None:
    video = (await post(api)).json()
    image = (await api.client.post("/v1/images", json={"prompt": "a", "wait_s": 0})).json()

    assert (video["model"], image["model"]) == ("clips", "scenes")
    refused = await api.client.post("/v1/images", json={"prompt": "a", "model": "clips"})
    assert error_of(refused) == (422, "wrong_kind", "model")
    assert "POST /v1/videos" in refused.json()["error"]["message"]
    for path in (
        f"/v1/images/{video['id']}",
        f"/v1/videos/{image['id']}",
        f"/v1/videos/{image['id']}/content",
    ):
        assert error_of(await api.client.get(path)) == (404, "job_not_found", "id")


async def test_server_without_a_video_model_says_so(api: Api) -> None:
    assert error_of(await post(api)) == (404, "model_not_found", "model")
    assert (await api.client.get("/v1/videos")).json()["data"] == []


async def test_video_model_says_what_can_be_asked_of_it(api: Api, worker: Worker) -> None:
    model = (await api.client.get("/v1/models/clips")).json()

    assert {
        "kind": "video",
        "sizes": ["32x32", "32x48"],
        "seconds": ["1", "2"],
        "frames": [9, 17],
        "fps": 8,
    }.items() <= model.items()


# Content


async def test_content_that_is_not_ready_is_a_typed_error(api: Api, worker: Worker) -> None:
    job_id = (await post(api)).json()["id"]

    response = await api.client.get(f"/v1/videos/{job_id}/content")

    assert error_of(response) == (404, "result_not_ready", None)
    assert int(response.headers["retry-after-ms"]) > 0


async def test_content_of_a_failed_video_says_why_it_failed(api: Api, worker: Worker) -> None:
    job_id = (await post(api)).json()["id"]
    await asyncio.to_thread(worker.fail, "out_of_memory")

    video = await look(api, job_id)
    response = await api.client.get(f"/v1/videos/{job_id}/content")

    assert (video["status"], video["error"]) == ("failed", {"code": "out_of_memory", "message": "the reason"})
    assert error_of(response)[:2] == (500, "generation_failed")
    assert "out_of_memory" in response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"


async def test_video_that_is_no_longer_kept_says_expired(api: Api, worker: Worker) -> None:
    video = await make(api, worker)
    (key,) = api.services.store.listing()
    api.services.store.delete(key)

    gone = await look(api, video["id"])
    response = await api.client.get(video["url"])

    assert (gone["status"], gone["url"], gone["size_bytes"]) == ("expired", None, None)
    assert error_of(response)[:2] == (410, "result_expired")


@pytest.mark.parametrize(
    ("header", "first", "last"),
    [
        ("bytes=0-", 0, -1),
        ("bytes=0-0", 0, 0),
        ("bytes=100-199", 100, 199),
        ("bytes=100-999999999", 100, -1),
        ("bytes=-100", -100, -1),
        ("bytes=-999999999", 0, -1),
    ],
)
async def test_part_of_a_video_is_had_by_range(
    api: Api, worker: Worker, header: str, first: int, last: int
) -> None:
    url = (await make(api, worker))["url"]
    whole = await api.client.get(url)
    size = len(whole.content)
    first, last = first % size, last % size

    part = await api.client.get(url, headers={"range": header})

    assert whole.headers["accept-ranges"] == "bytes"
    assert part.status_code == 206
    assert part.content == whole.content[first : last + 1]
    assert part.headers["content-range"] == f"bytes {first}-{last}/{size}"
    assert part.headers["etag"] == whole.headers["etag"]


async def test_range_that_cannot_be_honoured_gets_all_or_a_typed_error(api: Api, worker: Worker) -> None:
    url = (await make(api, worker))["url"]
    whole = await api.client.get(url)

    for header in ("bytes=0-1,5-6", "lines=0-1", "bytes=5-1", "bytes=x-", "bytes=-"):
        ignored = await api.client.get(url, headers={"range": header})
        assert (ignored.status_code, ignored.content) == (200, whole.content)
    other_copy = await api.client.get(url, headers={"range": "bytes=0-9", "if-range": '"other"'})
    assert other_copy.status_code == 200
    same_copy = await api.client.get(url, headers={"range": "bytes=0-9", "if-range": whole.headers["etag"]})
    assert same_copy.status_code == 206
    for header in (f"bytes={len(whole.content)}-", "bytes=-0"):
        beyond = await api.client.get(url, headers={"range": header})
        assert error_of(beyond)[:2] == (416, "range_not_satisfiable")
        assert beyond.headers["content-range"] == f"bytes */{len(whole.content)}"


async def test_client_with_a_good_copy_gets_no_bytes(api: Api, worker: Worker) -> None:
    url = (await make(api, worker))["url"]
    etag = (await api.client.get(url)).headers["etag"]

    response = await api.client.get(url, headers={"if-none-match": etag})

    assert (response.status_code, response.content) == (304, b"")


async def test_variant_that_is_not_there_is_refused(api: Api, worker: Worker) -> None:
    video = await make(api, worker)

    response = await api.client.get(video["url"], params={"variant": "thumbnail"})

    assert error_of(response) == (422, "unsupported_parameter", "variant")
    assert (await api.client.get(video["url"], params={"variant": "video"})).status_code == 200


# Cancel and delete


async def test_queued_video_is_cancelled_at_once_and_counted(api: Api, worker: Worker) -> None:
    job_id = (await post(api)).json()["id"]

    deleted = await api.client.delete(f"/v1/videos/{job_id}")

    assert deleted.json() == {"id": job_id, "object": "video.deleted", "deleted": True}
    video = await look(api, job_id)
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
    assert (await api.client.get("/v1/videos")).json()["data"] == []
    value = api.services.metrics.registry.get_sample_value
    labels = {"class": "clips", "kind": "video", "outcome": "cancelled"}
    assert value("tdm_jobs_total", labels) == 1
    assert error_of(await api.client.get(f"/v1/videos/{job_id}/content"))[:2] == (410, "cancelled")


async def test_running_video_is_told_to_stop_and_its_late_result_counts_for_nothing(
    api: Api, worker: Worker
) -> None:
    job_id = (await post(api)).json()["id"]
    lease, started = await asyncio.to_thread(worker.start)

    await api.client.delete(f"/v1/videos/{job_id}")

    verdicts = await asyncio.to_thread(worker.queue.extend, {lease: 100})
    assert verdicts[lease] == "cancel"
    await asyncio.to_thread(worker.finish, started)  # it was in its last step, and looked too late
    assert worker.settled is Settled.CANCELLED
    video = await look(api, job_id)
    assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")


async def test_deleted_video_is_gone_and_stays_gone(api: Api, worker: Worker) -> None:
    video = await make(api, worker)

    for _ in range(2):
        assert (await api.client.delete(f"/v1/videos/{video['id']}")).status_code == 200

    assert api.services.store.listing() == {}
    gone = await look(api, video["id"])
    assert (gone["status"], gone["url"]) == ("expired", None)
    assert gone["expires_at"] < video["expires_at"]
    assert error_of(await api.client.get(video["url"]))[:2] == (410, "result_expired")
    assert error_of(await api.client.delete("/v1/videos/vid_1")) == (404, "job_not_found", "id")


# Lists


async def test_list_is_read_page_by_page_in_both_orders(
    settings: Settings, valkey_url: str, client: openai.AsyncOpenAI, api: Api, worker: Worker
) -> None:
    ids = [(await make(api, worker))["id"] for _ in range(4)] + [(await post(api)).json()["id"]]
    ids.sort()
    await api.client.post("/v1/images", json={"prompt": "a", "wait_s": 0})

    assert [video.id async for video in client.videos.list(limit=2)] == ids[::-1]
    assert [video.id async for video in client.videos.list(limit=2, order="asc")] == ids
    page = (await api.client.get("/v1/videos", params={"limit": 2, "order": "asc"})).json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == (
        "list",
        ids[0],
        ids[1],
        True,
    )
    last = (await api.client.get("/v1/videos", params={"after": ids[3], "limit": 2, "order": "asc"})).json()
    assert ([video["id"] for video in last["data"]], last["has_more"]) == ([ids[4]], False)
    assert last["data"][0]["status"] == "queued"


async def test_forgotten_videos_leave_the_list(api: Api, worker: Worker) -> None:
    ids = sorted([(await make(api, worker))["id"] for _ in range(3)])
    for job_id in ids[:2]:
        worker.redis.delete(f"q:{{clips}}:j:{job_id}")

    listed = (await api.client.get("/v1/videos", params={"limit": 1, "order": "asc"})).json()

    assert ([video["id"] for video in listed["data"]], listed["has_more"]) == ([ids[2]], False)


@pytest.mark.parametrize(
    ("name", "value"), [("limit", "0"), ("limit", "101"), ("after", "vid_1"), ("order", "up")]
)
async def test_list_refuses_what_it_does_not_have(api: Api, worker: Worker, name: str, value: str) -> None:
    response = await api.client.get("/v1/videos", params={name: value})

    assert error_of(response) == (422, "invalid_value", name)


# Promises that images have, too


async def test_same_key_and_body_is_the_same_video(api: Api, worker: Worker) -> None:
    headers = {"idempotency-key": "k1"}
    first = await post(api, headers=headers)
    as_form = await api.client.post("/v1/videos", files={"prompt": (None, "a red cube")}, headers=headers)
    other = await post(api, {"seed": 1}, headers=headers)
    image = await api.client.post("/v1/images", json={"prompt": "a red cube"}, headers=headers)

    assert as_form.json()["id"] == first.json()["id"]
    assert as_form.headers["idempotent-replayed"] == "true"
    assert error_of(other) == (422, "idempotency_mismatch", "Idempotency-Key")
    assert error_of(image) == (422, "idempotency_mismatch", "Idempotency-Key")
    await asyncio.to_thread(worker.draw)
    assert (await post(api, headers=headers)).json()["status"] == "completed"


async def test_full_queue_refuses_with_a_time_to_come_back(api: Api, worker: Worker) -> None:
    for _ in range(3):
        assert (await post(api)).status_code == 200

    refused = await post(api)

    assert error_of(refused)[:2] == (429, "queue_full")
    assert int(refused.headers["retry-after-ms"]) > 0
    value = api.services.metrics.registry.get_sample_value
    assert value("tdm_jobs_rejected_total", {"class": "clips", "kind": "video", "reason": "queue"}) == 1
    assert (await api.client.post("/v1/images", json={"prompt": "a", "wait_s": 0})).status_code == 202


async def test_videos_have_a_deadline_of_their_own(settings: Settings, valkey_url: str) -> None:
    changed = settings.model_copy(update={"job_deadline_s": 0.001, "video_deadline_s": 3600.0})
    async with running_api(changed) as api:
        worker = Worker(valkey_url, ResultStore(settings.results_url), manifest=make_video_manifest())
        worker.announce()
        assert (await post(api)).status_code == 200
        (job,) = worker.jobs()
        worker.queue.close()
        worker.redis.close()

    assert job.deadline_ms - job.created_ms == 3_600_000


async def test_job_says_what_the_worker_must_know(api: Api, worker: Worker) -> None:
    await post(api, {"seed": 3, "seconds": "2"})

    (job,) = worker.jobs()
    assert isinstance(job, Job)
    assert (job.kind, job.id[:4]) == ("video", "vid_")
    assert job.request == GenerationRequest(
        prompt="a red cube",
        num_samples=1,
        bucket=Bucket(32, 32, 17),
        seed=3,
        num_steps=4,
        output_format="mp4",
        quality=None,
        fps=8,
    )


async def test_openapi_describes_videos(api: Api) -> None:
    document = (await api.client.get("/openapi.json")).json()

    create = document["paths"]["/v1/videos"]["post"]
    assert set(create["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    fields = {"prompt", "seconds", "size", "frames", "fps", "seed", "steps", "model"}
    for described in create["requestBody"]["content"].values():
        assert fields <= described["schema"]["properties"].keys()
    assert {"200", "400", "404", "413", "415", "422", "429", "500", "503"} <= create["responses"].keys()
    for code in ("length_not_served", "fps_not_served", "wrong_kind"):
        assert code in create["responses"]["422"]["description"]
    content = document["paths"]["/v1/videos/{job_id}/content"]["get"]["responses"]
    assert {"200", "206", "304", "404", "410", "416", "422"} <= content.keys()
    assert content["206"]["content"].keys() == {"video/mp4"}
    assert {"get", "delete"} <= document["paths"]["/v1/videos/{job_id}"].keys()
    assert "/v1/videos/{rest}" not in document["paths"]
    assert "HTTPValidationError" not in json.dumps(document)
