"""Fixtures that more than one folder of tests needs."""

import importlib.util
import os
import signal

import pytest

from tests.reaper import start_reaper
from tests.stamp import is_covered, is_current
from tests.watchdog import watch

SLOW_FOLDERS = {"e2e", "failures"}
"""Tests with whole systems in processes of their own."""
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


@pytest.hookimpl(tryfirst=True)  # before those who choose by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is slow, and let its files begin: at the end they would keep one core busy alone."""
    for item in items:
        if SLOW_FOLDERS & set(item.path.parts) or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    if not items or not items[0].config.getoption("--all"):
        leave_out_what_has_passed(items)
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)
    skip_what_cannot_run(items)


def leave_out_what_has_passed(items: list[pytest.Item]) -> None:
    """Skip slow tests of engines that have passed with the very same files (tests/stamp.py)."""
    slow = [item for item in items if is_covered(item.path) and item.get_closest_marker("slow")]
    if slow and is_current():
        for item in slow:
            item.add_marker(
                pytest.mark.skip(reason="unchanged since it passed (tests/stamp.py); --all runs it")
            )


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
