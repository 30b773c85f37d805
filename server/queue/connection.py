"""Redis connections as the queue needs them: text in RESP2 shapes, bounded waits, one quick reconnect."""

from __future__ import annotations

from typing import Any

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import HiredisRespSerializer
from redis.retry import Retry
from redis.typing import EncodableT

from server.queue.address import RedisAddress, parse_redis_url

# Longest reply we wait for; blocking reads must ask for less.
SOCKET_TIMEOUT_S = 5.0
# A Sentinel that is gone must not keep us from asking the next one.
SENTINEL_TIMEOUT_S = 2.0


def connect(url: str) -> redis.Redis:
    """A thread-safe client. Connects with the first command; behind Sentinel, to whoever is primary then.

    Raises:
        ValueError: the URL is not one that we serve (`server.queue.address`).
    """
    address = parse_redis_url(url)
    options = _options(address) | {"retry": Retry(NoBackoff(), 1)}  # one, for what a restart has closed
    if address.master:
        sentinel: redis.sentinel.Sentinel = _Sentinel(address)
        client: redis.Redis = sentinel.master_for(
            address.master, connection_pool_class=_SentinelPool, **options
        )
        return client
    kind = (
        redis.UnixDomainSocketConnection
        if address.path
        else redis.SSLConnection
        if options.pop("ssl")
        else redis.Connection
    )
    return redis.Redis.from_pool(redis.ConnectionPool(kind, **options))


def connect_async(url: str) -> redis.asyncio.Redis:
    """The same for one event loop.

    Raises:
        ValueError: the URL is not one that we serve (`server.queue.address`).
    """
    address = parse_redis_url(url)
    options = _options(address) | {"retry": AsyncRetry(NoBackoff(), 1)}
    if address.master:
        sentinel: redis.asyncio.sentinel.Sentinel = _AsyncSentinel(address)
        client: redis.asyncio.Redis = sentinel.master_for(
            address.master, connection_pool_class=_AsyncSentinelPool, **options
        )
        return client
    kind = _AsyncUnix if address.path else _AsyncTls if options.pop("ssl") else _AsyncTcp
    return redis.asyncio.Redis.from_pool(redis.asyncio.ConnectionPool(kind, **options))


class _Packing:
    """Commands in their wire form by hiredis. redis-py has it do so for threads, and does it in Python for an
    event loop, at a fifth of what a job costs the api process.
    """

    _serializer = HiredisRespSerializer()

    def pack_command(self, *args: EncodableT) -> list[bytes]:
        packed: list[bytes] = self._serializer.pack(*args)  # type: ignore[arg-type] # it takes any number
        return packed


class _AsyncTcp(_Packing, redis.asyncio.Connection):
    pass


class _AsyncTls(_Packing, redis.asyncio.SSLConnection):
    pass


class _AsyncUnix(_Packing, redis.asyncio.UnixDomainSocketConnection):
    pass


class _Sentinel(redis.sentinel.Sentinel):
    """Says briefly that no primary is known; redis-py's own message has every argument of every client."""

    def __init__(self, address: RedisAddress) -> None:
        # No second try at one that is gone: redis-py would wait seconds for it, and the next one answers now.
        options = _sentinel_options(address) | {"retry": Retry(NoBackoff(), 0)}
        redis.sentinel.Sentinel.__init__(self, address.hosts, sentinel_kwargs=options)

    def discover_master(self, service_name: str) -> tuple[str, int]:
        try:
            found: tuple[str, int] = redis.sentinel.Sentinel.discover_master(self, service_name)
        except redis.sentinel.MasterNotFoundError:
            raise redis.sentinel.MasterNotFoundError(_no_master(service_name)) from None
        return found


class _AsyncSentinel(redis.asyncio.sentinel.Sentinel):
    """The same for one event loop."""

    def __init__(self, address: RedisAddress) -> None:
        options = _sentinel_options(address) | {"retry": AsyncRetry(NoBackoff(), 0)}
        redis.asyncio.sentinel.Sentinel.__init__(self, address.hosts, sentinel_kwargs=options)

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        try:
            found: tuple[str, int] = await super().discover_master(service_name)
        except redis.asyncio.sentinel.MasterNotFoundError:
            raise redis.asyncio.sentinel.MasterNotFoundError(_no_master(service_name)) from None
        return found


def _no_master(name: str) -> str:
    return f"no Sentinel knows a live master {name!r} now"


class _SentinelPool(redis.sentinel.SentinelConnectionPool):
    """Ends the connections to the Sentinels with its own."""

    def disconnect(self, inuse_connections: bool = True) -> None:
        super().disconnect(inuse_connections)
        if inuse_connections:  # else it only lets go of the former primary
            for sentinel in self.sentinel_manager.sentinels:
                sentinel.close()


class _AsyncSentinelPool(redis.asyncio.sentinel.SentinelConnectionPool):
    """The same for one event loop."""

    async def aclose(self) -> None:
        await super().aclose()
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.aclose()


def _options(address: RedisAddress) -> dict[str, Any]:
    """Arguments of a connection to the server itself."""
    options: dict[str, Any] = {
        "decode_responses": True,
        "protocol": 2,  # one shape of stream replies with every version of redis-py and of the server
        "socket_timeout": SOCKET_TIMEOUT_S,
        "socket_connect_timeout": SOCKET_TIMEOUT_S,
        "username": address.username,
        "password": address.password,
        "db": address.db,
    }
    if address.path:
        return options | {"path": address.path}
    options |= {"ssl": address.tls, **address.tls_options}
    if not address.master:
        options["host"], options["port"] = address.hosts[0]
    return options


def _sentinel_options(address: RedisAddress) -> dict[str, Any]:
    """Arguments of a client of one Sentinel."""
    return {
        "decode_responses": True,
        "protocol": 2,
        "socket_timeout": SENTINEL_TIMEOUT_S,
        "socket_connect_timeout": SENTINEL_TIMEOUT_S,
        "username": address.sentinel_username,
        "password": address.sentinel_password,
        "ssl": address.tls,
        **address.tls_options,
    }
