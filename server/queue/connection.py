"""Redis connections as the queue needs them: text in RESP2 shapes, bounded waits, one quick reconnect."""

from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.retry import Retry

SCHEMES = ("redis", "rediss", "unix")
# Longest reply we wait for; blocking reads must ask for less.
SOCKET_TIMEOUT_S = 5.0


def system_now_ms() -> int:
    """Unix time in ms."""
    return time.time_ns() // 1_000_000


def connect(url: str) -> redis.Redis:
    """A thread-safe client. Connects with the first command.

    Raises:
        ValueError: the URL has no scheme we serve.
    """
    retry = Retry(NoBackoff(), 1)  # one, for connections that a restarted server has closed
    return redis.Redis.from_url(_checked(url), retry=retry, **_options())


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for one event loop.

    Raises:
        ValueError: the URL has no scheme we serve.
    """
    retry = AsyncRetry(NoBackoff(), 1)
    return redis.asyncio.Redis.from_url(_checked(url), retry=retry, **_options())


def _options() -> dict[str, Any]:
    return {
        "decode_responses": True,
        "protocol": 2,  # one shape of stream replies with every version of redis-py and of the server
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
    }


def _checked(url: str) -> str:
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        allowed = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"Redis URL with scheme {scheme!r}: allowed are {allowed}")
    return url
