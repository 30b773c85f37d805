"""Where Prometheus scrapes the metrics of one process: a port of its own, so that the public one never shows
them.
"""

from __future__ import annotations

import logging
import os

from prometheus_client import start_http_server

from server.metrics import Metrics

logger = logging.getLogger(__name__)


class MetricsServer:
    """The scrape endpoint on a port of its own, so that the public one never shows it."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        """Listen at once.

        Raises:
            OSError: the port is in use.
        """
        self._server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._server.server_port

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics_server(metrics: Metrics, host: str, port: int) -> MetricsServer | None:
    """The scrape endpoint; None for port 0, and where the port is taken: who cannot be watched serves on."""
    if not port:
        return None
    try:
        return MetricsServer(metrics, host, port)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        logger.error("no metrics: cannot listen on %s:%d: %s (TDM_METRICS_PORT)", host, port, reason)  # noqa: TRY400
        return None
