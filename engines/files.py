"""Files that are replaced whole: readers see the old one or the new one, never half. No torch here."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, named with a dot in front; at the end it takes the place of `path`.

    If the block raises, `path` stays what it was and nothing is left beside it.

    Args:
        path: in a directory that exists.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write a file in one move; text as UTF-8. Arguments as of `replacing`."""
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one move. NaN is refused: it is not JSON."""
    atomic_write(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Return once a file, or a directory's list of names, would survive power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
