"""Preflight: is the server behind TDM_REDIS_URL one that the queue can trust? Asked when a process starts.

What would otherwise fail in the middle of a request, or lose jobs quietly, becomes one line for the operator.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from typing import Any

import redis
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
    ResponseError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from server.queue.address import FORMS, RedisAddress, parse_redis_url
from server.queue.connection import SOCKET_TIMEOUT_S, connect
from server.queue.keys import FIRST_MODELS_KEY

MIN_REDIS = (7, 0)
MIN_VALKEY = (8, 0)
RETRY_S = 0.5

# Each command that the api and the workers send or call in scripts, as a call on a key that holds a string:
# whoever may make it gets a value or an error about the key's type, whoever may not gets NOPERM.
_CALLS = (
    "ping", "time", "info server", "script load return", "evalsha ab 0",
    "set KEY x PX 60000", "get KEY", "exists KEY",
    "hset KEY f v", "hsetnx KEY f v", "hget KEY f", "hmget KEY f", "hgetall KEY",
    "hincrby KEY f 1", "hdel KEY f", "lpush KEY x", "rpush KEY x", "lpop KEY", "lrem KEY 1 x",
    "zadd KEY 0 m", "zcard KEY", "zpopmin KEY", "zrange KEY 0 0", "zrangebylex KEY - +",
    "zrangebyscore KEY 0 0",
    "zrank KEY m", "zrem KEY m", "zremrangebylex KEY - +", "zremrangebyscore KEY 0 0",
    "zrevrangebylex KEY + -",
    "del KEY", "zcount KEY 0 0", "zscore KEY m",
    "xadd KEY * f v", "xlen KEY", "xdel KEY 0-1", "xread STREAMS KEY 0", "xgroup create KEY g 0",
    "xgroup delconsumer KEY g c", "xreadgroup GROUP g c STREAMS KEY >", "xack KEY g 0-1", "xpending KEY g",
    "xclaim KEY g c 0 0-1", "xautoclaim KEY g c 0 0", "xinfo consumers KEY g",
    "pexpire KEY 1",
)  # fmt: skip
_CONTAINERS = ("script", "xgroup", "xinfo")


def _name(call: str) -> str:
    """The command of a call as ACL rules name it: `xadd`, `xgroup|create`."""
    command, subcommand = call.split()[:2] if " " in call else (call, "")
    return f"{command}|{subcommand}" if command in _CONTAINERS else command


COMMANDS = tuple(sorted(map(_name, _CALLS)))
"""What an ACL must allow the user of the api and the workers, and no more."""

OPERATOR_COMMANDS = ("hkeys", "lpos", "scan", "script|exists", "xinfo|groups", "xrange", "zscan")
"""What `python -m server audit` and `dead` need besides."""

KEY_PATTERN = "q:*"


class UnusableRedisError(ValueError):
    """The URL, or the server it leads to, cannot work; trying again would change nothing."""


class RedisUnreachableError(ConnectionError):
    """No server answers there now; it may later."""


def wait_until_usable(
    url: str, *, patience_s: float, report: Callable[[str], None] = lambda _: None
) -> list[str]:
    """Return once a server that the queue can work with answers.

    Args:
        url: as TDM_REDIS_URL.
        patience_s: how long to wait for a server that does not answer, or still loads its data.
        report: told once why we wait.

    Returns:
        What is risky about the server, a line each.

    Raises:
        UnusableRedisError: wrong URL, credentials, permissions, kind of server, version or eviction policy.
        RedisUnreachableError: it did not answer in time.
    """
    deadline = time.monotonic() + patience_s
    told = False
    while True:
        try:
            return check_server(url)
        except RedisUnreachableError as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                report(f"waiting for Redis: {error}")
                told = True
        time.sleep(RETRY_S)  # another machine's server tells nobody that it is up


def check_server(url: str) -> list[str]:
    """Ask the server once what it is and what it lets us do.

    Returns, raises: as `wait_until_usable`.
    """
    try:
        address = parse_redis_url(url)
    except ValueError as error:
        raise UnusableRedisError(f"TDM_REDIS_URL: {error}") from None
    client = connect(url)
    try:
        info: dict[str, Any] = {}
        for section in ("server", "replication", "cluster", "memory", "persistence"):
            info |= client.info(section)
        refuse_wrong_kind(info, address)
        if missing := _missing_permissions(client):
            user = address.username or "default"
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UnusableRedisError(
                f"Redis at {address}: user {user!r} may not use {', '.join(missing[:5])}{more} "
                f"on {KEY_PATTERN}; allow it with: ACL SETUSER {user} {acl_rules()}"
            )
        _refuse_unfinished_jobs_of_the_first_schema(client, address)
        return _warnings(info, address)
    except RedisError as error:
        raise _explain(error, address) from None
    finally:
        client.close()


def acl_rules() -> str:
    """The rules of `ACL SETUSER` that are enough for the queue."""
    return f"~{KEY_PATTERN} " + " ".join(f"+{command}" for command in COMMANDS)


def refuse_wrong_kind(info: dict[str, Any], address: RedisAddress) -> None:
    """Versions, roles and modes in which the queue would fail later.

    Raises:
        UnusableRedisError: with the way out.
    """
    where = f"Redis at {address}"
    if "sentinel" in (info.get("redis_mode"), info.get("server_mode")):  # Redis's, Valkey's name for it
        raise UnusableRedisError(f"{where} is a Sentinel, which keeps no data; allowed is: {FORMS[3]}")
    if info.get("cluster_enabled") == 1:
        raise UnusableRedisError(
            f"{where} runs in cluster mode, which is not served: the queue keeps all of its keys on one "
            "primary; use a server without cluster-enabled, with Sentinel for failover"
        )
    if info.get("role") == "slave":
        raise UnusableRedisError(f"{where} is a read-only replica; TDM_REDIS_URL must lead to the primary")
    valkey = str(info.get("valkey_version", ""))
    name, version, least = (
        ("Valkey", valkey, MIN_VALKEY) if valkey else ("Redis", str(info.get("redis_version", "")), MIN_REDIS)
    )
    if _numbers(version) < least:
        raise UnusableRedisError(
            f"{where} is {name} {version or 'of an unknown version'}; needed is Redis {_dotted(MIN_REDIS)} "
            f"or Valkey {_dotted(MIN_VALKEY)}, or later"
        )
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction" and info.get("maxmemory", 0) > 0:
        raise UnusableRedisError(
            f"{where} has maxmemory-policy {policy}, which drops jobs when memory is short; "
            "needed is maxmemory-policy noeviction"
        )


def _refuse_unfinished_jobs_of_the_first_schema(client: redis.Redis, address: RedisAddress) -> None:
    """Jobs that were accepted and that nobody would find any more."""
    models: Any = client.hgetall(FIRST_MODELS_KEY)
    num_jobs = sum(int(client.zcard(f"q:{{{model}}}:live")) for model in models)
    if num_jobs:
        raise UnusableRedisError(
            f"Redis at {address} holds {num_jobs} unfinished jobs of a version before 2026-12, "
            "which this one cannot read: end the api processes, let that version's workers finish the jobs, "
            "then start this one"
        )


def _warnings(info: dict[str, Any], address: RedisAddress) -> list[str]:
    """What the operator should know and may have chosen."""
    found = []
    if info.get("aof_enabled") == 0:
        found.append(
            f"Redis at {address} has appendonly off: accepted jobs are lost when it restarts; "
            "set appendonly yes and appendfsync always"
        )
    if info.get("maxmemory_policy", "noeviction") != "noeviction":
        found.append(
            f"Redis at {address} has maxmemory-policy {info['maxmemory_policy']}: harmless while maxmemory "
            "is 0, jobs are dropped once it is not; set maxmemory-policy noeviction"
        )
    if address.tls and address.tls_options.get("ssl_cert_reqs") == "none":
        found.append(f"the certificate of Redis at {address} is not checked (ssl_cert_reqs=none)")
    return found


def _missing_permissions(client: redis.Redis) -> list[str]:
    """Those of COMMANDS that our user may not use on our keys: tried, as looking them up takes rights."""
    key = KEY_PATTERN.replace("*", f"{{preflight}}:{secrets.token_hex(4)}")
    pipeline = client.pipeline(transaction=False)
    for call in _CALLS:
        pipeline.execute_command(*call.replace("KEY", key).split())
    replies = pipeline.execute(raise_on_error=False)
    for call, reply in zip(_CALLS, replies, strict=True):
        if isinstance(reply, ResponseError) and "unknown" in str(reply):
            raise ResponseError(f"{_name(call).upper()} is not known")
    return [
        _name(call).upper().replace("|", " ")
        for call, reply in zip(_CALLS, replies, strict=True)
        if isinstance(reply, NoPermissionError)
    ]


def _explain(error: RedisError, address: RedisAddress) -> Exception:
    """The error in the operator's words; it never holds a secret.

    Returns:
        An UnusableRedisError, or a RedisUnreachableError where waiting may help.
    """
    where, text = f"Redis at {address}", str(error)
    user = address.username or "default"
    if isinstance(error, AuthenticationError | AuthorizationError) or text.startswith("NOAUTH"):
        if "without any password" in text:
            return UnusableRedisError(f"{where} has no password set, but TDM_REDIS_URL gives one")
        if "required" in text or text.startswith("NOAUTH"):
            return UnusableRedisError(f"{where} wants a password: redis://user:password@host")
        return UnusableRedisError(f"{where}: wrong user or password (user {user!r})")
    if isinstance(error, NoPermissionError):
        command = re.search(r"'([\w|]+)' command", text)
        what = command[1].upper().replace("|", " ") if command else f"keys {KEY_PATTERN}"
        rules = acl_rules() + (f" +{command[1]}" if command and command[1] not in COMMANDS else "")
        return UnusableRedisError(
            f"{where}: user {user!r} may not use {what}; allow it with: ACL SETUSER {user} {rules}"
        )
    if isinstance(error, InvalidResponse):
        return UnusableRedisError(f"{where}: what answers there is not a Redis")
    if tls := _tls_trouble(text, address):
        return UnusableRedisError(f"{where}: {tls}")
    if isinstance(error, RedisTimeoutError):
        hint = " (is it a port for TLS?)" if address.tls else ""
        return RedisUnreachableError(f"{where} does not answer within {SOCKET_TIMEOUT_S:g} s{hint}")
    if isinstance(error, ResponseError):
        if "DB index" in text:
            return UnusableRedisError(f"{where} has no db {address.db}")
        return UnusableRedisError(f"{where} refuses: {text}")
    return RedisUnreachableError(f"{where} cannot be reached: {text}{_hint(text, address)}")


_CLIENT_CERTIFICATE = "?ssl_certfile=...&ssl_keyfile=..."


def _hint(text: str, address: RedisAddress) -> str:
    """What a server that hangs up may want; TLS tells it to nobody who lacks it."""
    if not address.path and any(sign in text for sign in ("EOF", "reset by peer", "closed by server")):
        if not address.tls:
            return " (does it want TLS? rediss://)"
        if "ssl_certfile" not in address.tls_options:
            return f" (does it want a client certificate? {_CLIENT_CERTIFICATE})"
    return ""


def _tls_trouble(text: str, address: RedisAddress) -> str:
    """What is wrong about encryption, or nothing."""
    if address.tls:
        if "CERTIFICATE_VERIFY_FAILED" in text:
            reason = re.search(r"certificate verify failed: ([^(\]]+)", text)
            why = reason[1].strip().rstrip(".") if reason else "unknown reason"
            return f"its certificate is not trusted: {why}"
        if "CERTIFICATE_REQUIRED" in text:
            return f"it wants a client certificate: {_CLIENT_CERTIFICATE}"
        if "WRONG_VERSION_NUMBER" in text or "record layer failure" in text:
            return "it does not speak TLS there; use redis:// for an unencrypted port"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)
