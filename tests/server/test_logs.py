"""Logs: one JSON object a line, and only what was meant to be in it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator

import pytest

from server import logs
from server.logs import JsonFormatter, bound


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("server.test", logging.INFO, __file__, 1, message, args, None)
    made.__dict__.update(extra)
    return made


def test_line_has_time_level_logger_and_message() -> None:
    line = json.loads(JsonFormatter().format(record("%d jobs", 3)))

    assert line.keys() == {"time", "level", "logger", "message"}
    assert (line["level"], line["logger"], line["message"]) == ("info", "server.test", "3 jobs")
    assert line["time"].endswith("+00:00")


def test_line_carries_the_ids_of_what_it_is_written_in() -> None:
    with bound(request_id="req_1"):
        with bound(job_id="img_1", batch_id="b-1"):
            inner = json.loads(JsonFormatter().format(record("done", job_id="img_2")))
        outer = json.loads(JsonFormatter().format(record("done")))
    after = json.loads(JsonFormatter().format(record("done")))

    assert (inner["request_id"], inner["job_id"], inner["batch_id"]) == ("req_1", "img_2", "b-1")
    assert (outer["request_id"], outer.keys() & {"job_id", "batch_id"}) == ("req_1", set())
    assert "request_id" not in after


def test_fields_that_nobody_agreed_on_stay_out() -> None:
    line = json.loads(JsonFormatter().format(record("done", prompt="a private matter")))

    assert "prompt" not in line


def test_traceback_stays_on_its_line() -> None:
    failed = record("failed")
    try:
        raise RuntimeError("two\nlines")
    except RuntimeError:
        failed.exc_info = sys.exc_info()

    text = JsonFormatter().format(failed)

    assert "\n" not in text
    assert "RuntimeError" in json.loads(text)["exception"]


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    ours = {name: logging.getLogger(name).level for name in ("server", "engines")}
    yield
    root.handlers = handlers
    root.setLevel(level)
    for name, before in ours.items():
        logging.getLogger(name).setLevel(before)


@pytest.mark.usefixtures("restored_logging")
def test_our_loggers_follow_the_setting_and_libraries_stay_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("debug")
    logging.getLogger("server.worker.process").debug("ours")
    logging.getLogger("uvicorn.error").info("theirs")

    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines] == ["ours"]
