"""What becomes of a finished video: its bytes, whole and in parts, its place in lists, its end."""

from __future__ import annotations

import asyncio

import openai
import pytest

from server.queue.worker_queue import Settled
from server.settings import Settings
from tests.server.api.running import Api, Worker, error_of
from tests.server.api.videos import look, make, post

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")

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
    (key,) = [key for key in api.services.store.listing() if key.endswith(".mp4")]
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

    response = await api.client.get(video["url"], params={"variant": "gif"})

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
        worker.redis.delete(f"q:2:{{clips}}:j:{job_id}")

    listed = (await api.client.get("/v1/videos", params={"limit": 1, "order": "asc"})).json()

    assert ([video["id"] for video in listed["data"]], listed["has_more"]) == ([ids[2]], False)


@pytest.mark.parametrize(
    ("name", "value"), [("limit", "0"), ("limit", "101"), ("after", "vid_1"), ("order", "up")]
)
async def test_list_refuses_what_it_does_not_have(api: Api, worker: Worker, name: str, value: str) -> None:
    response = await api.client.get("/v1/videos", params={name: value})

    assert error_of(response) == (422, "invalid_value", name)
