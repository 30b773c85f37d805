"""The open loop: its requests come whatever the server does, and what is counted is what came in time."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from PIL import Image

from loadtests import goodput, prompts
from loadtests.client import ROUTE, BadReplyError, LoadClient, Reply
from tests.shared import compiled_bundle

SIZE = (8, 8)


async def offered(
    answer: Callable[[web.Request], Awaitable[web.Response]], *, patience_s: float
) -> list[Reply]:
    """Replies of a server of this process to half a second of 200 requests/s, numbered by their seeds."""
    app = web.Application()
    app.router.add_post(ROUTE, answer)
    async with TestServer(app) as server, LoadClient(str(server.make_url("")), size=SIZE) as client:
        bodies = ({"seed": number} for number in itertools.count())
        return await client.offer(bodies, rate_per_s=200, seconds=0.5, patience_s=patience_s, seed=3)


def plan() -> goodput.Plan:
    return goodput.Plan(
        rates=(4.0,), seconds=2.0, warm_up_s=0.1, slo_s=1.0, patience_s=5.0, size=SIZE, seed=1
    )


def body_of(size: tuple[int, int] = SIZE) -> bytes:
    """What a server answers that has drawn a picture."""
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, format="PNG")
    return json.dumps({"data": [{"b64_json": base64.b64encode(buffer.getvalue()).decode()}]}).encode()


def reply(took_ms: float, status: int = 200) -> Reply:
    return Reply(started_s=0.0, ended_s=took_ms / 1000, status=status, body=body_of())


def test_only_pictures_in_time_count() -> None:
    replies = [
        reply(100),
        reply(999),
        reply(1001),
        reply(5, 429),
        reply(5, 503),
        reply(5, 500),
        reply(9000, 0),
    ]
    step = goodput.judge(replies, plan(), 4.0, cpu_s=0.6, memory_bytes=3 * 2**20)
    assert step.goodput_per_s == 1.0
    assert (step.late, step.refused, step.failed) == pytest.approx((2 / 7, 2 / 7, 1 / 7), abs=1e-4)
    assert (step.p50_ms, step.p99_ms) == (999.0, 1001.0)
    assert (step.cpu_ms_per_picture, step.memory_mib) == (200.0, 3.0)


def test_server_that_draws_nothing_has_no_latency() -> None:
    step = goodput.judge([reply(5, 429)], plan(), 4.0, cpu_s=0.1, memory_bytes=0)
    assert (step.goodput_per_s, step.p50_ms, step.p99_ms, step.cpu_ms_per_picture) == (0.0, None, None, None)


def test_answer_that_is_no_picture_ends_the_measurement() -> None:
    broken = Reply(0.0, 0.1, 200, b"{}")
    with pytest.raises(BadReplyError):
        goodput.judge([broken], plan(), 4.0, cpu_s=0.0, memory_bytes=0)


def test_requests_come_though_none_is_answered() -> None:
    """A closed loop would wait for the first one; here 20 have come before any is let go; one is cut off."""
    came = 0
    all_came = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        nonlocal came
        came += 1
        if came == 20:
            all_came.set()
        await all_came.wait()
        if (await request.json())["seed"] == 3:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=body_of(), content_type="application/json")

    replies = asyncio.run(offered(answer, patience_s=60.0))
    assert len(replies) == came > 20
    assert [one.status for one in replies] == [*[200] * 3, 0, *[200] * (came - 4)]
    starts = [one.started_s for one in replies]
    assert starts == sorted(starts)
    assert 0 < starts[-1] - starts[0] < 0.5


def test_what_is_never_answered_is_given_up() -> None:
    async def answer(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    replies = asyncio.run(offered(answer, patience_s=0.1))
    assert len(replies) > 20
    assert {one.status for one in replies} == {0}
    assert all(one.ended_s - replies[-1].started_s >= 0.1 for one in replies)


def test_moments_depend_on_the_seed_alone() -> None:
    async def starts(seed: int) -> list[float]:
        async with LoadClient("http://127.0.0.1:1", size=SIZE) as client:
            replies = await client.offer(
                prompts.requests(1), rate_per_s=50, seconds=0.2, patience_s=5.0, seed=seed
            )
        return [round(one.started_s - replies[0].started_s, 6) for one in replies]

    first, again, other = (asyncio.run(starts(seed)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.slow
def test_one_command_measures_prints_and_draws(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, out = compiled_bundle(tmp_path_factory), tmp_path / "goodput.json"
    options = ["--bundle", str(bundle), "--out", str(out), "--peers", "--rates", "20", "--seconds", "2"]
    assert goodput.main([*options, "--warm-up", "0.5"]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    (step,) = result["steps"]["tdm-server"]
    assert step["rate_per_s"] == 20
    assert step["failed"] == 0
    assert step["goodput_per_s"] > 0
    assert {"hardware", "versions", "commit", "plan"} <= result.keys()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert re.search(r"tdm-server +20 +\d+\.\d ", printed)
