"""Health: is the process alive, and would a request be served now."""

from __future__ import annotations

from fastapi import APIRouter, Response

from server.api.dependencies import ServicesDep
from server.api.errors import ApiError, NoWorkerError, OverloadedError, QueueUnavailableError
from server.api.schemas import ErrorDetail, Health, ModelReadiness, Readiness
from server.queue.errors import QueueError

router = APIRouter(tags=["health"])

MEMORY_IS_SHORT = 0.8
"""As in queue/lua/_accept.lua."""


@router.get("/healthz", summary="Liveness")
async def healthz() -> Health:
    """200 as long as the process answers. It asks nobody else: a Redis outage must not restart the api."""
    return Health()


@router.get(
    "/readyz",
    summary="Readiness",
    responses={
        503: {"model": Readiness, "description": "Error codes: queue_unavailable, no_worker, overloaded"}
    },
)
async def readyz(services: ServicesDep, response: Response) -> Readiness:
    """200 if Redis answers and a live worker serves each known model, else 503 and what is missing."""
    missing: ApiError | None = None
    models: dict[str, ModelReadiness] = {}
    try:
        await services.queue.ping()
        known = await services.catalog.models(max_age_s=0.0)
        memory_use = await services.queue.memory_use()
    except QueueError:
        missing = QueueUnavailableError("Redis does not answer")
    else:
        models = {
            name: ModelReadiness(
                workers=len(model.stats.workers),
                backends=model.backends,
                waiting=model.stats.total_waiting,
                running=model.stats.running,
                oldest_age_s=model.stats.oldest_age_ms / 1000,
                warnings=sorted({warning for worker in model.stats.workers for warning in worker.warnings}),
            )
            for name, model in known.items()
        }
        unserved = sorted(name for name, model in models.items() if not model.workers)
        if not models:
            missing = NoWorkerError("no worker has announced a model yet")
        elif len(unserved) == len(models):
            missing = NoWorkerError(f"no live worker serves {', '.join(unserved)}; accepted jobs wait")
        elif memory_use > MEMORY_IS_SHORT and not any(model.stats.kept for model in known.values()):
            missing = OverloadedError(f"{memory_use:.0%} of Redis's memory are used; new jobs are refused")
    if missing is not None:
        response.status_code = missing.status
    return Readiness(
        status="not_ready" if missing else "ready",
        queue="unavailable" if isinstance(missing, QueueUnavailableError) else "ok",
        models=models,
        error=ErrorDetail.model_validate(missing.body()["error"]) if missing else None,
    )
