"""Prompts from a file that somebody else made: lines, JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from engines.errors import ConfigError

FIELDS = ("prompt", "caption")
"""Where a row keeps its prompt; the first one that it has."""


def read_captions(path: Path, limit: int) -> list[str]:
    """Read the first prompts of a file, by its suffix; blank ones are left out.

    `.txt` has one per line; `.jsonl`, `.csv` and `.parquet` have them in a field or column named "prompt" or
    "caption". Only as much is read as is wanted.

    Raises:
        ConfigError: the file is missing, damaged, of another kind, holds no prompt, or a row has none of the
            fields; names file and line.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        known = ", ".join(_READERS)
        raise ConfigError(f"prompts: {path}: one of {known} is expected, not {path.suffix or 'no suffix'!r}")
    if path.is_dir():
        raise ConfigError(f"prompts: {path} is a directory, a file is expected")
    try:
        stripped = (prompt.strip() for prompt in reader(path))
        prompts = list(islice((prompt for prompt in stripped if prompt), limit))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"prompts: cannot read {path}: {error}") from None
    if not prompts:
        raise ConfigError(f"prompts: {path} holds no prompt")
    return prompts


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"prompts: {path}, line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"prompts: {path}, line {number}: an object is expected, not {row!r:.40}")
        yield _text(row, _field(row, f"{path}, line {number}"), f"{path}, line {number}")


def _csv(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        field = _field(reader.fieldnames or (), str(path))
        for row in reader:
            yield _text(row, field, f"{path}, line {reader.line_num}")


def _parquet(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ConfigError(f"prompts: {path}: to read Parquet, pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            field = _field(file.schema_arrow.names, str(path))
            for batch in file.iter_batches(columns=[field]):
                for row in batch.to_pylist():
                    yield _text(row, field, str(path))
    except ArrowException as error:
        raise ConfigError(f"prompts: cannot read {path}: {error}") from None


def _field(names: Iterable[str], where: str) -> str:
    names = list(names)
    for field in FIELDS:
        if field in names:
            return field
    found = ", ".join(names) or "nothing"
    raise ConfigError(f"prompts: {where}: a field {' or '.join(FIELDS)} is expected, found {found}")


def _text(row: dict[str, Any], field: str, where: str) -> str:
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"prompts: {where}: field {field}: text is expected, not {value!r:.40}")
    return value


_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
