"""The README's own commands, run as a new user would: fresh checkout, fresh virtual environment.

`make test` cannot run inside itself; its recipe is looked at instead.
"""

import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import psutil
import pytest
from PIL import Image

from server.settings_table import with_table
from tests.shared import clips_bundle

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"

READY_TIMEOUT_S = 1100
STOP_TIMEOUT_S = 240


def blocks(language: str) -> list[str]:
    """The README's fenced blocks in one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def block_with(language: str, text: str) -> str:
    """The first block that holds `text`."""
    return next(block for block in blocks(language) if text in block)


def output(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(command, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone would hold: tracked files, and new ones that are not ignored."""
    listed = output("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    copy = tmp_path_factory.mktemp("readme") / "tdm-server"
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture
def user_environment() -> dict[str, str]:
    """The environment of somebody's shell: nothing of this test run's make or virtual environment.

    PYTHON names the interpreter this one was made from, where `python3` might be an older one.
    """
    left_out = ("MAKE", "MFLAGS", "TDM_", "VIRTUAL_ENV", "PYTEST_", "PYTHON", "VENV", "ARGS", "TORCH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    path = [entry for entry in kept["PATH"].split(os.pathsep) if Path(entry) != Path(sys.executable).parent]
    python = sys._base_executable  # type: ignore[attr-defined]
    # BYTECODE: what is imported is compiled then, instead of everything at once.
    return kept | {"PATH": os.pathsep.join(path), "PYTHON": python, "BYTECODE": "true"}


class Shell:
    """One command in a session of its own, like a terminal's foreground job; its output line by line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line)
        self._queue.put(None)

    def wait_for(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Read on until a line matches; fails the test when the output ends or nothing comes for too long."""
        while True:
            try:
                line = self._queue.get(timeout=timeout_s)
            except queue.Empty:
                pytest.fail(f"no line like {pattern!r} in:\n{''.join(self.lines)}")
            if line is None:
                pytest.fail(f"ended without a line like {pattern!r}:\n{''.join(self.lines)}")
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match

    def processes(self) -> list[psutil.Process]:
        """Everything that still runs in this session."""
        return [process for process in psutil.process_iter() if session_of(process.pid) == self.process.pid]

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the whole foreground process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close(self) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


@contextmanager
def shell(command: str, cwd: Path, environment: dict[str, str]) -> Iterator[Shell]:
    process = subprocess.Popen(
        ["bash", "-c", command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    running = Shell(process)
    try:
        yield running
    finally:
        running.close()


def pixels_of(path: Path) -> bytes:
    """RGB of a PNG that must hold a picture: of the right size, and of more than a few colours."""
    with Image.open(path, formats=["PNG"]) as picture:
        assert picture.size == (64, 64)
        pixels = picture.convert("RGB").tobytes()
    assert len(set(zip(pixels[::3], pixels[1::3], pixels[2::3], strict=True))) > 100
    return pixels


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_new_user_serves_asks_for_a_picture_and_a_clip_and_stops(
    checkout: Path, user_environment: dict[str, str], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    settings = {"TDM_PORT": "0", "TDM_METRICS_PORT": "0", "TDM_DATA_DIR": str(tmp_path / "data")}
    # As if an earlier start had been interrupted there: this run has compiled the student for clips before.
    shutil.copytree(clips_bundle(tmp_path_factory) / "engines", tmp_path / "data/bundles/clips/engines")
    with shell(block_with("sh", "make serve"), checkout, user_environment | settings) as server:
        address = server.wait_for(r"^ready: (http://\S+)", READY_TIMEOUT_S).group(1)

        by_curl = tmp_path / "curl"
        by_curl.mkdir()
        command = block_with("sh", "curl").replace(ADDRESS, address)
        output("bash", "-euo", "pipefail", "-c", command, cwd=by_curl, env=user_environment)

        by_client = tmp_path / "client"
        by_client.mkdir()
        script = block_with("python", "openai").replace(ADDRESS, address)
        output(sys.executable, "-c", script, cwd=by_client, env=user_environment)
        assert pixels_of(by_client / "sphere.png") == pixels_of(by_curl / "sphere.png")

        server.wait_for(r"^ready: \S+ \(models clips, scenes", READY_TIMEOUT_S)
        clip = block_with("python", "client.videos")
        output(sys.executable, "-c", f"{script}\n{clip}", cwd=by_client, env=user_environment)
        with av.open(str(by_client / "clip.mp4"), "r") as file:
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert len(frames) == 9
        assert (frames[0] != frames[-1]).any()

        server.interrupt()
        server.process.wait(timeout=STOP_TIMEOUT_S)
        assert server.processes() == []

    # The second start must not install anything again.
    planned = output("make", "--dry-run", "serve", cwd=checkout, env=user_environment)
    assert "server up" in planned
    assert "install" not in planned


def test_make_test_runs_the_whole_suite(checkout: Path, user_environment: dict[str, str]) -> None:
    assert "make test" in README
    planned = output("make", "--dry-run", "test", cwd=checkout, env=user_environment)
    lines = planned.splitlines()
    assert lines[-1].strip() == "bash .ci/tests .venv/bin/python"
    first_run, *_ = re.findall(r"-m pytest (.*)", (checkout / ".ci/tests").read_text(encoding="utf-8"))
    # Nothing chosen: no path, no marker, no expression but the caller's own.
    assert first_run == (
        '--numprocesses "$processes" --dist loadfile --no-loadscope-reorder --durations 25 "$@" || status=$?'
    )
    assert ".venv/bin/python .ci/install.py worker,embedded,distill,dev" in lines


def engine_commands() -> list[tuple[str, list[str]]]:
    """The verbs of `python -m engines` in the README, with the options that are given to each."""
    found = re.findall(
        r"^python -m engines ([a-z-]+)(.*?)(?:#.*)?$", "\n".join(blocks("sh")), flags=re.MULTILINE
    )
    return [(verb, re.findall(r"--[a-z-]+", rest)) for verb, rest in found]


@pytest.mark.parametrize(("verb", "options"), engine_commands())
def test_engine_command_exists_with_its_options(verb: str, options: list[str]) -> None:
    shown = output(sys.executable, "-m", "engines", verb, "--help", cwd=ROOT)
    assert [option for option in options if option not in shown] == []


def test_settings_table_says_what_the_settings_are() -> None:
    assert with_table(README) == README, "python -m server.settings_table README.md"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
