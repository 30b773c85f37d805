"""The queue's Lua scripts: one verb a file and one atomic transition each, over shared parts (lua/_*.lua)."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files

FUNCTION = re.compile(r"^local function (\w+)", re.MULTILINE)
PARTS = (
    "_work",
    "_pump",
    "_accept",
    "_margin",
    "_finish",
    "_back",
    "_lanes",
)  # each may use those before it, and all use _names
VERBS = (
    "enqueue", "watch", "cancel", "delete", "expire", "forget",
    "beat", "leave", "start", "extend", "complete", "fail", "hand_back", "adopt",
)  # fmt: skip


@cache
def script(verb: str) -> str:
    """Source of lua/<verb>.lua, with the shared parts that it needs between its `#!lua` line and the rest.

    A part makes its functions anew in every call, so one that is not used would cost time in each.
    """
    header, body = _read(verb).split("\n", 1)
    assert header.startswith("#!lua"), f"{verb}.lua begins with {header!r}"
    for part in map(_read, reversed(PARTS)):
        if any(f"{name}(" in body for name in FUNCTION.findall(part)):
            body = f"{part}\n{body}"
    return "\n".join([header, _read("_names"), body])


@cache
def script_sha(verb: str) -> str:
    """What EVALSHA calls `script(verb)` by."""
    return hashlib.sha1(script(verb).encode(), usedforsecurity=False).hexdigest()


def _read(name: str) -> str:
    return files("server.queue").joinpath("lua", f"{name}.lua").read_text()
