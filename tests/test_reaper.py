"""Nothing that a test starts outlives the run, however the run ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.reaper import MARK, marked
from tests.server.conftest import poll

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

# A test that starts a server in a session of its own, which starts another one, and then waits for its end.
LEAVES_CHILDREN = """
import pathlib, subprocess, sys

SERVER = '''
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"]).pid, flush=True)
time.sleep(999)
'''
FOLDER = pathlib.Path(__file__).parent

def test_that_starts_a_server():
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    (FOLDER / "new").write_text(f"{server.pid} {server.stdout.readline()}")
    (FOLDER / "new").rename(FOLDER / "pids")
    server.wait()
"""
COMMAND = (sys.executable, "-m", "pytest", "-p", "tests.conftest")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells who carries the mark")
@pytest.mark.parametrize("options", [[], ["--numprocesses", "1"]], ids=["alone", "xdist"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_run_that_is_ended_takes_its_processes_with_it(
    tmp_path: Path, number: signal.Signals, options: list[str]
) -> None:
    (tmp_path / "test_it.py").write_text(LEAVES_CHILDREN)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [*COMMAND, "-c", str(tmp_path / "pytest.ini"), str(tmp_path), *options]
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"])
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        poll((tmp_path / "pids").exists)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert all(map(alive, pids))
        run.send_signal(number)
        run.wait()
        poll(lambda: not any(map(alive, pids)))
        assert alive(bystander.pid)
    finally:
        for one in (run, bystander):
            one.kill()
            one.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells who carries the mark")
def test_what_this_run_starts_carries_its_mark() -> None:
    command = [sys.executable, "-c", "input(1)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"1"  # in the middle of an exec a process shows no environment
        assert child.pid in marked(os.environ[MARK])
        child.kill()
