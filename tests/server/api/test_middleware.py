"""Middleware over a bare ASGI application: what happens before and around it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api import middleware
from server.api.middleware import MAX_BODY_BYTES, BodyLimit, RequestContext
from server.metrics import Metrics

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


async def echo_size(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the size of the body that it was given."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(len(body)).encode()})


async def ask(app: ASGIApp, messages: list[Message]) -> tuple[int | None, bytes, dict[bytes, bytes]]:
    """Status, body and headers of the answer to a request that comes in these messages and no more."""
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else await asyncio.Future()

    async def send(message: Message) -> None:
        sent.append(message)

    await app(dict(SCOPE), receive, send)
    if not sent:
        return None, b"", {}
    return sent[0]["status"], b"".join(one.get("body", b"") for one in sent[1:]), dict(sent[0]["headers"])


def chunk(size: int, *, more: bool = True) -> Message:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


async def test_body_arrives_whole_however_it_was_cut() -> None:
    status, body, _ = await ask(BodyLimit(echo_size), [chunk(1000), chunk(1), chunk(0, more=False)])

    assert (status, body) == (200, b"1001")


@pytest.mark.parametrize(("size", "status"), [(MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)])
async def test_limit_is_exact(size: int, status: int) -> None:
    answered, _, _ = await ask(BodyLimit(echo_size), [chunk(size, more=False)])

    assert answered == status


async def test_refused_connection_is_closed_since_more_may_come() -> None:
    _, _, headers = await ask(BodyLimit(echo_size), [chunk(2_000_000)])

    assert headers[b"connection"] == b"close"


async def test_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "BODY_TIMEOUT_S", 0.01)

    status, body, _ = await ask(BodyLimit(echo_size), [chunk(1)])

    assert (status, json.loads(body)["error"]["code"]) == (408, "request_timeout")


async def test_client_that_leaves_within_its_body_is_not_answered() -> None:
    status, _, _ = await ask(BodyLimit(echo_size), [chunk(1), {"type": "http.disconnect"}])

    assert status is None


async def test_exception_after_the_response_began_does_not_start_another() -> None:
    async def breaks(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("in the middle")

    metrics = Metrics()
    status, body, headers = await ask(RequestContext(breaks, metrics), [])

    assert (status, body) == (200, b"")
    assert headers[b"x-request-id"].startswith(b"req_")


async def test_unusual_methods_share_one_label() -> None:
    metrics = Metrics()
    app: Any = RequestContext(echo_size, metrics)
    scope = {**SCOPE, "method": "X" * 50}

    async def receive() -> Message:
        return chunk(0, more=False)

    async def send(message: Message) -> None:
        return

    await app(scope, receive, send)

    labels = {"route": "unmatched", "method": "other", "code": "200"}
    assert metrics.registry.get_sample_value("tdm_http_requests_total", labels) == 1
