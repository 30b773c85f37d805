"""RedisAddress: what TDM_REDIS_URL says, checked before anything connects. Knows no Redis client."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

FORMS = (
    "redis://[user:password@]host[:port][/db]",
    "rediss://... (the same over TLS)",
    "unix://[user:password@]/path[?db=N]",
    "redis+sentinel://[user:password@]host[:port][,host[:port]...]/master[/db]",
    "rediss+sentinel://...",
)
"""What TDM_REDIS_URL may look like."""

REDIS_PORT = 6379
SENTINEL_PORT = 26379

_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_TLS_OPTIONS = (*_TLS_FILES, "ssl_cert_reqs", "ssl_check_hostname")
_SENTINEL_OPTIONS = ("sentinel_username", "sentinel_password")
_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """Where a Redis is and how to get in. Its `str` holds no secret.

    Attributes:
        hosts: (host, port) of the server, or of each Sentinel; empty for a unix socket.
        path: the unix socket, else empty.
        master: the name under which the Sentinels know the primary; empty without Sentinels.
        tls: encrypted, towards Sentinels as well.
        tls_options: `ssl_*` arguments of redis-py; empty without TLS.
        username: None: the server's `default` user.
        sentinel_username: for the Sentinels themselves, which have users of their own.
    """

    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    master: str = ""
    db: int = 0
    tls: bool = False
    tls_options: Mapping[str, str | bool] = field(default_factory=dict)
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        if self.path:
            return self.path
        hosts = ", ".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )
        return f"{self.master!r} of Sentinel {hosts}" if self.master else hosts


def parse_redis_url(url: str) -> RedisAddress:
    """Read a Redis URL strictly: what is not understood is refused, not ignored.

    Raises:
        ValueError: one line on what is wrong and what is allowed, without any part that may be secret.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError(f"not a URL ({error}); allowed are: {', '.join(FORMS)}") from None
    if "cluster" in parts.scheme:
        raise ValueError(
            "Redis Cluster is not served: the queue keeps all of its keys on one primary; allowed are: "
            + ", ".join(FORMS)
        )
    if parts.scheme not in _SCHEMES:
        raise ValueError(f"scheme {parts.scheme!r} is not served; allowed are: {', '.join(FORMS)}")
    _refuse_unescaped(parts)
    credentials, _, place = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    query = _read_query(parts)
    common: dict[str, Any] = {
        "username": unquote(username) or None,
        "password": unquote(password) or None,
        "tls": parts.scheme.startswith("rediss"),
        "tls_options": _tls_options(query) if parts.scheme.startswith("rediss") else {},
        "sentinel_username": query.get("sentinel_username"),
        "sentinel_password": query.get("sentinel_password"),
    }
    segments = [unquote(segment) for segment in parts.path.split("/") if segment]
    if parts.scheme == "unix":
        if place or not segments:
            raise ValueError("the path of the socket must be absolute: unix:///path/to/redis.sock")
        return RedisAddress(path=unquote(parts.path), db=_db(query.get("db", "0")), **common)
    if parts.scheme.endswith("+sentinel"):
        if not 1 <= len(segments) <= 2:
            raise ValueError(f"the path must be the master's name, and a db number or not: {FORMS[3]}")
        hosts = tuple(_host(host, SENTINEL_PORT) for host in place.split(","))
        return RedisAddress(hosts=hosts, master=segments[0], db=_one_db(segments[1:], query), **common)
    if "," in place:
        raise ValueError(f"several hosts are for Sentinel only: {FORMS[3]}")
    if len(segments) > 1:
        raise ValueError("the path must be a db number or nothing")
    return RedisAddress(hosts=(_host(place, REDIS_PORT),), db=_one_db(segments, query), **common)


def _refuse_unescaped(parts: SplitResult) -> None:
    """A password with one of /?# in it splits the URL in the wrong place."""
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError(
            "special characters in user, password or path must be percent-encoded (/ as %2F, ? as %3F, "
            "# as %23, @ as %40)"
        )


def _read_query(parts: SplitResult) -> dict[str, str]:
    """The query's parameters, each known and at home in this scheme."""
    allowed = ["db"]
    if parts.scheme.startswith("rediss"):
        allowed += _TLS_OPTIONS
    if parts.scheme.endswith("+sentinel"):
        allowed += _SENTINEL_OPTIONS
    query: dict[str, str] = {}
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name in _TLS_OPTIONS and name not in allowed:
            raise ValueError(f"parameter {name} needs TLS: rediss:// or rediss+sentinel://")
        if name not in allowed:
            raise ValueError(f"parameter {name!r} is not served; allowed here are: {', '.join(allowed)}")
        if name in query or not value:
            raise ValueError(f"parameter {name} must be given once, with a value")
        query[name] = value
    return query


def _tls_options(query: Mapping[str, str]) -> dict[str, str | bool]:
    """The `ssl_*` parameters, tried on a context so that a wrong file is named now."""
    options: dict[str, str | bool] = {name: query[name] for name in _TLS_FILES if name in query}
    for name, value in options.items():
        if not Path(str(value)).is_file():
            raise ValueError(f"parameter {name}: there is no file {value}")
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise ValueError("parameter ssl_keyfile needs ssl_certfile beside it")
    if (requirement := query.get("ssl_cert_reqs", "required")) not in ("required", "none"):
        raise ValueError("parameter ssl_cert_reqs: allowed are required, none")
    if (check := query.get("ssl_check_hostname", "true").lower()) not in ("true", "false"):
        raise ValueError("parameter ssl_check_hostname: allowed are true, false")
    try:
        context = ssl.create_default_context(cafile=query.get("ssl_ca_certs"))
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"parameter ssl_ca_certs: no certificates can be read from it ({error})") from None
    if "ssl_certfile" in query:
        try:
            # The password: an encrypted key must fail here, not ask on a terminal.
            context.load_cert_chain(query["ssl_certfile"], query.get("ssl_keyfile"), password="")
        except (ssl.SSLError, OSError) as error:
            raise ValueError(
                "parameters ssl_certfile, ssl_keyfile: they must be a certificate and its unencrypted key, "
                f"as PEM ({error})"
            ) from None
    options["ssl_cert_reqs"] = requirement
    options["ssl_check_hostname"] = check == "true" and requirement == "required"
    return options


def _host(place: str, default_port: int) -> tuple[str, int]:
    """`host`, `host:port` or `[v6]:port`."""
    if place.startswith("["):
        host, bracket, rest = place[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError("a host that is an IPv6 address must be in brackets: [::1]:6379")
        port = rest[1:]
    else:
        host, _, port = place.partition(":")
    if not host:
        raise ValueError(f"a host is missing; allowed are: {', '.join(FORMS)}")
    if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ValueError("a port must be a number from 1 to 65535")  # its text may be part of a password
    return unquote(host), int(port or default_port)


def _one_db(segments: list[str], query: Mapping[str, str]) -> int:
    if segments and "db" in query:
        raise ValueError("the db number must be in the path or in the parameter db, not in both")
    return _db(segments[0] if segments else query.get("db", "0"))


def _db(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("the db must be a number, 0 or more")
    return int(text)
