"""The embedded Valkey under the accidents that a laptop has: kills, second starts, long paths."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from server.queue.connection import connect
from server.supervisor.valkey import EmbeddedValkey, EmbeddedValkeyError
from tests.server.conftest import poll

OWNER = textwrap.dedent("""
    import sys
    from server.supervisor.valkey import EmbeddedValkey
    server = EmbeddedValkey(sys.argv[1])
    print(server.start(), server.pid, flush=True)
    sys.stdin.read()
    server.stop()
""")


@contextmanager
def owner_process(data_dir: Path) -> Iterator[tuple["subprocess.Popen[str]", str, int]]:
    """A process that runs a server until its stdin closes; with the server's URL and pid."""
    command = [sys.executable, "-c", OWNER, str(data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        url, pid = owner.stdout.readline().split()
        yield owner, url, int(pid)


def put(url: str, key: str, value: str) -> None:
    client = connect(url)
    client.set(key, value)
    client.close()


def get(url: str, key: str) -> str | None:
    client = connect(url)
    value = client.get(key)
    client.close()
    return str(value) if value is not None else None


def running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_it_keeps_every_write_and_evicts_nothing(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path, maxmemory="64mb") as server:
        client = connect(server.url)
        settings = client.config_get("appendonly", "appendfsync", "maxmemory", "maxmemory-policy", "port")
        client.close()
    assert settings == {
        "appendonly": "yes",
        "appendfsync": "always",
        "maxmemory": str(64 * 1024**2),
        "maxmemory-policy": "noeviction",
        "port": "0",
    }
    assert not server.alive()


def test_acknowledged_writes_survive_a_kill_and_start_runs_it_again(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    put(server.start(), "a", "1")
    first = server.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    poll(lambda: not server.alive())
    assert get(server.start(), "a") == "1"
    assert server.pid != first
    server.stop()


def test_start_at_the_very_moment_of_a_crash_runs_it_again(tmp_path: Path) -> None:
    """However far the kernel has come with the killed server: it answers, is deaf, or dead and not reaped."""
    server = EmbeddedValkey(tmp_path)
    put(server.start(), "a", "1")

    def crash_and_start() -> None:
        killed = server.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        server.start()
        poll(lambda: not running(killed))
        assert get(server.start(), "a") == "1"
        assert server.pid != killed

    for _ in range(20):
        crash_and_start()
    server.stop()


def test_second_one_on_the_same_directory_joins_and_leaves_it_running(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as first:
        second = EmbeddedValkey(tmp_path)
        assert second.start() == first.url
        assert (first.owned, second.owned) == (True, False)
        second.stop()
        assert first.alive()


def test_of_many_that_start_at_once_one_owns_the_server_and_the_next_takes_over(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    starters = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    try:
        lines = [one.stdout.readline().split() for one in starters if one.stdout is not None]
        urls, pids = {url for url, _ in lines}, [pid for _, pid in lines]
        assert len(urls) == 1
        assert sorted(pid == "None" for pid in pids) == [False, True, True, True]
        joiner = EmbeddedValkey(tmp_path)
        put(joiner.start(), "a", "1")
        assert (joiner.owned, joiner.lost) == (False, False)
        owner = starters[next(index for index, pid in enumerate(pids) if pid != "None")]
        owner.kill()
        owner.wait()
        poll(lambda: joiner.lost)
        assert get(joiner.start(), "a") == "1"
        assert (joiner.owned, joiner.lost) == (True, False)
        joiner.stop()
    finally:
        for one in starters:
            one.kill()
            one.communicate()


def test_directory_with_characters_that_urls_treat_specially_works(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "50% of #1?") as server:
        put(server.url, "a", "1")
        assert get(server.url, "a") == "1"


def test_two_directories_are_two_servers(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / "a") as a, EmbeddedValkey(tmp_path / "b") as b:
        put(a.url, "whose", "a")
        assert get(b.url, "whose") is None


def test_server_dies_with_its_killed_parent_and_its_data_can_be_taken_over(tmp_path: Path) -> None:
    with owner_process(tmp_path) as (owner, url, pid):
        put(url, "a", "1")
        owner.kill()
        owner.wait()
        with EmbeddedValkey(tmp_path) as heir:
            assert heir.owned
            assert not running(pid)
            assert get(heir.url, "a") == "1"


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(tmp_path: Path) -> None:
    with owner_process(tmp_path) as (owner, _, pid):
        assert os.getpgid(pid) != os.getpgid(owner.pid)
        owner.communicate()  # closes stdin: an orderly end
        assert not running(pid)


def test_path_too_long_for_a_socket_works_too(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path / ("long" * 30)) as server:
        assert len(str(server.socket_path)) < 100
        assert (server.socket_path.parent.stat().st_mode & 0o777) == 0o700
        put(server.url, "a", "1")
    assert not server.socket_path.parent.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a directory somebody else's")
def test_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path / ("long" * 30))
    server.socket_path.parent.mkdir()
    os.chown(server.socket_path.parent, 12345, -1)
    with pytest.raises(EmbeddedValkeyError, match="belongs to user 12345"):
        server.start()
    server.socket_path.parent.rmdir()


def test_server_that_reads_its_data_has_all_the_time_it_needs(tmp_path: Path) -> None:
    """The joiner's view of one that loads: a stand-in that says so for longer than a silent one is given."""
    server = EmbeddedValkey(tmp_path)
    server.socket_path.parent.mkdir()
    told: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while len(told) < 10:
            connection, _ = listener.accept()
            with connection:
                connection.recv(64)
                told.append(b"-LOADING" if len(told) < 9 else b"+PONG")
                connection.sendall(told[-1] + b"\r\n")

    with (
        (server.socket_path.parent / "lock").open("w") as lock,
        socket.socket(socket.AF_UNIX) as listener,
        ThreadPoolExecutor(1) as pool,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        listener.bind(str(server.socket_path))
        listener.listen()
        loading = pool.submit(serve, listener)
        assert server.start(timeout_s=0.05) == server.url
        loading.result()
    assert told == [b"-LOADING"] * 9 + [b"+PONG"]


def test_server_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    server.socket_path.parent.mkdir()
    with (server.socket_path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EmbeddedValkeyError, match="no answer"):
            server.start(timeout_s=0.05)


def test_damaged_data_is_reported_with_the_server_s_own_words(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        put(server.url, "a", "1")
    (manifest,) = (tmp_path / "valkey" / "appendonlydir").glob("*.manifest")
    manifest.write_text("nonsense\n")
    with pytest.raises(EmbeddedValkeyError, match=r"(?s)exit code 1.*manifest"):
        EmbeddedValkey(tmp_path).start()
