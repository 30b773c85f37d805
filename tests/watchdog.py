"""A run of tests ends, whatever hangs in it.

A test that waits too long is failed by pytest-timeout, which raises in it. That is no help where native
code waits, where the exception is swallowed, or where what hangs is the clean-up after it: then one test
stands for ever and with it the run, without a word. So each process of pytest-xdist writes down what it runs
and until when, and the process that hands tests out aborts the one that is late: its stacks go to stderr, its
test has failed, and another process goes on with the rest.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

FOLDER = "TESTS_THAT_RUN"
"""Environment variable: where the processes write down what they run."""
GRACE_S = 60.0
"""From the moment at which pytest-timeout raises in a test until its process is aborted."""
PERIOD_S = 5.0


class Diary:
    """Of one process that runs tests: the test of the moment."""

    def __init__(self, folder: Path) -> None:
        self._page = folder / str(os.getpid())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        until = time.monotonic() + limit_s(item) + GRACE_S
        new = self._page.with_suffix(".new")
        new.write_text(json.dumps({"test": item.nodeid, "until": until}), encoding="utf-8")
        new.replace(self._page)
        try:
            return (yield)
        finally:
            self._page.unlink(missing_ok=True)


class Watchdog:
    """Of the process that hands tests out: aborts who is late, and says what runs if it must end itself."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tests-that-run-"))
        self._out = os.dup(2)  # pytest captures the number itself later
        self._ended = threading.Event()
        self._broken = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        os.environ[FOLDER] = str(self.folder)
        signal.signal(signal.SIGTERM, self._end)
        self._thread.start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> LoadFileScheduling | None:
        return FilesOnce(config, log) if config.getoption("dist") == "loadfile" else None

    def pytest_internalerror(self) -> None:
        self._broken = True

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A process that broke took its tests along: xdist says so, and then calls the run passed."""
        if self._broken:
            session.exitstatus = pytest.ExitCode.INTERNAL_ERROR

    def pytest_unconfigure(self) -> None:
        self._ended.set()
        self._thread.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def running(self) -> Iterator[tuple[int, str, float]]:
        """Process id, test and end of patience of all that run."""
        for page in self.folder.glob("*[0-9]"):
            with suppress(OSError):  # it has ended meanwhile
                entry = json.loads(page.read_text(encoding="utf-8"))
                yield int(page.name), entry["test"], entry["until"]

    def _watch(self) -> None:
        while not self._ended.wait(PERIOD_S):
            for pid, test, until in self.running():
                if time.monotonic() > until:
                    self._say(f"aborted, as neither its end nor its timeout came: {test}")
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGABRT)
                    (self.folder / str(pid)).unlink(missing_ok=True)

    def _end(self, number: int, frame: object) -> NoReturn:
        for _, test, _ in self.running():
            self._say(f"still running when the run was ended from outside: {test}")
        shutil.rmtree(self.folder, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        raise SystemExit(128 + number)

    def _say(self, line: str) -> None:
        os.write(self._out, f"\n{line}\n".encode())


class FilesOnce(LoadFileScheduling):
    """Each file to one process; a test that took its process down is not run again, which xdist would do."""

    def remove_node(self, node: WorkerController) -> str | None:
        units = self.assigned_work[node].values()
        for unit in units:
            for test, done in unit.items():
                if not done:
                    unit[test] = True
                    super().remove_node(node)
                    return test
        return super().remove_node(node)


def limit_s(item: pytest.Item) -> float:
    """After how many seconds pytest-timeout raises in a test; infinite if it does not."""
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0] if marker else item.config.getini("timeout") or math.inf)


def watch(config: pytest.Config) -> None:
    """Have this run watched, if other processes run its tests."""
    if hasattr(config, "workerinput"):
        if folder := os.environ.get(FOLDER):
            config.pluginmanager.register(Diary(Path(folder)), "diary")
    elif config.getoption("numprocesses", None):
        watchdog = Watchdog()
        config.pluginmanager.register(watchdog, "watchdog")
        watchdog.start()
