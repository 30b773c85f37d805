"""Ready: the one line that people and scripts wait for."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from server.supervisor.report import say

READY_CHECK_S = 0.25
READY_REMINDER_S = 15.0
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared with, not bound to)


async def announce(listener: socket.socket, *, num_workers: Callable[[], int]) -> None:
    """Print the one line that people and scripts wait for, once `num_workers` workers are up."""
    waited_s = 0.0
    reminder_s = READY_REMINDER_S
    while True:
        readiness = await fetch_readiness(listener)
        models = readiness.get("models", {})
        live = sum(model["workers"] for model in models.values())
        if live >= num_workers() > 0:
            break
        if waited_s >= reminder_s:
            say(f"waiting: {live} of {num_workers()} workers are up")
            reminder_s += READY_REMINDER_S
        await asyncio.sleep(READY_CHECK_S)
        waited_s += READY_CHECK_S
    for model in models.values():
        for warning in model["warnings"]:
            say(f"warning: {warning}")
    say(describe_ready(url_of(listener), models))


def describe_ready(url: str, models: dict[str, Any]) -> str:
    """`ready: http://127.0.0.1:8000 (model scenes, 2 workers, aotinductor)`."""
    names = ", ".join(sorted(models))
    num_workers = sum(model["workers"] for model in models.values())
    backends = ", ".join(sorted({backend for model in models.values() for backend in model["backends"]}))
    return (
        f"ready: {url} (model{'s' * (len(models) > 1)} {names}, "
        f"{num_workers} worker{'s' * (num_workers > 1)}, {backends})"
    )


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds the listener."""
    host, port = listener.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def fetch_readiness(listener: socket.socket) -> dict[str, Any]:
    """The api's `/readyz` body; empty while it does not answer."""
    host, port = listener.getsockname()[:2]
    with suppress(OSError, ValueError, TimeoutError):
        async with asyncio.timeout(READY_REMINDER_S):
            reader, writer = await asyncio.open_connection(ANY_ADDRESS.get(host, host), port)
            try:
                writer.write(b"GET /readyz HTTP/1.0\r\nhost: supervisor\r\n\r\n")
                reply = await reader.read()
            finally:
                writer.close()
        body: dict[str, Any] = json.loads(reply.partition(b"\r\n\r\n")[2])
        return body
    return {}
