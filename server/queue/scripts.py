"""The queue's Lua scripts: one verb a file and one atomic transition each, over shared parts (lua/_*.lua)."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

PARTS = ("_names", "_pump", "_finish", "_window")
VERBS = (
    "enqueue", "watch", "cancel", "expire",
    "beat", "leave", "start", "extend", "complete", "fail", "hand_back",
)  # fmt: skip


@cache
def script(verb: str) -> str:
    """Source of lua/<verb>.lua, with the shared parts between its `#!lua` line and the rest."""
    header, body = _read(verb).split("\n", 1)
    assert header.startswith("#!lua"), f"{verb}.lua begins with {header!r}"
    return "\n".join([header, *map(_read, PARTS), body])


def _read(name: str) -> str:
    return files("server.queue").joinpath("lua", f"{name}.lua").read_text()
