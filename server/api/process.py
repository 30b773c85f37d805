"""The api process: its socket, its server, its end."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from server.api.app import create_app
from server.api.http import HttpConnection
from server.metrics import Metrics
from server.scrape import start_metrics_server
from server.settings import Settings

DRAIN_WAIT_S = 3.0
LINGER_S = 1.0
SHUTDOWN_GRACE_S = 5
KEEP_ALIVE_S = 75


def serve(settings: Settings) -> int:
    """Run one api process until SIGTERM or SIGINT, with its metrics on a port of their own.

    Raises:
        ValueError: `redis_url` is empty.
        OSError: the port is in use.
    """
    if not settings.redis_url:
        raise ValueError("TDM_REDIS_URL is empty; only `python -m server up` starts a Valkey of its own")
    metrics = Metrics()
    scrape = start_metrics_server(metrics, settings.host, settings.metrics_port)
    try:
        _ApiServer(create_app(settings, metrics=metrics)).run(sockets=[_listener(settings)])
    finally:
        if scrape:
            scrape.close()
    return 0


class _ApiServer(uvicorn.Server):
    """uvicorn, which ends so that no client notices, as long as another process takes over its socket."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                self._respond,
                interface="asgi3",  # uvicorn does not recognise a bound method as what it is
                http=HttpConnection,
                ws="none",  # nothing here is a WebSocket: who offers one gets a plain answer
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
            )
        )
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's signature)
        """First signal: accept no more, answer what waits. Second: end now. Either way with status 0."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        with suppress(RuntimeError, AttributeError):  # not yet running: nobody waits
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, DRAIN_WAIT_S, self._app.state.services.draining.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening at once, but leave clients a moment to learn from a response that they must
        reconnect.

        uvicorn alone would close every connection without a request, also one whose request is on its way.
        """
        for server in self.servers:
            server.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self.server_state.connections and not self.force_exit:  # noqa: ASYNC110 - no event to await
                    await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application; once this process is to end, its responses close their connections."""

        async def send_and_close(message: Message) -> None:
            if self.should_exit and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_and_close)


def _listener(settings: Settings) -> socket.socket:
    """The supervisor's listening socket, or one of our own."""
    if settings.listen_fd is not None:
        return socket.socket(fileno=settings.listen_fd)
    return socket.create_server((settings.host, settings.port))
