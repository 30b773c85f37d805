"""TDM_REDIS_URL is read strictly, and no refusal shows a secret."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from server.queue.address import parse_redis_url


def test_plain_url_has_a_default_port_and_db() -> None:
    address = parse_redis_url("redis://cache.example")

    assert (address.hosts, address.db, address.tls) == ((("cache.example", 6379),), 0, False)
    assert (address.username, address.password) == (None, None)


def test_user_password_port_and_db_are_read_and_unescaped() -> None:
    address = parse_redis_url("redis://tdm:p%40ss%2Fw%23rd@cache.example:7000/3")

    assert (address.username, address.password) == ("tdm", "p@ss/w#rd")
    assert (address.hosts, address.db) == ((("cache.example", 7000),), 3)


def test_password_alone_is_the_default_user_s() -> None:
    address = parse_redis_url("redis://:secret@cache.example")

    assert (address.username, address.password) == (None, "secret")


def test_unix_socket_has_its_db_in_the_query() -> None:
    address = parse_redis_url("unix://tdm:secret@/run/my%20redis.sock?db=2")

    assert (address.path, address.db, address.username) == ("/run/my redis.sock", 2, "tdm")


def test_sentinels_have_a_port_of_their_own_and_a_user_of_their_own() -> None:
    address = parse_redis_url(
        "redis+sentinel://tdm:secret@a.example,b.example:5000,[::1]/mymaster/1?sentinel_password=other"
    )

    assert address.hosts == (("a.example", 26379), ("b.example", 5000), ("::1", 26379))
    assert (address.master, address.db) == ("mymaster", 1)
    assert (address.password, address.sentinel_password) == ("secret", "other")


def test_tls_checks_certificate_and_name_unless_told_otherwise(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(authority)

    strict = parse_redis_url(f"rediss://cache.example?ssl_ca_certs={authority}")
    loose = parse_redis_url("rediss+sentinel://cache.example/mymaster?ssl_cert_reqs=none")
    nameless = parse_redis_url("rediss://cache.example?ssl_check_hostname=false")

    assert strict.tls_options == {
        "ssl_ca_certs": str(authority),
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
    }
    assert loose.tls_options == {"ssl_cert_reqs": "none", "ssl_check_hostname": False}
    assert nameless.tls_options == {"ssl_cert_reqs": "required", "ssl_check_hostname": False}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://cache.example", "scheme 'http' is not served; allowed are: redis://"),
        ("cache.example:6379", "allowed are: redis://"),
        ("redis+cluster://a.example,b.example", "Redis Cluster is not served"),
        ("rediss+cluster://a.example", "Redis Cluster is not served"),
        ("redis://", "a host is missing"),
        ("redis:///0", "a host is missing"),
        ("redis://[::1", "not a URL"),
        ("redis://[::1]6379", "must be in brackets"),
        ("redis://cache.example:0", "port must be a number from 1 to 65535"),
        ("redis://cache.example:SECRET", "port must be a number from 1 to 65535"),
        ("redis://cache.example/SECRET", "db must be a number"),
        ("redis://cache.example/0/1", "path must be a db number"),
        ("redis://cache.example/1?db=2", "not in both"),
        ("redis://a.example,b.example", "several hosts are for Sentinel only"),
        ("redis://cache.example?socket_timeout=1", "parameter 'socket_timeout' is not served"),
        ("redis://cache.example?ssl_ca_certs=/ca.pem", "ssl_ca_certs needs TLS"),
        ("redis://cache.example?db=", "given once, with a value"),
        ("redis://cache.example?db=1&db=2", "given once, with a value"),
        ("redis://tdm:SECRET#1@cache.example", "percent-encoded"),
        ("redis://tdm:SECRET/1@cache.example", "percent-encoded"),
        ("redis://tdm:SECRET?1@cache.example", "percent-encoded"),
        ("unix://run/redis.sock", "must be absolute"),
        ("unix://", "must be absolute"),
        ("redis+sentinel://a.example", "path must be the master's name"),
        ("redis+sentinel://a.example/mymaster/0/1", "path must be the master's name"),
        ("redis+sentinel://a.example/mymaster/SECRET", "db must be a number"),
        ("redis+sentinel://a.example,/mymaster", "a host is missing"),
        ("rediss://cache.example?ssl_ca_certs=/nowhere/ca.pem", "no file /nowhere/ca.pem"),
        ("rediss://cache.example?ssl_cert_reqs=maybe", "allowed are required, none"),
        ("rediss://cache.example?ssl_check_hostname=maybe", "allowed are true, false"),
    ],
)
def test_wrong_url_is_refused_with_what_is_wrong_and_no_secret(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        parse_redis_url(url)

    assert message in str(caught.value)
    assert "SECRET" not in str(caught.value)


def test_files_that_are_no_certificates_are_named(tmp_path: Path) -> None:
    authority = trustme.CA()
    one, other = authority.issue_cert("one.example"), authority.issue_cert("other.example")
    certificate, key, text = tmp_path / "one.pem", tmp_path / "other.key", tmp_path / "notes.txt"
    one.cert_chain_pems[0].write_to_path(certificate)
    other.private_key_pem.write_to_path(key)
    text.write_text("no certificate")

    with pytest.raises(ValueError, match="ssl_ca_certs: no certificates"):
        parse_redis_url(f"rediss://cache.example?ssl_ca_certs={text}")
    with pytest.raises(ValueError, match="ssl_keyfile: they must be a certificate and its"):
        parse_redis_url(f"rediss://cache.example?ssl_certfile={certificate}&ssl_keyfile={key}")
    with pytest.raises(ValueError, match="ssl_keyfile needs ssl_certfile"):
        parse_redis_url(f"rediss://cache.example?ssl_keyfile={key}")


def test_an_address_in_a_log_shows_where_and_no_secret() -> None:
    urls = {
        "redis://tdm:SECRET@cache.example/1": "cache.example:6379",
        "unix://tdm:SECRET@/run/redis.sock": "/run/redis.sock",
        "redis+sentinel://tdm:SECRET@a,[::1]/mymaster?sentinel_password=SECRET": (
            "'mymaster' of Sentinel a:26379, [::1]:26379"
        ),
    }
    for url, shown in urls.items():
        address = parse_redis_url(url)
        assert str(address) == shown
        assert "SECRET" not in repr(address)
