"""Archiving: the task that moves the answers of jobs which ended a while ago from Redis to the store.

What finished jobs keep in Redis is bounded by that while, and by memory: where it gets short, the oldest go
at once. Clients notice nothing of it: who asks for such a job is answered from the store.
"""

from __future__ import annotations

import asyncio
import logging
import random

from server.api.dependencies import Services
from server.api.expiry import closed
from server.queue.archive import Archive
from server.queue.errors import QueueError

log = logging.getLogger(__name__)

PERIOD_S = 10.0
PAUSE_S = 0.02
BATCH = 200
MAX_MEMORY_USE = 0.5
"""Share of Redis's memory above which answers need not have been there for long. From 0.8 on they would be
forgotten."""
MIN_KEPT_S = 10.0
"""What has just ended is about to be read, and who has lost the reply to a request asks again by then."""


async def archive_ended(services: Services, archive: Archive, closing: asyncio.Event) -> None:
    """Move answers every now and then until `closing`, one api process at a time."""
    wait_s = random.uniform(0, PERIOD_S)
    while not await closed(closing, wait_s):
        wait_s = PERIOD_S
        try:
            if await services.queue.takes_turn("archive", round(900 * PERIOD_S)):
                await archive_round(services, archive, closing)
        except (QueueError, OSError) as error:
            log.warning("answers stay in Redis for now: %s", error)


async def archive_round(services: Services, archive: Archive, closing: asyncio.Event) -> None:
    """Move all answers that are due, a batch at a time with pauses: requests come first.

    Raises:
        QueueError: Redis does not answer.
        OSError: the store does not.
    """
    queue, settings = services.queue, services.settings
    for model in await queue.models():
        while not closing.is_set():
            is_short = await queue.memory_use() > MAX_MEMORY_USE
            kept_s = MIN_KEPT_S if is_short else settings.record_s
            ended_before_ms = queue.clock() - round(1000 * kept_s)
            answers = await queue.answers(model, ended_before_ms=ended_before_ms, limit=BATCH)
            if not answers:
                break
            await asyncio.to_thread(archive.write, answers)
            moved = await queue.forget(answers, kept_ms=1000 * settings.result_ttl_s)
            services.metrics.jobs_archived.labels(model).inc(moved)
            if not moved or await closed(closing, PAUSE_S):
                break
