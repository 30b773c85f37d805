"""App: the FastAPI application of one api process, and the process around it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from server.catalog import Catalog
from server.errors import (
    ApiError,
    InternalError,
    InvalidJsonError,
    InvalidRequestError,
    MethodNotAllowedError,
    MissingParameterError,
    QueueUnavailableError,
    RouteNotFoundError,
    UnknownParameterError,
)
from server.http import HttpConnection
from server.job import Job
from server.metrics import Metrics, Outcome, start_metrics_server
from server.middleware import BodyLimit, RequestContext, error_response
from server.queue.connection import system_now_ms
from server.queue.errors import QueueError
from server.queue.job_queue import JobQueue
from server.routes import health, images, models, page, videos
from server.services import Services
from server.settings import Settings
from server.store import ResultStore
from server.waiting import ClientGoneError

CLIENT_GONE_STATUS = 499
GAUGES_PERIOD_S = 5.0
DRAIN_WAIT_S = 3.0
LINGER_S = 1.0
SHUTDOWN_GRACE_S = 5
KEEP_ALIVE_S = 75
QUEUE_RETRY_MS = 1000

logger = logging.getLogger(__name__)


def create_app(settings: Settings, *, metrics: Metrics | None = None) -> FastAPI:
    """The application; its lifespan connects to Redis and the store, and closes both.

    Args:
        settings: with a resolved `redis_url`.
        metrics: where to count; a registry of its own by default.
    """
    metrics = metrics or Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        queue = JobQueue(
            settings.redis_url,
            max_waiting=settings.max_queue,
            result_ttl_s=settings.record_ttl_s,
            on_deadline=partial(_count_deadline, metrics),
        )
        services = Services(
            settings=settings,
            queue=queue,
            store=ResultStore(settings.results_url),
            catalog=Catalog(queue),
            metrics=metrics,
            draining=asyncio.Event(),
            now_ms=system_now_ms,
        )
        app.state.services = services
        await queue.start()
        closing = asyncio.Event()
        gauges = asyncio.create_task(_export_gauges(services, closing))
        try:
            yield
        finally:
            closing.set()
            await gauges
            await services.catalog.close()
            await queue.close()

    app = FastAPI(
        title="tdm-server",
        version=version("tdm-server"),
        summary="Images and videos from few-step TDM students.",
        lifespan=lifespan,
        docs_url=None,  # both pages load their scripts from elsewhere
        redoc_url=None,
    )
    for routes in (images, models, videos, health, page):
        app.include_router(routes.router)
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestContext, metrics=metrics)  # added last, runs first
    for exception, handler in _HANDLERS.items():
        app.add_exception_handler(exception, handler)
    return app


def serve(settings: Settings) -> int:
    """Run one api process until SIGTERM or SIGINT, with its metrics on a port of their own.

    Raises:
        ValueError: `redis_url` is empty.
        OSError: the port is in use.
    """
    if not settings.redis_url:
        raise ValueError("TDM_REDIS_URL is empty; only `python -m server up` starts a Valkey of its own")
    metrics = Metrics()
    scrape = start_metrics_server(metrics, settings.host, settings.metrics_port)
    try:
        _ApiServer(create_app(settings, metrics=metrics)).run(sockets=[_listener(settings)])
    finally:
        if scrape:
            scrape.close()
    return 0


class _ApiServer(uvicorn.Server):
    """uvicorn, which ends so that no client notices, as long as another process takes over its socket."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                self._respond,
                interface="asgi3",  # uvicorn does not recognise a bound method as what it is
                http=HttpConnection,
                ws="none",  # nothing here is a WebSocket: who offers one gets a plain answer
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
            )
        )
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's signature)
        """First signal: accept no more, answer what waits. Second: end now. Either way with status 0."""
        if self.should_exit:
            self.force_exit = True
            return
        self.should_exit = True
        with suppress(RuntimeError, AttributeError):  # not yet running: nobody waits
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, DRAIN_WAIT_S, self._app.state.services.draining.set)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening at once, but leave clients a moment to learn from a response that they must
        reconnect.

        uvicorn alone would close every connection without a request, also one whose request is on its way.
        """
        for server in self.servers:
            server.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self.server_state.connections and not self.force_exit:  # noqa: ASYNC110 - no event to await
                    await asyncio.sleep(0.02)
        await super().shutdown(sockets)

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application; once this process is to end, its responses close their connections."""

        async def send_and_close(message: Message) -> None:
            if self.should_exit and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        await self._app(scope, receive, send_and_close)


def _listener(settings: Settings) -> socket.socket:
    """The supervisor's listening socket, or one of our own."""
    if settings.listen_fd is not None:
        return socket.socket(fileno=settings.listen_fd)
    return socket.create_server((settings.host, settings.port))


def _count_deadline(metrics: Metrics, job: Job) -> None:
    """Count a job that no worker started in time."""
    metrics.observe_job_end(job, Outcome.DEADLINE, now_ms=job.finished_ms or job.deadline_ms)


async def _export_gauges(services: Services, closing: asyncio.Event) -> None:
    """Keep the queue's gauges fresh. Each api process tells the same, so dashboards take the maximum."""
    metrics = services.metrics
    while not closing.is_set():
        try:
            models = await services.catalog.models(max_age_s=0.0)
            metrics.version_workers.clear()  # versions come and go
            for name, model in models.items():
                for priority, waiting in model.stats.waiting.items():
                    metrics.queue_waiting.labels(name, priority).set(waiting)
                metrics.queue_inflight.labels(name).set(model.stats.running)
                metrics.queue_oldest_age.labels(name).set(model.stats.oldest_age_ms / 1000)
                metrics.jobs_kept.labels(name).set(model.stats.kept)
                metrics.jobs_forgotten.labels(name).set(model.stats.forgotten)
                metrics.workers_live.labels(name).set(len(model.stats.workers))
                for worker in model.stats.workers:
                    metrics.version_workers.labels(name, worker.version).inc()
            metrics.redis_memory_use.set(await services.queue.memory_use())
        except QueueError:
            metrics.redis_errors.labels("stats").inc()
        with suppress(TimeoutError):
            async with asyncio.timeout(GAUGES_PERIOD_S):
                await closing.wait()


async def _on_api_error(_: Request, error: ApiError) -> Response:
    return error_response(error)


async def _on_client_gone(_: Request, __: ClientGoneError) -> Response:
    return Response(status_code=CLIENT_GONE_STATUS)  # read by the access log alone


async def _on_queue_error(request: Request, error: QueueError) -> Response:
    request.app.state.services.metrics.redis_errors.labels("request").inc()
    logger.warning("queue unavailable: %s", type(error).__name__)
    return error_response(
        QueueUnavailableError("the queue does not answer; try again shortly", retry_after_ms=QUEUE_RETRY_MS)
    )


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    """What Starlette and FastAPI raise on their own: no such route, no such method, an undecodable body."""
    match error.status_code:
        case 404:
            api_error: ApiError = RouteNotFoundError(f"there is no {request.url.path}; see /openapi.json")
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            api_error = MethodNotAllowedError(
                f"{request.method} is not allowed here" + (f"; allowed are: {allowed}" if allowed else "")
            )
        case 400:
            api_error = InvalidJsonError("the body is not valid JSON")
        case _:
            api_error = InternalError(f"unexpected status {error.status_code}")
    response = error_response(api_error)
    response.headers.update(error.headers or {})
    return response


async def _on_validation_error(_: Request, error: RequestValidationError) -> Response:
    return error_response(describe_validation(error.errors()))


def describe_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """One API error for what pydantic found: the first problem's field and code, all in the message."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return InvalidJsonError(f"the body is not valid JSON: {first['ctx']['error']}")
    where = [".".join(str(part) for part in problem["loc"][1:]) for problem in problems]
    if not where[0]:
        return InvalidJsonError("the body must be a JSON object")
    kind = {"missing": MissingParameterError, "extra_forbidden": UnknownParameterError}.get(
        first["type"], InvalidRequestError
    )
    return kind(
        "; ".join(f"{name}: {problem['msg']}" for name, problem in zip(where, problems, strict=True)),
        param=where[0],
    )


_HANDLERS: dict[type[Exception], Any] = {
    ApiError: _on_api_error,
    ClientGoneError: _on_client_gone,
    QueueError: _on_queue_error,
    HTTPException: _on_http_exception,
    RequestValidationError: _on_validation_error,
}
