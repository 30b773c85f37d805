"""App: the FastAPI application of one api process, and what runs beside its routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from server.api.archiving import archive_ended
from server.api.catalog import Catalog
from server.api.dependencies import Services
from server.api.expiry import expire_old
from server.api.handlers import HANDLERS
from server.api.middleware import BodyLimit, RequestContext
from server.api.routes import health, images, models, playground, videos
from server.api.series import begin_model, begin_process, begin_routes
from server.job import Job, JobErrorCode
from server.metrics import Metrics, Outcome
from server.queue.archive import Archive
from server.queue.clock import RedisClock
from server.queue.errors import QueueError
from server.queue.job_queue import JobQueue
from server.queue.records import RedisHealth
from server.settings import Settings
from server.store import ResultStore
from server.tracing import Tracing, record_settled, start_tracing

GAUGES_PERIOD_S = 5.0
LAST_SPANS_S = 1.0
"""How long the end waits for a collector to take the last spans."""


def create_app(settings: Settings, *, metrics: Metrics | None = None) -> FastAPI:
    """The application; its lifespan connects to Redis and the store, and closes both.

    Args:
        settings: with a resolved `redis_url`.
        metrics: where to count; a registry of its own by default.

    Raises:
        ValueError: tracing is on, and the extra `tracing` is not installed.
    """
    metrics = metrics or Metrics()
    clock = RedisClock()
    tracing = start_tracing(
        settings.otlp_endpoint, settings.trace_ratio, service="tdm-api", now_ns=clock.now_ns, metrics=metrics
    )
    app = FastAPI(
        title="tdm-server",
        version=version("tdm-server"),
        summary="Images and videos from few-step TDM students.",
        lifespan=partial(_lifespan, settings=settings, metrics=metrics, tracing=tracing, clock=clock),
        docs_url=None,  # both pages load their scripts from elsewhere
        redoc_url=None,
        # FastAPI's own would send queries and messages of exceptions wherever OTEL_* variables point.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    for routes in (images, models, videos, health, playground):
        app.include_router(routes.router)
        begin_routes(metrics, routes.router)
    begin_process(metrics)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestContext, metrics=metrics, tracing=tracing)
    if settings.cors_origins:  # added last, runs first: refusals are to be read by those pages, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins.split(","),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
        )
    for exception, handler in HANDLERS.items():
        app.add_exception_handler(exception, handler)
    return app


@asynccontextmanager
async def _lifespan(
    app: FastAPI, *, settings: Settings, metrics: Metrics, tracing: Tracing, clock: RedisClock
) -> AsyncIterator[None]:
    """Connect, run what runs beside the routes, and end it in order."""
    store = ResultStore(settings.results_url)
    archive = Archive(store)
    queue = JobQueue(
        settings.redis_url,
        max_waiting=settings.max_queue,
        result_ttl_s=settings.record_ttl_s,
        archive=archive,
        on_deadline=partial(_count_deadline, metrics, tracing),
        clock=clock,
        observe=metrics.observe_redis_op,
    )
    services = Services(
        settings=settings,
        queue=queue,
        store=store,
        catalog=Catalog(queue),
        metrics=metrics,
        tracing=tracing,
        draining=asyncio.Event(),
        now_ms=clock,
    )
    app.state.services = services
    await queue.start()
    closing = asyncio.Event()
    gauges = asyncio.create_task(_export_gauges(services, closing))
    archiving = asyncio.create_task(archive_ended(services, archive, closing))
    expiry = asyncio.create_task(expire_old(services, closing))
    try:
        yield
    finally:
        closing.set()
        await asyncio.gather(gauges, archiving, expiry)
        await services.catalog.close()
        await queue.close()
        await asyncio.to_thread(tracing.close, LAST_SPANS_S)


def _count_deadline(metrics: Metrics, tracing: Tracing, job: Job) -> None:
    """Count a job that no worker started in time."""
    record_settled(tracing, job, JobErrorCode.DEADLINE)
    metrics.observe_job_end(job, Outcome.DEADLINE, now_ms=job.finished_ms or job.deadline_ms)


def _export_redis(metrics: Metrics, health: RedisHealth) -> None:
    metrics.redis_memory_use.set(health.memory_use)
    metrics.redis_memory.set(health.used_bytes)
    metrics.redis_memory_limit.set(health.limit_bytes)
    metrics.redis_aof_ok.set(health.aof_ok)
    metrics.redis_delayed_fsyncs.set(health.delayed_fsyncs)
    metrics.redis_commands.set(health.commands_per_s)


async def _export_gauges(services: Services, closing: asyncio.Event) -> None:
    """Keep the queue's gauges fresh. Each api process tells the same, so dashboards take the maximum."""
    metrics = services.metrics
    while not closing.is_set():
        try:
            models = await services.catalog.models(max_age_s=0.0)
            metrics.version_workers.clear()  # versions come and go
            for name, model in models.items():
                begin_model(metrics, name, model.kind)
                for priority, waiting in model.stats.waiting.items():
                    metrics.queue_waiting.labels(name, priority).set(waiting)
                metrics.queue_backlog.labels(name).set(model.stats.waiting_ms / 1000)
                metrics.queue_inflight.labels(name).set(model.stats.running)
                metrics.queue_oldest_age.labels(name).set(model.stats.oldest_age_ms / 1000)
                metrics.wait_margin.labels(name).set(model.stats.margin)
                metrics.jobs_kept.labels(name).set(model.stats.kept)
                metrics.jobs_forgotten.labels(name).set(model.stats.forgotten)
                metrics.workers_live.labels(name).set(len(model.stats.workers))
                metrics.queue_limit.labels(name).set(services.settings.max_queue)
                metrics.queue_capacity.labels(name).set(
                    sum(worker.max_batch for worker in model.stats.workers)
                )
                for worker in model.stats.workers:
                    metrics.version_workers.labels(name, worker.version).inc()
            _export_redis(metrics, await services.queue.health())
        except QueueError:
            metrics.redis_errors.labels("stats").inc()
        with suppress(TimeoutError):
            async with asyncio.timeout(GAUGES_PERIOD_S):
                await closing.wait()
