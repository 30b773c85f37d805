"""Supervised processes: real ones, killed for real."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from server.supervisor.child import Child, describe_exit
from tests.server.conftest import poll

# Says in a file that it runs, then sleeps until a signal ends it.
SLEEPER = "import os, signal, sys; open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + SLEEPER
FORKER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', *sys.argv[2:0:-1]]); sys.exit(3)"


def pids_in(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@asynccontextmanager
async def running(
    file: Path, script: str = SLEEPER, *more: str
) -> AsyncIterator[tuple[Child, list[str], asyncio.Task[None]]]:
    reports: list[str] = []
    child = Child("sleeper", ["-c", script, str(file), *more], dict(os.environ), report=reports.append)
    task = asyncio.create_task(child.keep_running())
    try:
        yield child, reports, task
    finally:
        await child.stop(grace_s=10)
        await task


async def until(look: Callable[[], object]) -> None:
    await asyncio.to_thread(poll, look)


async def test_killed_process_leaves_no_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # which the children inherit
    monkeypatch.setattr(tempfile, "tempdir", None)
    unpacks = "import sys, tempfile; open(tempfile.mkdtemp() + '/code.so', 'w').close(); " + SLEEPER
    file = tmp_path / "pids"

    def left() -> list[str]:
        return sorted(path.name for path in tmp_path.rglob("*"))

    async with running(file, unpacks):
        await until(lambda: len(pids_in(file)) == 1)
        assert [name for name in left() if name.startswith("code")] == ["code.so"]
        os.kill(pids_in(file)[0], signal.SIGKILL)
        await until(lambda: len(pids_in(file)) == 2)
        assert [name for name in left() if name.startswith("code")] == ["code.so"]
    assert left() == [file.name]


async def test_killed_process_is_started_again(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    async with running(file) as (_, reports, _):
        await until(lambda: len(pids_in(file)) == 1)
        os.kill(pids_in(file)[0], signal.SIGKILL)
        await until(lambda: len(pids_in(file)) == 2)

    assert reports == ["sleeper was killed by SIGKILL; starting it again in 0.5 s"]
    assert not any(is_running(pid) for pid in pids_in(file))


async def test_process_that_has_served_is_started_again_whatever_its_status(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    ends_as_set_up_wrongly = "import os, sys; open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); sys.exit(2)"
    async with running(file, ends_as_set_up_wrongly) as (child, reports, _):
        child.proven = True
        await until(lambda: len(pids_in(file)) == 2)
    assert reports[0] == "sleeper ended with status 2; starting it again in 0.5 s"

    file.unlink()
    async with running(file, ends_as_set_up_wrongly) as (_, reports, task):
        await task
    assert len(pids_in(file)) == 1
    assert reports == ["sleeper cannot run as it is set up (its message is above)"]


async def test_stop_ends_the_process_for_good(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    async with running(file) as (child, reports, task):
        await until(lambda: pids_in(file))
        await child.stop(grace_s=10)
        await task

    assert reports == []
    assert len(pids_in(file)) == 1


async def test_process_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    async with running(file, STUBBORN) as (child, reports, task):
        await until(lambda: pids_in(file))
        await child.stop(grace_s=0.1)
        await task

    assert reports == ["sleeper did not end within 0.1 s; killed"]
    assert not is_running(pids_in(file)[0])


async def test_stop_does_not_wait_for_the_next_start(tmp_path: Path) -> None:
    async with running(tmp_path / "pids", "raise SystemExit(1)") as (child, reports, task):
        await until(lambda: len(reports) >= 2)
        await child.stop(grace_s=10)
        await task

    assert reports[:2] == [
        "sleeper ended with status 1; starting it again in 0.5 s",
        "sleeper ended with status 1; starting it again in 1 s",
    ]


async def test_process_that_was_set_up_wrongly_is_not_started_again(tmp_path: Path) -> None:
    async with running(tmp_path / "pids", "raise SystemExit(2)") as (_, reports, task):
        await task

    assert reports == ["sleeper cannot run as it is set up (its message is above)"]


async def test_what_a_dead_process_started_dies_with_it(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    # The grandchild may be killed before it has said anything: what counts is that none is left.
    async with running(file, FORKER, SLEEPER) as (child, reports, _):
        await until(lambda: reports)
        assert child.name == "sleeper"

    assert not any(is_running(pid) for pid in pids_in(file))


def test_children_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    script = (
        "import asyncio, os, sys\n"
        "from server.supervisor.child import Child\n"
        "child = Child('sleeper', ['-c', sys.argv[1], sys.argv[2]], dict(os.environ), report=print)\n"
        "asyncio.run(child.keep_running())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, SLEEPER, str(file)]) as supervisor:
        poll(lambda: pids_in(file))
        supervisor.kill()

    poll(lambda: not is_running(pids_in(file)[0]))


def test_exit_is_described_in_words() -> None:
    assert describe_exit(3) == "ended with status 3"
    assert describe_exit(-15) == "was killed by SIGTERM"
