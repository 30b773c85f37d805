"""The page at `/`: static files, with a policy under which they can load nothing from anywhere else."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Response

from server.api.errors import RouteNotFoundError

router = APIRouter(include_in_schema=False)

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MEDIA_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
"""The files of `server/api/playground`; nothing else is served from there."""


@router.get("/")
async def page() -> Response:
    """The playground."""
    return _file("index.html")


@router.get("/playground/{name}")
async def page_file(name: str) -> Response:
    """A part of the playground.

    Raises:
        RouteNotFoundError: it has no such part.
    """
    if name not in MEDIA_TYPES:
        raise RouteNotFoundError(f"the playground has no file {name!r}")
    return _file(name)


def _file(name: str) -> Response:
    content = (files("server.api") / "playground" / name).read_bytes()
    return Response(
        content,
        media_type=MEDIA_TYPES[name],
        headers={
            "content-security-policy": CONTENT_SECURITY_POLICY,
            "referrer-policy": "no-referrer",
            "cache-control": "no-cache",
        },
    )
