"""Logs: one JSON object a line on stderr, with the request and the job that each line belongs to.

Prompts, headers and URLs with secrets are never passed to a logger: what is not handed over cannot leak.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime

request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the HTTP request being answered by this task; `server.api.middleware` sets it."""

_FIELDS = (
    "job_id",
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
        if request_id := request_id_var.get():
            line["request_id"] = request_id
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
