"""Expiry: when results are over, and the thread that removes them.

A result is over `ttl_s` after its job has finished: from that moment on the API says `expired`, whether the
bytes are still there or not. The bytes go some minutes later, so that no clock that runs ahead takes what the
API still promises, and the record goes last, so that nobody is told `unknown` about what has expired.
"""

from __future__ import annotations

import logging
import random
import threading

from server.store import ResultStore

log = logging.getLogger(__name__)

# Longer than a worker may take from storing a result to completing its job, and clocks may differ.
GRACE_S = 600.0
MAX_PERIOD_S = 600.0


class Expiry:
    """Sweeps a store now and then. One per store is enough; more do no harm."""

    def __init__(self, store: ResultStore, ttl_s: float) -> None:
        """Nothing runs before `start`; `ttl_s` is how long finished jobs are kept."""
        self._store = store
        self._ttl_s = ttl_s
        self._period_s = min(ttl_s, MAX_PERIOD_S)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="expiry", daemon=True)

    def start(self) -> None:
        """Begin; the first sweep comes within one period, at a random moment."""
        self._thread.start()

    def close(self) -> None:
        """Stop, after the sweep that may be under way."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = random.uniform(0, self._period_s)
        while not self._closed.wait(wait_s):
            try:
                removed = self._store.sweep(self._ttl_s + GRACE_S)
                log.info("%d results expired", removed)
            except OSError as error:
                log.warning("results not swept: %s", error)
            wait_s = self._period_s
