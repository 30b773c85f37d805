"""`/v1/videos` over a real Valkey and a real store. The test plays the worker: nothing is left to timing."""

from __future__ import annotations

import asyncio
import io
import json
from typing import Any

import openai
import pytest
from PIL import Image

from engines.bundle.bucket import Bucket
from server.job import GenerationRequest, Job
from server.settings import Settings
from server.store import ResultStore
from server.worker.packing import prompt_hash, read_provenance
from tests.server.api.running import Api, Worker, error_of, running_api
from tests.server.api.videos import look, make, num_frames, post
from tests.server.manifests import make_video_manifest

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


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
        await client.videos.remix("vid_123", prompt="a blue cube")

    assert (size.value.code, size.value.param) == ("size_not_served", "size")
    assert "32x32, 32x48" in size.value.message
    assert (file.value.code, file.value.param) == ("unsupported_parameter", "input_reference")
    assert unknown.value.code == "job_not_found"
    assert remix.value.code == "job_not_found"


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
    for path in ("/v1/videos", "/v1/videos/{job_id}/remix"):
        described_errors = document["paths"][path]["post"]["responses"]["422"]["description"]
        for code in ("length_not_served", "fps_not_served", "wrong_kind"):
            assert code in described_errors
    content = document["paths"]["/v1/videos/{job_id}/content"]["get"]["responses"]
    assert {"200", "206", "304", "404", "410", "416", "422"} <= content.keys()
    assert content["206"]["content"].keys() == {"video/mp4", "video/webm", "image/webp", "image/jpeg"}
    assert {"get", "delete"} <= document["paths"]["/v1/videos/{job_id}"].keys()
    assert "/v1/videos/{rest}" not in document["paths"]
    assert "HTTPValidationError" not in json.dumps(document)


async def test_poll_asks_the_store_for_the_video_alone(
    api: Api, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = await make(api, worker)
    asked: list[str] = []
    exists = ResultStore.exists

    def note(store: ResultStore, key: str) -> bool:
        asked.append(key)
        return exists(store, key)

    monkeypatch.setattr(ResultStore, "exists", note)
    assert (await look(api, video["id"]))["status"] == "completed"
    assert [key.rpartition(".")[2] for key in asked] == ["mp4"]


async def test_video_comes_with_a_thumbnail_and_a_sheet_of_its_frames(api: Api, worker: Worker) -> None:
    job_id = (await post(api)).json()["id"]
    url = f"/v1/videos/{job_id}/content"
    await asyncio.to_thread(worker.draw)

    video, thumbnail, sheet = [
        await api.client.get(url, params={"variant": variant})
        for variant in ("video", "thumbnail", "spritesheet")
    ]
    assert video.content == (await api.client.get(url)).content
    assert (thumbnail.status_code, thumbnail.headers["content-type"]) == (200, "image/webp")
    assert picture_of(thumbnail.content).size == (32, 32)
    assert (sheet.status_code, sheet.headers["content-type"]) == (200, "image/jpeg")
    assert picture_of(sheet.content).size == (3 * 32, 3 * 32)
    assert len({answer.headers["etag"] for answer in (video, thumbnail, sheet)}) == 3
    for answer in (thumbnail, sheet):
        provenance = read_provenance(answer.content)
        assert provenance is not None
        assert provenance.prompt_sha256 == prompt_hash("a red cube")

    wrong = await api.client.get(url, params={"variant": "gif"})
    assert error_of(wrong) == (422, "unsupported_parameter", "variant")
    await api.client.delete(f"/v1/videos/{job_id}")
    assert api.services.store.listing() == {}


async def test_video_is_webm_where_that_is_asked_for(api: Api, worker: Worker) -> None:
    created = (await post(api, {"output_format": "webm"})).json()
    await asyncio.to_thread(worker.draw)
    done = await look(api, created["id"])
    content = await api.client.get(done["url"])
    assert (created["output_format"], content.headers["content-type"]) == ("webm", "video/webm")
    assert content.headers["content-disposition"] == f'inline; filename="{done["id"]}.webm"'
    assert num_frames(content.content) == 9
    remix = await api.client.post(f"/v1/videos/{done['id']}/remix", json={"prompt": "a cube"})
    assert remix.json()["output_format"] == "webm"

    refused = await post(api, {"output_format": "gif"})
    assert error_of(refused) == (422, "invalid_value", "output_format")


async def test_video_of_a_worker_that_made_no_previews_says_so(api: Api, worker: Worker) -> None:
    worker.makes_previews = False
    job_id = (await post(api)).json()["id"]
    await asyncio.to_thread(worker.draw)
    url = f"/v1/videos/{job_id}/content"
    assert (await api.client.get(url)).status_code == 200
    missing = await api.client.get(url, params={"variant": "thumbnail"})
    assert error_of(missing) == (404, "variant_not_found", "variant")


async def test_remix_takes_all_but_the_prompt_from_a_video(
    api: Api, worker: Worker, client: openai.AsyncOpenAI
) -> None:
    first = (await post(api, {"seed": 7, "steps": 2, "size": "32x32", "seconds": 2})).json()
    remix = await client.videos.remix(first["id"], prompt="a blue cube")  # a form; the first is still queued

    assert remix.remixed_from_video_id == first["id"] != remix.id
    again = await look(api, remix.id)
    assert again["prompt"] == "a blue cube"
    same = ("model", "size", "seconds", "frames", "fps", "seed", "steps")
    assert [again[name] for name in same] == [first[name] for name in same]
    assert first["remixed_from_video_id"] is None

    url, body = f"/v1/videos/{first['id']}/remix", {"prompt": "a blue cube"}
    keyed = [await api.client.post(url, json=body, headers={"idempotency-key": "a-key"}) for _ in range(2)]
    assert len({answer.json()["id"] for answer in keyed}) == 1
    assert keyed[0].headers["location"].endswith(keyed[0].json()["id"])
    # asked for in full it is another request: it would not say what it was made from
    asked = {**body, **{name: first[name] for name in ("model", "size", "frames", "seed", "steps")}}
    plain = await api.client.post("/v1/videos", json=asked, headers={"idempotency-key": "a-key"})
    assert error_of(plain) == (422, "idempotency_mismatch", "Idempotency-Key")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "missing_parameter", "prompt"),
        ({"prompt": "  "}, "invalid_value", "prompt"),
        ({"prompt": "a cube", "seed": 7}, "unknown_parameter", "seed"),
        ({"prompt": 7}, "invalid_value", "prompt"),
    ],
)
async def test_remix_takes_a_prompt_and_nothing_else(
    body: dict[str, Any], code: str, param: str, api: Api, worker: Worker
) -> None:
    first = (await post(api)).json()
    refused = await api.client.post(f"/v1/videos/{first['id']}/remix", json=body)
    assert error_of(refused) == (422, code, param)
    assert len(worker.jobs()) == 1


async def test_remix_of_a_picture_or_of_nothing_is_not_found(api: Api, worker: Worker) -> None:
    for job_id in ("vid_0123456789ab0123456789abcdef01234567", "img_0123456789ab0123456789abcdef01234567"):
        refused = await api.client.post(f"/v1/videos/{job_id}/remix", json={"prompt": "a cube"})
        assert error_of(refused) == (404, "job_not_found", "id")


def picture_of(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))
