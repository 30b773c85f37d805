"""The runbook's commands for keys, passwords and backups (deploy/README.md), typed while all is served."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from server.queue.connection import connect
from server.queue.preflight import acl_rules
from tests.failures.conftest import binary_of
from tests.failures.deployment import Deployment
from tests.failures.processes import PATIENCE_S, ROOT, RedisServer
from tests.server.conftest import poll


def commands_of(section: str) -> list[str]:
    """The lines that a section of the runbook wants typed."""
    text = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    _, _, rest = text.partition(f"\n## {section}\n")
    block = re.search(r"```sh\n(.*?)```", rest, re.DOTALL)
    assert block, f"no commands in section {section!r}"
    return [line for line in block[1].splitlines() if line]


def typed(command: str, server: RedisServer, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a shell in `folder` makes of a line, where `redis-cli` reaches the server and `python` is ours."""
    if shutil.which("redis-cli") is None:
        pytest.skip("redis-cli is not installed (apt install redis-server)")
    known = (
        f'redis-cli() {{ command redis-cli -s {server.socket} "$@"; }}\n'
        f'python() {{ PYTHONPATH={ROOT} {sys.executable} "$@"; }}\n'
    )
    return subprocess.run(
        ["bash", "-c", known + command], cwd=folder, capture_output=True, text=True, check=False
    )


def done(command: str, server: RedisServer, folder: Path) -> None:
    """Type a line that has to succeed; redis-cli ends with 0 also where it prints an error."""
    result = typed(command, server, folder)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    assert not re.search(r"^(\(error\)|ERR|NOPERM|WRONG)", result.stdout, re.MULTILINE), result.stdout


@pytest.fixture(params=["valkey", "redis"])
def redis_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """One that keeps its users in a file; `tdm` has the documented rights and the password OLD."""
    users = tmp_path / "users.acl"
    users.write_text(f"user default on nopass ~* &* +@all\nuser tdm on >OLD resetchannels {acl_rules()}\n")
    server = RedisServer(binary_of(request.param), tmp_path, aclfile=str(users)).start()
    yield server
    server.kill()


def test_password_is_changed_without_a_failed_request(deployment: Deployment, tmp_path: Path) -> None:
    server = deployment.redis
    both, only_new, saved, *_ = commands_of("Keys and passwords")
    old_url, new_url = (f"unix://tdm:{password}@{server.socket}" for password in ("OLD", "NEW"))
    api = deployment.api(redis_url=old_url)
    worker = deployment.worker(redis_url=old_url)
    deployment.started(worker)
    assert api.post("before").status_code == 200

    done(both, server, tmp_path)
    assert api.post("both are good").status_code == 200
    successor = deployment.api("api 2", redis_url=new_url, listener=api.listener)
    api.send(signal.SIGTERM)
    assert api.join() == 0
    next_worker = deployment.worker("worker 2", redis_url=new_url)
    deployment.started(next_worker)
    worker.send(signal.SIGTERM)
    assert worker.join() == 0

    done(only_new, server, tmp_path)
    done(saved, server, tmp_path)
    assert successor.post("after").status_code == 200
    server.kill()
    server.start()
    with pytest.raises(redis.AuthenticationError):
        connect(old_url).ping()
    assert connect(new_url).ping()
    poll(successor.ready, timeout_s=PATIENCE_S)
    assert successor.post("restarted").status_code == 200


def test_bundle_signed_with_a_new_key_is_served_beside_the_old_one(
    deployment: Deployment, bundle: Path, tmp_path: Path
) -> None:
    made, signed = commands_of("Keys and passwords")[-2:]
    shutil.copytree(bundle, tmp_path / "bundle")
    old_key = tmp_path / "old.key"
    old_key.write_text("0" * 64)
    done(f"python -m engines sign bundle --key-file {old_key}", deployment.redis, tmp_path)

    done(made, deployment.redis, tmp_path)
    done(signed, deployment.redis, tmp_path)

    new_key = tmp_path / "new.key"
    api = deployment.api()
    first = deployment.worker("first", bundles=tmp_path / "bundle", bundle_key_file=old_key)
    second = deployment.worker("second", bundles=tmp_path / "bundle.new", bundle_key_file=new_key)
    deployment.started(first, second)
    assert api.post("either").status_code == 200
    first.send(signal.SIGTERM)
    assert first.join() == 0
    assert api.post("the new one").status_code == 200
    behind = deployment.worker("behind", bundles=tmp_path / "bundle", bundle_key_file=new_key)
    behind.start()
    assert behind.join() == 2
    assert "signed with key" in behind.log


def test_backup_is_restored_under_running_processes(deployment: Deployment, tmp_path: Path) -> None:
    server = deployment.redis
    hold, looked, copied, go_on, ended, restored = commands_of("Backups of Redis")
    api = deployment.api()
    worker = deployment.worker()
    deployment.started(worker)
    known = api.post("known", key="known").json()
    done(hold, server, server.data)
    poll(lambda: typed(looked, server, server.data).returncode == 0)
    done(copied, server, server.data)
    done(go_on, server, server.data)
    lost = api.post("lost", key="lost").json()

    done(ended, server, server.data)
    assert server.join() == 0
    refused = api.post("while it is away")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "queue_unavailable")
    done(restored, server, server.data)
    server.start()

    poll(api.ready, timeout_s=PATIENCE_S)
    assert api.look(known["id"]) == known
    assert api.http.get(f"/v1/images/{lost['id']}").status_code == 404
    again = api.post("lost", key="lost").json()
    assert (again["status"], again["id"] != lost["id"]) == ("completed", True)
    assert worker.alive
