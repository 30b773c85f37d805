"""The README's table of settings: `python -m server.settings_table README.md` writes it there.

Name, default and limits are those of `Settings`, the words those that stand under each field.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from server.settings import ENV_PREFIX, Settings

BEGIN = "<!-- settings: python -m server.settings_table README.md -->"
END = "<!-- /settings -->"
_OURS_ALONE = "Set by the supervisor: "


def _descriptions() -> Iterator[tuple[str, str]]:
    """The docstring of each field of `Settings`.

    Read here: pydantic's `use_attribute_docstrings` costs every process 16 ms at its start.
    """
    (definition,) = ast.parse(inspect.getsource(Settings)).body
    assert isinstance(definition, ast.ClassDef)
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(docstring))),
            ):
                yield name, " ".join(docstring.split())


def _variable(name: str) -> str:
    alias = Settings.model_fields[name].validation_alias
    return alias if isinstance(alias, str) else f"{ENV_PREFIX}{name.upper()}"


def _limits(field: FieldInfo) -> str:
    """Which values are allowed, beyond the type."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    low = high = ""
    for limit in field.metadata:
        match limit:
            case Ge(ge=bound):
                low = f"from {bound}"
            case Gt(gt=bound):
                low = f"above {bound}"
            case Le(le=bound):
                high = f"to {bound}"
    return f"{low} {high}".strip()


def _in_markdown(text: str) -> str:
    """A docstring for the table: other fields by their variables, files as links."""

    def by_variable(code: re.Match[str]) -> str:
        return re.sub(
            r"[a-z_]+",
            lambda word: _variable(word[0]) if word[0] in Settings.model_fields else word[0],
            code[0],
        )

    text = re.sub(r"`[^`]+`", by_variable, text).replace("|", "\\|")
    return re.sub(r"\((\w+/README\.md)\)", r"([\1](\1))", text)


def table() -> str:
    """All settings as Markdown, those aside that one of our processes sets for another."""
    lines = ["| variable | default | allowed | |", "|---|---|---|---|"]
    for name, text in _descriptions():
        field = Settings.model_fields[name]
        if not text.startswith(_OURS_ALONE):
            default = "empty" if field.default in (None, "") else f"`{field.default}`"
            lines.append(f"| `{_variable(name)}` | {default} | {_limits(field)} | {_in_markdown(text)} |")
    return "\n".join(lines)


def with_table(document: str) -> str:
    """A document with the table between its two marks.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    head, begin, rest = document.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end) or BEGIN in tail:
        raise ValueError(f"no place for the table: {BEGIN} and {END}, once each")
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
