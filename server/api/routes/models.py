"""Models: what is served, in OpenAI's shape."""

from __future__ import annotations

from fastapi import APIRouter

from server.api.catalog import ServedModel
from server.api.dependencies import Services, ServicesDep
from server.api.errors import InvalidRequestError, ModelNotFoundError
from server.api.offer import pick_fps, sizes_of
from server.api.routes.openapi import documented
from server.api.schemas import ModelList, ModelView
from server.api.views import seconds_of
from server.job import JobKind

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", summary="List models", responses=documented())
async def list_models(services: ServicesDep) -> ModelList:
    """Every model that a worker has announced, served now or not."""
    models = await services.catalog.models()
    return ModelList(data=[_view(models[name], services) for name in sorted(models)])


@router.get(
    "/{model_id}", summary="Look a model up", responses=documented(ModelNotFoundError, InvalidRequestError)
)
async def get_model(model_id: str, services: ServicesDep) -> ModelView:
    """What the model can draw, and who serves it now."""
    model = (await services.catalog.models()).get(model_id)
    if model is None:
        raise ModelNotFoundError(f"no model is called {model_id!r}; GET /v1/models lists them", param="model")
    return _view(model, services)


def _view(model: ServedModel, services: Services) -> ModelView:
    manifest = model.manifest
    fps = pick_fps(None, manifest) if model.kind is JobKind.VIDEO else None
    frames = list(dict.fromkeys(bucket.frames for bucket in manifest.buckets))
    return ModelView(
        id=model.name,
        created=min((worker.started_ms for worker in model.stats.workers), default=0) // 1000,
        kind=manifest.kind,
        version=manifest.version,
        gate=manifest.gate.summary,
        sizes=sizes_of(manifest),
        seconds=[seconds_of(number, fps) for number in frames] if fps else [],
        frames=frames if fps else [],
        fps=fps,
        steps=sorted(manifest.num_steps),
        default_steps=manifest.default_num_steps,
        max_prompt_chars=services.settings.max_prompt_chars,
        examples=model.examples,
        workers=len(model.stats.workers),
        backends=model.backends,
    )
