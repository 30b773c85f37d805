"""HTTP/1.1 on a real socket: upgrades that are offered, heads that do not come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

import server.api.http
from server.api.http import HttpConnection

JAVA = (
    b"POST /first HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABk\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)
"""What Java's HttpClient sends by default."""
PLAIN = b"GET /second HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Recorder:
    """Answers with method, path and body; /slow waits until it is let go."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.called, self.read, self.go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.called.set()
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen.append(f"{scope['method']} {scope['path']}")
        self.read.set()
        if scope["path"] == "/slow":
            await self.go_on.wait()
        answer = f"{scope['path']}:{body.decode()}".encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> bytes:
        """The body of the next response."""
        async with asyncio.timeout(60):
            head = await self.reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            return await self.reader.readexactly(length)

    async def is_closed(self) -> bool:
        """Wait for the end of the connection; False if something is sent first."""
        async with asyncio.timeout(60):
            try:
                return await self.reader.read(1) == b""
            except ConnectionResetError:  # what was sent crossed the end
                return True


@pytest.fixture
def app() -> Recorder:
    return Recorder()


@pytest.fixture
async def client(app: Recorder) -> AsyncIterator[Client]:
    config = uvicorn.Config(app, http=HttpConnection, ws="none", log_config=None, lifespan="off", port=0)
    process = uvicorn.Server(config)
    config.load()
    process.lifespan = config.lifespan_class(config)
    await process.startup()
    port = process.servers[0].sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    yield Client(reader, writer)
    writer.close()
    await process.shutdown()


async def test_body_of_a_request_that_offers_an_upgrade_is_its_own(client: Client, app: Recorder) -> None:
    await client.send(JAVA % 5 + b"hello")
    assert await client.answer() == b"/first:hello"
    await client.send(PLAIN)
    assert await client.answer() == b"/second:"
    assert app.seen == ["POST /first", "GET /second"]


async def test_body_that_comes_later_is_never_a_request(client: Client, app: Recorder) -> None:
    await client.send(JAVA % len(PLAIN))
    await app.called.wait()
    await client.send(PLAIN)
    assert await client.answer() == b"/first:" + PLAIN
    assert app.seen == ["POST /first"]


async def test_offered_websocket_is_a_plain_request(client: Client) -> None:
    upgrade = b"GET /first HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    await client.send(upgrade)
    assert await client.answer() == b"/first:"


@pytest.mark.parametrize("begun", [b"", b"POST /first HT", b"GET /first HTTP/1.1\r\nHost: x\r\n"])
async def test_new_connection_without_a_whole_head_is_closed(
    client: Client, begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.api.http, "HEAD_TIMEOUT_S", 0.01)
    other = Client(*await asyncio.open_connection(*client.writer.get_extra_info("peername")))
    await other.send(begun)
    assert await other.is_closed()
    other.writer.close()


async def test_second_head_that_is_not_finished_closes_the_connection(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        await client.send(PLAIN.replace(b"close", b"keep-alive"))
        assert await client.answer() == b"/second:"
    monkeypatch.setattr(server.api.http, "HEAD_TIMEOUT_S", 0.01)
    await client.send(b"GET /first HTTP/1.1\r\n")
    assert await client.is_closed()


async def test_slow_answer_and_slow_body_are_no_missing_head(
    client: Client, app: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.api.http, "HEAD_TIMEOUT_S", 0.01)
    await client.send(b"POST /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab")
    await asyncio.sleep(0.05)  # longer than a head may take; nothing may happen, so there is no event
    await client.send(b"cd")
    await app.read.wait()
    await asyncio.sleep(0.05)
    app.go_on.set()
    assert await client.answer() == b"/slow:abcd"
