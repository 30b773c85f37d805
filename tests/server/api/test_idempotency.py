"""Idempotency-Key over HTTP, with Stripe's semantics: one request, one job, one answer, however often."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from server.api.app import create_app
from server.job import JobStatus
from server.queue.connection import connect
from server.settings import Settings
from server.store import ResultStore
from tests.server.api.running import Api, Worker, error_of, running_api
from tests.server.conftest import poll_async

KEY = {"idempotency-key": "order-1"}


@pytest.fixture
def settings(settings_of_both: Settings) -> Settings:
    return settings_of_both


def replayed(response: httpx.Response) -> bool:
    return response.headers.get("idempotent-replayed") == "true"


async def test_repetition_gets_the_same_answer_and_says_so(api: Api) -> None:
    first = await api.draw({"seed": 7}, headers=KEY)
    again = await api.post({"seed": 7}, headers=KEY)

    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json() == first.json()
    assert (replayed(first), replayed(again)) == (False, True)
    assert len(api.worker.jobs()) == 1


async def test_repetition_attaches_to_the_job_that_runs(api: Api) -> None:
    first, second = (asyncio.create_task(api.post({"seed": None}, headers=KEY)) for _ in range(2))
    await asyncio.to_thread(api.worker.draw)

    one, other = await first, await second
    assert one.json()["id"] == other.json()["id"]
    assert one.json() == other.json()
    assert {replayed(one), replayed(other)} == {False, True}


async def test_repetition_that_does_not_wait_gets_the_job_as_it_stands(api: Api) -> None:
    first = await api.post({"wait_s": 0}, headers=KEY)
    again = await api.post({"wait_s": 0}, headers=KEY)

    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json()["id"] == again.json()["id"]


async def test_repetition_through_another_api_process_waits_for_the_same_job(
    api: Api, settings: Settings
) -> None:
    first = await api.post({"wait_s": 0}, headers=KEY)
    async with running_api(settings) as other:  # the first one may be dead by now
        again, _ = await asyncio.gather(other.post(headers=KEY), asyncio.to_thread(api.worker.draw))

    assert again.status_code == 200
    assert again.json()["id"] == first.json()["id"]
    assert replayed(again)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("generation_failed", 500),
        ("poison", 500),
        ("deadline", 504),
        ("out_of_memory", 500),
    ],
)
async def test_stored_failure_is_the_answer_to_every_repetition(api: Api, code: str, status: int) -> None:
    first, _ = await asyncio.gather(api.post(headers=KEY), asyncio.to_thread(api.worker.fail, code))
    again = await api.post(headers=KEY)

    assert (first.status_code, again.status_code) == (status, status)
    assert again.json() == first.json()
    assert (replayed(first), replayed(again)) == (False, True)
    assert len(api.worker.jobs()) == 1


async def test_failure_that_asks_for_another_try_is_no_answer_for_ever(api: Api) -> None:
    first, _ = await asyncio.gather(api.post(headers=KEY), asyncio.to_thread(api.worker.fail, "storage"))
    assert error_of(first) == (503, "store_unavailable", None)

    again = await api.draw(headers=KEY)
    once_more = await api.post(headers=KEY)
    assert (again.status_code, replayed(again)) == (200, False)
    assert (once_more.json(), replayed(once_more)) == (again.json(), True)
    assert len(api.worker.jobs()) == 2


@pytest.mark.parametrize(
    "other",
    [{"prompt": "a blue cube"}, {"seed": 8}, {"n": 2}, {"steps": 2}, {"output_format": "jpeg"}],
)
async def test_same_key_with_another_body_is_refused_and_never_409(
    api: Api, other: Mapping[str, Any]
) -> None:
    await api.post({"wait_s": 0, "seed": 7}, headers=KEY)
    refused = await api.post({"wait_s": 0, "seed": 7, **other}, headers=KEY)

    assert error_of(refused) == (422, "idempotency_mismatch", "Idempotency-Key")
    assert not replayed(refused)
    assert len(api.worker.jobs()) == 1


async def test_defaults_spelled_out_are_the_same_body(api: Api) -> None:
    first = await api.post({"wait_s": 0}, headers=KEY)
    job = first.json()
    again = await api.post(
        {
            "wait_s": 0,
            "model": job["model"],
            "n": job["n"],
            "size": job["size"],
            "steps": job["steps"],
            "output_format": job["output_format"],
            "response_format": "b64_json",
        },
        headers=KEY,
    )

    assert again.json()["id"] == job["id"]


async def test_key_is_one_key_for_all_models(api: Api, settings: Settings) -> None:
    other = Worker(settings.redis_url, ResultStore(settings.results_url), model="other")
    other.announce()
    first = await api.post({"wait_s": 0, "model": "other"}, headers=KEY)
    refused = await api.post({"wait_s": 0, "model": "scenes"}, headers=KEY)
    again = await api.post({"wait_s": 0, "model": "other"}, headers=KEY)

    assert error_of(refused) == (422, "idempotency_mismatch", "Idempotency-Key")
    assert again.json()["id"] == first.json()["id"]
    other.queue.close()
    other.redis.close()


async def test_request_without_a_model_is_the_same_when_another_model_is_the_default_now(
    api: Api, settings: Settings
) -> None:
    first = await api.post({"wait_s": 0}, headers=KEY)
    other = Worker(settings.redis_url, ResultStore(settings.results_url), model="another")
    other.announce()  # the first by name among those that live
    await api.services.catalog.models(max_age_s=0)
    fresh = await api.post({"wait_s": 0})
    again = await api.post({"wait_s": 0}, headers=KEY)
    mismatch = await api.post({"wait_s": 0, "seed": 1}, headers=KEY)

    assert fresh.json()["model"] == "another"
    assert (again.json()["id"], again.json()["model"]) == (first.json()["id"], "scenes")
    assert error_of(mismatch)[:2] == (422, "idempotency_mismatch")
    other.queue.close()
    other.redis.close()


async def test_refused_request_leaves_its_key_free(api: Api, settings: Settings) -> None:
    invalid = await api.post({"wait_s": 0, "steps": 99}, headers=KEY)
    assert invalid.status_code == 422
    for seed in range(settings.max_queue):
        await api.post({"wait_s": 0, "seed": seed})
    full = await api.post({"wait_s": 0}, headers=KEY)
    assert error_of(full)[:2] == (429, "queue_full")
    assert not any("idem" in key or ":i:" in key for key in api.worker.redis.keys("q*"))

    await asyncio.to_thread(api.worker.draw)
    await api.services.catalog.models(max_age_s=0)
    accepted = await api.post({"wait_s": 0, "prompt": "something else"}, headers=KEY)

    assert accepted.status_code == 202
    assert not replayed(accepted)


async def test_known_key_finds_its_job_when_no_new_one_is_admitted(api: Api, settings: Settings) -> None:
    first = await api.post({"wait_s": 0}, headers=KEY)
    for seed in range(settings.max_queue - 1):
        await api.post({"wait_s": 0, "seed": seed})
    await api.services.catalog.models(max_age_s=0)
    again = await api.post({"wait_s": 0}, headers=KEY)

    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])


async def test_new_key_is_no_way_around_admission(redis_url: str, tmp_path: Path) -> None:
    # No job can be finished in so short a time: admission refuses each, and a key changes nothing about it.
    settings = Settings(redis_url=redis_url, data_dir=tmp_path, job_deadline_s=0.001)
    async with running_api(settings) as api:
        api.worker.announce()
        plain = await api.post({"wait_s": 0})
        keyed = await api.post({"wait_s": 0}, headers=KEY)

        assert error_of(plain) == error_of(keyed) == (429, "queue_full", None)
        assert api.worker.jobs() == []


@pytest.mark.parametrize("key", ["", "k" * 256, "two words", "schlüssel"])
async def test_key_that_is_none_is_refused(api: Api, key: str) -> None:
    response = await api.post(headers={"idempotency-key": key.encode()})

    assert error_of(response) == (400, "invalid_header", "Idempotency-Key")


class TestOpenAiClient:
    """The official client, over real connections."""

    @asynccontextmanager
    async def served(self, settings: Settings) -> AsyncIterator[int]:
        """An api process's HTTP server; its port."""
        config = uvicorn.Config(create_app(settings), port=0, log_config=None)
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())

        async def started() -> bool:
            return server.started

        await poll_async(started)
        yield server.servers[0].sockets[0].getsockname()[1]
        server.should_exit = True
        await running

    @asynccontextmanager
    async def losing_first_answer(self, port: int, worker: Worker) -> AsyncIterator[int]:
        """A proxy that cuts its first connection once the server has the job; its port."""
        connections = 0

        async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65_536):
                writer.write(data)
            writer.close()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            first = connections == 1
            there, back = await asyncio.open_connection("127.0.0.1", port)
            forward = asyncio.create_task(pipe(reader, back))
            if first:
                await asyncio.to_thread(worker.wait_for_jobs)
                writer.transport.abort()
                back.transport.abort()
            else:
                await pipe(there, writer)
            forward.cancel()
            await asyncio.gather(forward, return_exceptions=True)
            back.close()

        async with await asyncio.start_server(handle, "127.0.0.1", 0) as proxy:
            yield proxy.sockets[0].getsockname()[1]
            assert connections >= 2, "the client did not come back"

    async def test_answer_that_got_lost_is_fetched_by_the_client_s_own_retry(
        self, settings: Settings
    ) -> None:
        worker = Worker(settings.redis_url, ResultStore(settings.results_url))
        worker.announce()
        async with self.served(settings) as port, self.losing_first_answer(port, worker) as lossy:
            async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{lossy}/v1", api_key="x") as client:
                asking = asyncio.create_task(
                    client.images.generate(prompt="a red cube", model="scenes", extra_headers=KEY)
                )
                drawn = await asyncio.to_thread(worker.draw)
                answer = await asking
            assert answer.data is not None
            assert len(answer.data) == 1
            assert answer.model_extra is not None
            assert answer.model_extra["id"] == drawn.id
            assert [job.status for job in worker.jobs()] == [JobStatus.DONE]
        worker.queue.close()
        worker.redis.close()

    async def test_mismatch_is_an_error_of_its_own_and_not_tried_again(self, settings: Settings) -> None:
        worker = Worker(settings.redis_url, ResultStore(settings.results_url))
        worker.announce()
        async with (
            self.served(settings) as port,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x") as client,
        ):
            first, _ = await asyncio.gather(
                client.images.with_raw_response.generate(
                    prompt="a red cube", model="scenes", extra_headers=KEY
                ),
                asyncio.to_thread(worker.draw),
            )
            again = await client.images.with_raw_response.generate(
                prompt="a red cube", model="scenes", extra_headers=KEY
            )
            with pytest.raises(openai.UnprocessableEntityError) as caught:
                await client.images.generate(prompt="a dog", model="scenes", extra_headers=KEY)
        assert first.text == again.text
        assert again.headers["idempotent-replayed"] == "true"
        assert caught.value.code == "idempotency_mismatch"
        retries = caught.value.request.headers["x-stainless-retry-count"]
        assert retries == "0"
        with connect(settings.redis_url) as client_:
            assert len(client_.keys("q:2:{scenes}:j:*")) == 1
        worker.queue.close()
        worker.redis.close()
