"""Logs: one JSON object a line on stderr, with the request, job, batch and trace that each line belongs to.

Prompts, headers and URLs with secrets are never passed to a logger: what is not handed over cannot leak.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType

_bound: ContextVar[Mapping[str, str]] = ContextVar("bound_ids", default=MappingProxyType({}))

_FIELDS = (
    "job_id",
    "batch_id",
    "trace_id",
    "span_id",
    "model",
    "worker",
    "method",
    "route",
    "status",
    "duration_ms",
    "code",
    "start_s",
    "cpu_s",
)
"""What callers may pass in `extra=`; anything else stays out of the line."""


@contextmanager
def bound(**ids: str) -> Iterator[None]:
    """Let every line that this task or thread writes inside carry these ids, beside those it has."""
    token = _bound.set({**_bound.get(), **ids})
    try:
        yield
    finally:
        _bound.reset(token)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; a traceback becomes one string in it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, without newlines inside."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= _bound.get()
        line |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(level: str) -> None:
    """Send every logger of this process to stderr as JSON lines.

    Args:
        level: lowest level of our own loggers; libraries are kept at warning or above.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
    logging.getLogger("server").setLevel(level.upper())
    logging.getLogger("engines").setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers = []
        logger.propagate = True
