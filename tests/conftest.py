"""Fixtures that more than one folder of tests needs."""

import importlib.util
import os
import signal
from pathlib import Path

import pytest

from tests.reaper import start_reaper
from tests.stamp import TESTS, is_covered, is_current
from tests.watchdog import watch

SLOW_FOLDERS = {"e2e", "failures"}
"""Tests with whole systems in processes of their own."""
STAMPED = pytest.StashKey[bool]()
SLOW_FIXTURES = {"compiled_bundle", "image_bundle", "both_bundle"}


def pytest_configure(config: pytest.Config) -> None:
    """Let no process outlive the run, and none hold it up. Those of xdist belong to it and share its reaper.

    And let SIGINT mean something to all of them: a script that starts the run in its background has it
    ignored, and what is ignored is inherited.
    """
    # Inductor compiles some files in every build to learn whether the compiler knows this CPU's instructions.
    os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        start_reaper()
    watch(config)


@pytest.fixture(autouse=True)
def _no_settings_from_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """TDM_* of the person who runs the tests must not reach the code under test."""
    for name in [name for name in os.environ if name.startswith("TDM_")]:
        monkeypatch.delenv(name)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--storm`: kill as often as `make storm` does, not as CI has time for. `--all`: leave nothing out."""
    parser.addoption("--all", action="store_true", help="run what has passed and not changed since, too")
    parser.addoption("--storm", action="store_true", help="let the storms of tests/failures rage in full")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what has passed with the very same files (tests/stamp.py), unless it is asked for by name."""
    return (is_covered(collection_path) and leaves_out_what_has_passed(config)) or None


def leaves_out_what_has_passed(config: pytest.Config) -> bool:
    """Whether this run does; it imports torch and diffusers in one process less for each that collects."""
    if STAMPED not in config.stash:
        named = any(is_covered(config.rootpath / argument.partition("::")[0]) for argument in config.args)
        config.stash[STAMPED] = not named and not config.getoption("--all") and is_current()
    return config.stash[STAMPED]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was left out."""
    if leaves_out_what_has_passed(config):
        terminalreporter.section("left out")
        terminalreporter.line(
            f"unchanged since they passed (tests/stamp.py): {', '.join(TESTS)}; --all runs them"
        )


@pytest.hookimpl(tryfirst=True)  # before those who choose by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and let its files begin: at the end they would keep one core busy alone."""
    for item in items:
        if SLOW_FOLDERS & set(item.path.parts) or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)
    skip_what_cannot_run(items)


def skip_what_cannot_run(items: list[pytest.Item]) -> None:
    """Skip what needs hardware or libraries that are not here, with the reason."""
    wanted = {name for item in items for name in ("gpu", "tensorrt") if item.get_closest_marker(name)}
    if not wanted:
        return
    import torch  # heavy: only when a collected test needs it

    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = missing["tensorrt"] = "no CUDA device"
    elif importlib.util.find_spec("tensorrt") is None:
        missing["tensorrt"] = "the tensorrt extra is not installed"
    for item in items:
        for name, reason in missing.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
