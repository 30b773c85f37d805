"""Failover behind Sentinel: the primary is killed, a replica promoted, and both sides of the queue go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.exceptions import RedisError

from server.job import Job, JobStatus
from server.queue.connection import connect
from server.queue.job_queue import JobQueue
from server.queue.preflight import RedisUnreachableError, UnusableRedisError, check_server
from server.queue.worker_queue import Settled, WorkerQueue
from tests.ports import reserve_ports
from tests.server.conftest import MODEL, VERSION, Clock, poll, poll_async, worker_info
from tests.server.redis_servers import Server, binary_of, running

PASSWORD = "secret"
SENTINEL_PASSWORD = "other"
NUM_SENTINELS = 3


@dataclass
class Ensemble:
    """A primary, its replica, and three Sentinels that watch them."""

    primary: Server
    replica: Server
    sentinels: list[Server]
    ports: list[int]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+sentinel://:{PASSWORD}@{hosts}/mymaster/0?sentinel_password={SENTINEL_PASSWORD}"

    def role(self, server: Server) -> str:
        with connect(server.url.replace("unix://", f"unix://:{PASSWORD}@")) as client:
            info: Any = client.info("replication")
        return f"{info['role']} {info.get('master_link_status', info.get('connected_slaves'))}"

    def sees(self, sentinel: Server) -> tuple[int, int]:
        """How many replicas and other Sentinels it has found."""
        with connect(sentinel.url.replace("unix://", f"unix://:{SENTINEL_PASSWORD}@")) as client:
            fields: Any = client.execute_command("SENTINEL", "MASTER", "mymaster")
        state = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
        return int(state["num-slaves"]), int(state["num-other-sentinels"])


@pytest.fixture(params=["valkey", "redis"])
def ensemble(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ensemble]:
    binary = binary_of(request.param)
    first, second, *ports = reserve_ports(2 + NUM_SENTINELS)
    common = (
        *("--bind", "127.0.0.1", "--appendonly", "yes", "--requirepass", PASSWORD, "--masterauth", PASSWORD),
        *("--repl-diskless-sync-delay", "0"),
    )
    with ExitStack() as servers:
        primary = servers.enter_context(running(binary, tmp_path / "a", "--port", str(first), *common))
        replica = servers.enter_context(
            running(
                *(binary, tmp_path / "b", "--port", str(second), *common),
                *("--replicaof", f"127.0.0.1 {first}"),
            )
        )
        sentinels = []
        for index, port in enumerate(ports):
            config = tmp_path / f"sentinel-{index}.conf"
            config.write_text(
                f"port {port}\nbind 127.0.0.1\nrequirepass {SENTINEL_PASSWORD}\n"
                f"sentinel sentinel-pass {SENTINEL_PASSWORD}\n"
                f"sentinel monitor mymaster 127.0.0.1 {first} 2\n"
                f"sentinel auth-pass mymaster {PASSWORD}\n"
                "sentinel down-after-milliseconds mymaster 1000\n"
                "sentinel failover-timeout mymaster 10000\n"
            )
            folder = tmp_path / f"sentinel-{index}"
            sentinels.append(servers.enter_context(running(binary, folder, "--sentinel", config=config)))
        ensemble = Ensemble(primary, replica, sentinels, ports)
        poll(lambda: ensemble.role(replica) == "slave up" and ensemble.role(primary) == "master 1")
        poll(lambda: [ensemble.sees(one) for one in sentinels] == [(1, NUM_SENTINELS - 1)] * NUM_SENTINELS)
        yield ensemble


async def test_api_and_worker_go_on_after_the_primary_is_killed(
    ensemble: Ensemble, new: Callable[..., Job]
) -> None:
    assert check_server(ensemble.url) == []
    clock = Clock()
    queue = JobQueue(ensemble.url, clock=clock)
    worker = WorkerQueue(ensemble.url, model=MODEL, version=VERSION, consumer="w1", clock=clock)
    try:
        worker.beat(worker_info("w1"), "{}")
        before = new("accepted before")
        await queue.enqueue(before, idempotency_key="k")
        leases = worker.read(1, block_ms=1000)
        started = worker.start(leases)[0].job
        assert started is not None
        with connect(ensemble.replica.url.replace("unix://", f"unix://:{PASSWORD}@")) as replica:
            # Replication is asynchronous: what had not arrived would be lost, and nobody could tell.
            poll(lambda: replica.hget(f"q:2:{{{MODEL}}}:j:{before.id}", "status") == "running")

        ensemble.primary.kill()
        ensemble.sentinels[0].kill()  # the one in front of the list: the others are asked

        poll(lambda: ensemble.role(ensemble.replica).startswith("master"))

        async def answers() -> bool:
            try:
                await queue.ping()
                worker.extend({leases[0]: 50})
            except RedisError:
                return False
            return True

        await poll_async(answers)
        assert worker.complete(started, [], {}) is Settled.OK
        job = await queue.wait(before.id, 60)
        assert job is not None
        assert job.status is JobStatus.DONE
        again = await queue.enqueue(new("accepted before"), idempotency_key="k")
        assert again.job_id == before.id
        after = new("accepted after")
        await queue.enqueue(after)
        taken = worker.read(1, block_ms=1000)
        assert [lease.job_id for lease in taken] == [after.id]
        assert check_server(ensemble.url) == []
    finally:
        worker.close()
        await queue.close()


def test_wrong_name_and_wrong_password_are_told_apart(ensemble: Ensemble) -> None:
    with pytest.raises(RedisUnreachableError, match="no Sentinel knows a live master 'other' now"):
        check_server(ensemble.url.replace("/mymaster/", "/other/"))
    with pytest.raises(UnusableRedisError, match="wrong user or password"):
        check_server(ensemble.url.replace(f":{PASSWORD}@", ":wrong@"))
    with pytest.raises(UnusableRedisError, match="is a Sentinel, which keeps no data"):
        check_server(f"redis://:{SENTINEL_PASSWORD}@127.0.0.1:{ensemble.ports[0]}")
    # A plain URL of the replica would work until the first write.
    with pytest.raises(UnusableRedisError, match="read-only replica"):
        check_server(ensemble.replica.url.replace("unix://", f"unix://:{PASSWORD}@"))
