"""A Redis that cannot be trusted is named at start, by each role, with its own exit status."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from server.job import Job, JobError, JobKind, Priority
from server.queue.address import RedisAddress
from server.queue.connection import connect
from server.queue.job_queue import JobQueue
from server.queue.preflight import (
    COMMANDS,
    OPERATOR_COMMANDS,
    RedisUnreachableError,
    UnusableRedisError,
    acl_rules,
    check_server,
    refuse_wrong_kind,
    wait_until_usable,
)
from server.queue.routes import Route, Routes
from server.queue.worker_queue import Lease, WorkerQueue
from tests.ports import reserve_port, reserve_ports
from tests.server.conftest import MODEL, VERSION, Clock, let_leases_lapse, worker_info
from tests.server.manifests import make_manifest
from tests.server.redis_servers import Server, binary_of, running


@pytest.fixture(params=["valkey", "redis"])
def binary(request: pytest.FixtureRequest) -> str:
    return binary_of(request.param)


@pytest.fixture
def server(binary: str, tmp_path: Path) -> Iterator[Server]:
    with running(binary, tmp_path, "--port", "0", "--appendonly", "yes") as server:
        yield server


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    with connect(server.url) as client:
        yield client


def refusal(url: str) -> str:
    with pytest.raises(UnusableRedisError) as caught:
        check_server(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_role(role: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{f"TDM_{name.upper()}": value for name, value in settings.items()}}
    return subprocess.run(
        [sys.executable, "-m", "server", role],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def test_server_as_it_should_be_is_nothing_to_talk_about(server: Server) -> None:
    assert check_server(server.url) == []


def test_append_only_file_that_is_off_is_a_warning(server: Server, admin: redis.Redis) -> None:
    admin.config_set("appendonly", "no")

    (warning,) = check_server(server.url)

    assert "appendonly off: accepted jobs are lost when it restarts" in warning


def test_unfinished_jobs_of_the_first_schema_are_not_left_behind(server: Server, admin: redis.Redis) -> None:
    admin.hset("q:models", mapping={"scenes": "{}", "clips": "{}"})
    assert check_server(server.url) == []

    admin.zadd("q:{clips}:live", {"vid_1": 1.0, "vid_2": 2.0})

    assert "holds 2 unfinished jobs of a version before 2026-12" in refusal(server.url)


def test_server_that_evicts_is_refused_and_one_that_would_is_a_warning(
    server: Server, admin: redis.Redis
) -> None:
    admin.config_set("maxmemory-policy", "volatile-lru")
    (warning,) = check_server(server.url)
    assert "maxmemory-policy volatile-lru: harmless while maxmemory is 0" in warning

    admin.config_set("maxmemory", "100mb")
    assert "needed is maxmemory-policy noeviction" in refusal(server.url)


def test_wrong_password_missing_password_and_needless_password_are_told_apart(
    server: Server, admin: redis.Redis
) -> None:
    with_password = server.url.replace("unix://", "unix://:wrong@")
    assert "has no password set" in refusal(with_password)

    admin.config_set("requirepass", "right")

    assert "wants a password" in refusal(server.url)
    assert "wrong user or password (user 'default')" in refusal(with_password)
    assert check_server(server.url.replace("unix://", "unix://:right@")) == []


def test_db_that_is_not_there_is_named(server: Server) -> None:
    assert refusal(f"{server.url}?db=16").endswith("has no db 16")
    assert check_server(f"{server.url}?db=15") == []


def test_server_in_cluster_mode_is_noticed_at_start(binary: str, tmp_path: Path) -> None:
    bus, port = reserve_ports(2)
    options = ("--port", str(port), "--cluster-enabled", "yes", "--cluster-port", str(bus))
    with running(binary, tmp_path, *options) as server:
        assert "cluster mode, which is not served" in refusal(server.url)


def test_replica_is_refused(server: Server, admin: redis.Redis) -> None:
    admin.replicaof("localhost", 1)

    assert "is a read-only replica" in refusal(server.url)


@pytest.mark.parametrize(
    ("info", "named"),
    [
        ({"redis_version": "6.2.14"}, "is Redis 6.2.14; needed is Redis 7.0 or Valkey 8.0"),
        ({"redis_version": "7.2.4", "valkey_version": "7.2.8"}, "is Valkey 7.2.8; needed is"),
        ({}, "is Redis of an unknown version; needed is"),
    ],
)
def test_old_version_is_refused(info: dict[str, Any], named: str) -> None:
    with pytest.raises(UnusableRedisError, match=re.escape(named)):
        refuse_wrong_kind(info, RedisAddress(hosts=(("localhost", 6379),)))


@pytest.mark.parametrize(
    "info",
    [
        {"redis_version": "7.0.15"},
        {"redis_version": "8.4.0"},
        {"redis_version": "7.2.4", "valkey_version": "9.1.2"},
    ],
)
def test_version_that_is_new_enough_is_taken(info: dict[str, Any]) -> None:
    refuse_wrong_kind(info, RedisAddress(hosts=(("localhost", 6379),)))


def test_nobody_there_is_waited_for_and_then_named() -> None:
    port = reserve_port()
    told: list[str] = []

    with pytest.raises(RedisUnreachableError, match=f"localhost:{port} cannot be reached"):
        wait_until_usable(f"redis://localhost:{port}", patience_s=0.1, report=told.append)

    assert [line.startswith("waiting for Redis: ") for line in told] == [True]


def test_server_that_comes_up_while_we_wait_is_used(binary: str, tmp_path: Path) -> None:
    server = Server(binary, tmp_path, ("--port", "0", "--appendonly", "yes"), None)
    try:
        # The report comes after the first failure: from then on the server is started, and found.
        assert wait_until_usable(server.url, patience_s=300, report=lambda _: server.start()) == []
    finally:
        server.kill()


async def test_something_else_that_listens_is_not_a_redis() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        url = f"redis://127.0.0.1:{other.sockets[0].getsockname()[1]}"
        with pytest.raises(UnusableRedisError, match="what answers there is not a Redis"):
            await asyncio.to_thread(check_server, url)


class TestTls:
    """Debian's server: the embedded Valkey is built without TLS, and needs none."""

    @pytest.fixture
    def keys(self, tmp_path: Path) -> Path:
        folder = tmp_path / "keys"
        folder.mkdir()
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        trustme.CA().cert_pem.write_to_path(folder / "other-ca.pem")
        for name, subject in {"server": "localhost", "client": "api@example.com"}.items():
            issued = authority.issue_cert(subject)
            issued.private_key_pem.write_to_path(folder / f"{name}.key")
            issued.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        return folder

    @pytest.fixture
    def start(self, keys: Path, tmp_path: Path) -> Iterator[Callable[[str], tuple[int, int]]]:
        servers: list[Server] = []

        def start(auth_clients: str) -> tuple[int, int]:
            """Ports of a server: with TLS, and plain."""
            tls_port, port = reserve_ports(2)
            options = (
                *("--port", str(port), "--tls-port", str(tls_port), "--appendonly", "yes"),
                *("--tls-cert-file", str(keys / "server.pem"), "--tls-key-file", str(keys / "server.key")),
                *("--tls-ca-cert-file", str(keys / "ca.pem"), "--tls-auth-clients", auth_clients),
            )
            server = Server(binary_of("redis"), tmp_path / str(port), options, None)
            servers.append(server)
            server.start()
            return tls_port, port

        yield start
        for server in servers:
            server.kill()

    def test_own_authority_is_trusted_and_no_other(
        self, keys: Path, start: Callable[[str], tuple[int, int]]
    ) -> None:
        port, _ = start("no")

        assert check_server(f"rediss://localhost:{port}?ssl_ca_certs={keys}/ca.pem") == []
        assert "certificate is not trusted" in refusal(
            f"rediss://localhost:{port}?ssl_ca_certs={keys}/other-ca.pem"
        )
        assert "certificate is not trusted" in refusal(f"rediss://localhost:{port}")

    def test_certificate_must_be_for_the_name_in_the_url(
        self, keys: Path, start: Callable[[str], tuple[int, int]]
    ) -> None:
        port, _ = start("no")
        url = f"rediss://127.0.0.1:{port}?ssl_ca_certs={keys}/ca.pem"

        assert "not valid for '127.0.0.1'" in refusal(url)
        assert check_server(f"{url}&ssl_check_hostname=false") == []
        (warning,) = check_server(f"rediss://127.0.0.1:{port}?ssl_cert_reqs=none")
        assert "is not checked (ssl_cert_reqs=none)" in warning

    async def test_client_certificate_is_shown_by_both_kinds_of_client(
        self,
        keys: Path,
        start: Callable[[str], tuple[int, int]],
        new: Callable[..., Job],
    ) -> None:
        port, _ = start("yes")
        url = f"rediss://localhost:{port}?ssl_ca_certs={keys}/ca.pem"
        shown = f"{url}&ssl_certfile={keys}/client.pem&ssl_keyfile={keys}/client.key"

        # The alert that says so may or may not arrive before the connection is gone.
        with pytest.raises((RedisUnreachableError, UnusableRedisError), match=r"want.* a client certificate"):
            check_server(url)
        assert check_server(shown) == []
        await whole_life(shown, Clock(), new)

    def test_plain_url_to_a_tls_port_gets_a_hint(self, start: Callable[[str], tuple[int, int]]) -> None:
        port, _ = start("no")

        with pytest.raises(RedisUnreachableError, match=r"does it want TLS\? rediss://"):
            check_server(f"redis://localhost:{port}")

    @pytest.mark.slow  # as long as a server may take to answer
    def test_tls_url_to_a_plain_port_gets_a_hint(
        self, keys: Path, start: Callable[[str], tuple[int, int]]
    ) -> None:
        _, port = start("no")

        with pytest.raises((RedisUnreachableError, UnusableRedisError), match="TLS"):
            check_server(f"rediss://localhost:{port}?ssl_ca_certs={keys}/ca.pem")


class TestAcl:
    """A user with the documented rights and no other."""

    @pytest.fixture
    def url(self, server: Server, admin: redis.Redis) -> str:
        rules = f"on >secret resetchannels {acl_rules()}"
        admin.execute_command("ACL", "SETUSER", "tdm", *rules.split())
        return server.url.replace("unix://", "unix://tdm:secret@")

    async def test_whole_life_of_a_queue_needs_no_more(
        self, url: str, admin: redis.Redis, new: Callable[..., Job]
    ) -> None:
        assert check_server(url) == []
        admin.config_resetstat()
        await whole_life(url, Clock(), new, admin)

        stats: dict[str, Any] = admin.info("commandstats")
        names = {name.removeprefix("cmdstat_"): stat for name, stat in stats.items()}
        # redis-py introduces itself on every connection, and does not mind if it may not.
        assert {name for name, stat in names.items() if stat["rejected_calls"]} <= {"client|setinfo"}
        assert set(COMMANDS) - names.keys() == set()  # each of the rights is one that the queue uses

    def test_every_command_of_a_script_is_known(self) -> None:
        scripts = [file for file in (files("server.queue") / "lua").iterdir() if file.name.endswith(".lua")]
        source = "\n".join(file.read_text() for file in scripts)
        called = re.findall(r'redis\.p?call\("(\w+)"(?:, "(CREATE|DELCONSUMER|CONSUMERS|GROUPS)")?', source)
        used = {f"{name}|{sub}".lower() if sub else name.lower() for name, sub in called}

        assert len(scripts) > 10
        assert used <= {*COMMANDS, *OPERATOR_COMMANDS}

    @pytest.mark.parametrize(
        "command", ["xadd", "xgroup|create", "xreadgroup", "info", "evalsha", "script|load"]
    )
    def test_each_missing_right_is_named(self, url: str, admin: redis.Redis, command: str) -> None:
        admin.execute_command("ACL", "SETUSER", "tdm", f"-{command}")

        message = refusal(url)

        assert f"user 'tdm' may not use {command.upper().replace('|', ' ')}" in message
        assert f"+{command}" in message
        assert "secret" not in message

    def test_missing_key_pattern_is_named(self, url: str, admin: redis.Redis) -> None:
        admin.execute_command("ACL", "SETUSER", "tdm", "resetkeys", "~other:*")

        assert re.search(r"may not use SET, GET, .* and \d+ more on q:\*; allow it with", refusal(url))

    def test_documented_rules_are_these(self) -> None:
        text = Path(__file__).parents[3].joinpath("deploy", "README.md").read_text()
        command = text.partition("ACL SETUSER")[2].partition("```")[0]

        assert re.findall(r"[~+][a-z|:*]+", command) == acl_rules().split()
        assert " ".join(f"`+{name}`" for name in OPERATOR_COMMANDS) in text


@pytest.mark.parametrize("role", ["api", "worker", "up"])
def test_each_role_ends_with_one_line_and_its_status(role: str, tmp_path: Path) -> None:
    port = reserve_port()
    settings = {
        "port": "0",
        "metrics_port": "0",
        "bundles": str(tmp_path),
        "data_dir": str(tmp_path / "data"),
    }
    with running(binary_of("valkey"), tmp_path / "valkey", "--port", "0", "--requirepass", "right") as server:
        wrong = run_role(role, redis_url=server.url.replace("unix://", "unix://:SECRET@"), **settings)
    away = run_role(role, redis_url=f"redis://:SECRET@localhost:{port}", redis_wait_s="0", **settings)
    cluster = run_role(role, redis_url="redis+cluster://:SECRET@localhost", **settings)

    assert [ended.returncode for ended in (wrong, away, cluster)] == [2, 1, 2]
    assert "wrong user or password" in wrong.stderr
    assert f"Redis at localhost:{port} cannot be reached" in away.stderr
    assert cluster.stderr.startswith("error: TDM_REDIS_URL: Redis Cluster is not served")
    for ended in (wrong, away, cluster):
        assert ended.stderr.startswith("error: ")
        assert len(ended.stderr.splitlines()) == 1
        assert "SECRET" not in ended.stderr


async def whole_life(
    url: str, clock: Clock, new: Callable[..., Job], admin: redis.Redis | None = None
) -> None:
    """Every verb of the queue once, on both sides; `admin` may let leases lapse."""
    queue = JobQueue(url, clock=clock)
    with ExitStack() as ends:

        def joined(name: str, version: str = VERSION, clock: Clock | None = clock) -> WorkerQueue:
            one = WorkerQueue(url, model=MODEL, version=version, consumer=name, clock=clock)
            ends.callback(one.close)
            return one

        worker, other = joined("w1"), joined("w2")
        try:
            job = await wait_in_line(queue, worker, other, clock, new)
            await run_and_end(queue, worker, other, job, admin)
            await cancel_list_and_delete(queue, clock, new)
            other.hand_back(other.read(8))
            worker.leave()
            other.beat(worker_info("w2"), "{}")
            newer = joined("w3", version="cccccccccccc")
            newer.beat(worker_info("w3", version="cccccccccccc"), "{}")
            newer.leave()
            goes_by_redis = joined("w4", clock=None)
            goes_by_redis.beat(worker_info("w4"), "{}")
            goes_by_redis.leave()
            other.reclaim(1, 1000)  # its lane goes away
            decide_on_versions(url, clock)
            assert (await queue.wait(job.id, 0.01)) is not None
            if admin is not None:  # what is finished makes room
                admin.config_set("maxmemory", int(int(admin.info("memory")["used_memory"]) * 1.1))
                await queue.enqueue(new("too many"))
                admin.config_set("maxmemory", 0)
        finally:
            await queue.close()


async def wait_in_line(
    queue: JobQueue, worker: WorkerQueue, other: WorkerQueue, clock: Clock, new: Callable[..., Job]
) -> Job:
    """Jobs come, wait for their turn, are cancelled and forgotten; the first of four that have a lane."""
    await queue.ping()
    job = new("done")
    await queue.enqueue(job, idempotency_key="k")
    await queue.enqueue(new("done"), idempotency_key="k")
    for prompt in ("failed", "handed back", "reclaimed"):
        await queue.enqueue(new(prompt))
    worker.beat(worker_info("w1", max_batch=2), "{}")
    other.beat(worker_info("w2", max_batch=2), "{}")
    for priority in (Priority.HIGH, Priority.LOW):  # the window is full: they wait for their turn
        await queue.enqueue(new("in turn", priority=priority))
    waits = new("cancelled before its turn")
    await queue.enqueue(waits)
    assert await queue.cancel(waits.id) is not None
    answers = await queue.answers(MODEL, ended_before_ms=clock.now_ms + 1, limit=1)
    assert await queue.forget(answers, kept_ms=1000) == 1
    return job


async def run_and_end(
    queue: JobQueue, worker: WorkerQueue, other: WorkerQueue, job: Job, admin: redis.Redis | None
) -> None:
    """Of the four with a lane one is completed, one fails, one is handed back and one is taken over."""
    leases = worker.read(4, block_ms=1000)
    assert len(leases) == 4
    assert worker.hand_back(leases[2:3]) == 1
    worker.look(leases[:2])
    started = [begun.job for begun in worker.start([*leases[:2], leases[3]])]
    assert all(started)
    worker.extend({leases[0]: 50})
    assert (await queue.wait(job.id, 0.01)) is not None
    worker.complete(_known(started[0]), [], {})
    worker.fail(_known(started[1]), JobError(code="generation_failed", message="a reason"), {})
    if admin is not None:
        let_leases_lapse(admin)
    taken = other.reclaim(8, 1000 if admin is not None else 0)
    assert Lease(leases[3].entry, leases[3].job_id) in taken


async def cancel_list_and_delete(queue: JobQueue, clock: Clock, new: Callable[..., Job]) -> None:
    """What clients ask beside pictures, and what the sweep does."""
    queued = new("cancelled")
    await queue.enqueue(queued)
    await queue.position(queued)
    assert await queue.cancel(queued.id) is not None
    video = new("deleted", kind=JobKind.VIDEO)
    await queue.enqueue(video)
    for newest_first in (True, False):
        jobs, _ = await queue.listing(
            [MODEL], tenant="public", after=None, limit=1, newest_first=newest_first
        )
        assert [job.id for job in jobs] == [video.id]
    assert await queue.delete(video.id) is not None
    await queue.enqueue(new("late", deadline_s=1))
    clock.now_ms += 600_000
    await queue.sweep()
    await queue.stats(MODEL)
    await queue.models()
    await queue.memory_use()


def decide_on_versions(url: str, clock: Clock) -> None:
    """All that `up` and the command `bundle` do with routes."""
    routes = Routes(url, clock=clock)
    routes.supervise(MODEL, "here-1-abcd")
    assert routes.supervisors(MODEL) == ["here-1-abcd"]
    assert routes.models() == [MODEL]
    assert routes.put(MODEL, Route(base=VERSION))
    assert routes.manifest(MODEL, "dddddddddddd") is None
    routes.tell_failure(MODEL, VERSION, "why")
    assert routes.failure(MODEL, VERSION) == "why"
    assert routes.stranded(MODEL, make_manifest(MODEL)) == 0
    assert len(routes.workers(MODEL)) == 1
    assert routes.drop(MODEL, routes.get(MODEL))
    routes.leave(MODEL, "here-1-abcd")
    routes.close()


def _known(job: Job | None) -> Job:
    assert job is not None
    return job
