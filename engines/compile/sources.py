"""Sources: the code of ours that a compiled stage depends on, for its key. No torch here."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from engines.bundle.integrity import hash_file
from engines.families.spec import FAMILIES

PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def hash_sources(family: str, compiler: str, package: Path = PACKAGE) -> Mapping[str, str]:
    """Hash every module of `engines` that is loaded to compile a stage of one family.

    That is more than is traced, and read off the imports, so that nobody has to keep a list: a key that
    changes too often costs a build, one that changes too seldom serves code that is gone.

    Args:
        family: as in `student.json`; the others' modules are left out.
        compiler: module of `engines` that compiles, such as `compile.aotinductor`.
        package: the directory of `engines`.

    Returns:
        sha256 (hex) by module, `engines.denoiser` for example, sorted.
    """
    others = {f"engines.families.{name}" for name in FAMILIES if name != family}
    found: dict[str, Path] = {}
    waiting = [f"engines.families.{family}", f"engines.{compiler}"]
    while waiting:
        module = waiting.pop()
        path = package.parent.joinpath(*module.split(".")).with_suffix(".py")
        if module in found or module in others or not module.startswith("engines.") or not path.is_file():
            continue
        found[module] = path
        waiting.extend(_imports(path))
    return {module: hash_file(path).sha256 for module, path in sorted(found.items())}


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, also inside functions; of `from a import b` both `a` and `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
