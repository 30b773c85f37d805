"""Videos: the route exists, no video student does yet, so every request names that."""

from __future__ import annotations

from fastapi import APIRouter

from server.errors import ModelNotFoundError

router = APIRouter(prefix="/v1/videos", tags=["videos"], include_in_schema=False)


@router.api_route("", methods=["GET", "POST"])
@router.api_route("/{rest:path}", methods=["GET", "POST", "DELETE"])
async def no_video_model() -> None:
    """404 `model_not_found`, whatever is asked.

    Raises:
        ModelNotFoundError: always.
    """
    raise ModelNotFoundError(
        "this server serves no video model; GET /v1/models lists what it serves", param="model"
    )
