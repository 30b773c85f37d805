"""HttpConnection: how the api process reads HTTP/1.1 from a socket."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 20.0
"""From the first moment that a request is expected, or begins, until its head is complete."""


class HttpConnection(H11Protocol):
    """uvicorn's h11 protocol, which closes connections whose client opens them and sends no whole head.

    uvicorn itself limits the time between two requests only. And h11 it must be: httptools hands the bytes
    after the head of a request that offers an upgrade (h2c, as Java's HttpClient does by default) to nobody,
    so its body is lost, and one that arrives later is read as another request.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the next head has begun; else uvicorn's keep-alive limit holds
            self._time_head()

    def _time_head(self) -> None:
        """Run the timer as long as a head is incomplete, from when it was begun."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _give_up(self) -> None:
        self._head_timer = None
        if self.conn.their_state is h11.IDLE:
            self.timeout_keep_alive_handler()
