"""Services: what every route of one api process works with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, cast

from fastapi import Depends, Request

from server.api.catalog import Catalog
from server.metrics import Metrics
from server.queue.job_queue import JobQueue
from server.settings import Settings
from server.store import ResultStore
from server.tracing import Tracing


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Built once at start, closed at the end.

    Attributes:
        draining: set when the process is about to end: who waits for a job gets it as it stands.
        now_ms: unix ms.
    """

    settings: Settings
    queue: JobQueue
    store: ResultStore
    catalog: Catalog
    metrics: Metrics
    tracing: Tracing
    draining: asyncio.Event
    now_ms: Callable[[], int]


def _services(request: Request) -> Services:
    return cast("Services", request.app.state.services)


ServicesDep = Annotated[Services, Depends(_services)]


def link(request: Request, route: str, job_id: str) -> str:
    """The address of a route about a job: under the public URL, or wherever this request came to."""
    public_url = _services(request).settings.public_url
    if public_url:
        return public_url + str(request.app.url_path_for(route, job_id=job_id))
    return str(request.url_for(route, job_id=job_id))
