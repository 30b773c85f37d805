"""Several `up` on one machine, and an `up` whose Redis and store are somebody else's."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from server.queue.connection import connect
from tests.e2e.system import System, poll, running, still_running
from tests.ports import reserve_port, reserve_ports
from tests.s3_server import BUCKET, environment_of, files_of, running_s3
from tests.server.redis_servers import Server, binary_of
from tests.server.redis_servers import running as running_redis

PASSWORD = "secret"


def draw(http: httpx.Client, **fields: object) -> str:
    """Draw one picture, fetch it by its URL, and return its job's id."""
    drawn = http.post("/v1/images", json={"prompt": "a red cube", **fields})
    assert drawn.status_code in (200, 202), drawn.text
    job_id: str = drawn.json()["id"]
    poll(lambda: http.get(f"/v1/images/{job_id}").json().get("status") == "completed")
    content = http.get(f"/v1/images/{job_id}/content")
    assert (content.status_code, content.headers["content-type"]) == (200, "image/png")
    assert content.content.startswith(b"\x89PNG")
    return job_id


def valkey_of(system: System) -> list[psutil.Process]:
    return [one for one in system.processes() if "valkey" in one.name()]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_two_on_one_data_directory_share_a_valkey_and_the_second_takes_over(
    bundle: Path, tmp_path: Path, end: signal.Signals
) -> None:
    with running(System(tmp_path, bundle, name="first")) as first, ExitStack() as stack:
        second = stack.enter_context(running(System(tmp_path, bundle, name="second")))
        assert (len(valkey_of(first)), len(valkey_of(second))) == (1, 0)
        with first.client() as one, second.client() as other:
            job_id = draw(one, seed=1)
            assert other.get(f"/v1/images/{job_id}").json()["status"] == "completed"
            processes = first.processes()

            first.end(end)
            poll(lambda: not still_running(processes))
            poll(lambda: len(valkey_of(second)) == 1)

            poll(lambda: other.get("/readyz").status_code == 200)
            assert other.get(f"/v1/images/{job_id}").json()["status"] == "completed"
            draw(other, seed=2)


def test_two_data_directories_are_two_systems(bundle: Path, tmp_path: Path) -> None:
    with (
        running(System(tmp_path / "a", bundle)) as first,
        running(System(tmp_path / "b", bundle)) as second,
        first.client() as one,
        second.client() as other,
    ):
        job_id = draw(one, seed=1)
        assert other.get(f"/v1/images/{job_id}").status_code == 404
        first.end(signal.SIGTERM)
        draw(other, seed=2)


def test_pictures_lie_in_s3_and_work_goes_on_after_a_failover(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment_of(s3_port := reserve_port()).items():
        monkeypatch.setenv(name, value)
    first, second, sentinel = reserve_ports(3)
    binary = binary_of("valkey")
    common = (
        "--bind",
        "127.0.0.1",
        "--appendonly",
        "yes",
        "--requirepass",
        PASSWORD,
        "--masterauth",
        PASSWORD,
    )
    config = tmp_path / "sentinel.conf"
    config.write_text(
        f"port {sentinel}\nbind 127.0.0.1\nsentinel monitor mymaster 127.0.0.1 {first} 1\n"
        f"sentinel auth-pass mymaster {PASSWORD}\nsentinel down-after-milliseconds mymaster 1000\n"
        "sentinel failover-timeout mymaster 10000\n"
    )
    replica_of = ("--replicaof", f"127.0.0.1 {first}", "--repl-diskless-sync-delay", "0")
    with (
        running_s3(s3_port),
        running_redis(
            binary, tmp_path / "p", "--port", str(first), "--repl-diskless-sync-delay", "0", *common
        ) as primary,
        running_redis(binary, tmp_path / "r", "--port", str(second), *common, *replica_of) as replica,
        running_redis(binary, tmp_path / "s", "--sentinel", config=config) as watcher,
    ):
        with connect(watcher.url) as asked:
            poll(lambda: asked.info("sentinel")["master0"]["slaves"] == 1)
        poll(lambda: _replication(replica)["master_link_status"] == "up")
        system = System(
            tmp_path / "data",
            bundle,
            redis_url=f"redis+sentinel://:{PASSWORD}@127.0.0.1:{sentinel}/mymaster",
            store_url=f"s3://{BUCKET}/pictures",
        )
        with running(system), system.client() as http:
            job_id = draw(http, seed=1)
            assert [path.rpartition("/")[2] for path in files_of(s3_port).find(BUCKET)] == ["1-0.png"]
            poll(lambda: _offset(replica) >= _offset(primary))

            primary.kill()
            poll(lambda: _replication(replica)["role"] == "master")
            poll(lambda: http.get("/readyz").status_code == 200)

            assert http.get(f"/v1/images/{job_id}").json()["status"] == "completed"
            draw(http, seed=2)
            assert len(files_of(s3_port).find(BUCKET)) == 2


def _replication(server: Server) -> dict[str, object]:
    with connect(server.url.replace("unix://", f"unix://:{PASSWORD}@")) as client:
        try:
            info: dict[str, object] = client.info("replication")
        except redis.ConnectionError:
            return {"role": "away"}
    return info


def _offset(server: Server) -> int:
    """How much of the primary's history the server has."""
    info: Any = _replication(server)
    return int(info.get("slave_repl_offset", info["master_repl_offset"]))
