"""Expiry: when results are over, and the task that removes them.

A result is over `ttl_s` after its job has finished: from that moment on the API says `expired`, whether the
bytes are still there or not. The bytes go some minutes later, so that no clock that runs ahead takes what the
API still promises, and the record goes last, so that nobody is told `unknown` about what has expired.

The api removes them because there is one wherever there are results, with an `up` or without, and because it
runs no engine. It does so in small steps on a thread of its own, with pauses: requests come first.
"""

from __future__ import annotations

import asyncio
import logging
import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from server.api.dependencies import Services
from server.queue.errors import QueueError

log = logging.getLogger(__name__)

# Longer than a worker may take from storing a result to completing its job, and clocks may differ.
GRACE_S = 600.0
MAX_PERIOD_S = 600.0
PAUSE_S = 0.02


async def expire_old(services: Services, closing: asyncio.Event) -> None:
    """Remove old results now and then until `closing`; first within one period, at a random moment."""
    period_s = min(float(services.settings.result_ttl_s), MAX_PERIOD_S)
    wait_s = random.uniform(0, period_s)
    with ThreadPoolExecutor(1, "expiry") as pool:
        while not await closed(closing, wait_s):
            wait_s = period_s
            if not await _is_our_turn(services, period_s):
                continue
            try:
                removed = await _expire(services, closing, pool)
            except OSError as error:
                log.warning("old results not removed: %s", error)
            else:
                log.info("%d files of results expired", removed)


async def _expire(services: Services, closing: asyncio.Event, pool: ThreadPoolExecutor) -> int:
    """One round; how many files it has removed."""
    steps = services.store.expire(services.settings.result_ttl_s + GRACE_S)
    removed, loop = 0, asyncio.get_running_loop()
    while (count := await loop.run_in_executor(pool, next, steps, None)) is not None:
        removed += count
        if await closed(closing, PAUSE_S):
            break
    return removed


async def _is_our_turn(services: Services, period_s: float) -> bool:
    """False if another api process does it. While Redis does not say, all do it: that does no harm."""
    turn_ms = round(900 * period_s)  # over before we ask the next time
    try:
        return await services.queue.takes_turn("expiry", turn_ms)
    except QueueError:
        return True


async def closed(closing: asyncio.Event, timeout_s: float) -> bool:
    """Whether the process is about to end, once it is or after `timeout_s`."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await closing.wait()
    return closing.is_set()
