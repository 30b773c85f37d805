"""The Dockerfile as steps that can be carried out, and the files that its context lets through."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import get_key_val_dictionary


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One instruction.

    Attributes:
        name: `RUN`, `COPY`, ...
        flags: `--name=value` that stand before its value.
        value: the rest, as one line.
        line: where it begins, from 1.
    """

    name: str
    flags: dict[str, str]
    value: str
    line: int

    @property
    def words(self) -> list[str]:
        """The value of an instruction that is a list of words, or a JSON list."""
        if self.value.startswith("["):
            words: list[str] = json.loads(self.value)
            return words
        return shlex.split(self.value)

    def assigned(self, known: dict[str, str]) -> dict[str, str]:
        """What an `ENV` or `ARG` assigns, in terms of what is `known` before it."""
        assigned: dict[str, str] = get_key_val_dictionary(self.value, env_replace=True, envs=known)
        return assigned


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: the image (without its digest) or the stage that it begins with, and what is done to that."""

    base: str
    steps: tuple[Step, ...]


def read_stages(file: Path) -> dict[str, Stage]:
    """Stages by name, in their order.

    Raises:
        ValueError: a stage has no name.
    """
    stages: dict[str, Stage] = {}
    name = ""
    for line in DockerfileParser(path=str(file)).structure:
        if line["instruction"] == "COMMENT":
            continue
        if line["instruction"] == "FROM":
            named = re.fullmatch(r"(\S+) AS (\S+)", line["value"])
            if named is None:
                raise ValueError(f"line {line['startline'] + 1}: FROM {line['value']} has no name")
            name = named[2]
            stages[name] = Stage(base=named[1].partition("@")[0], steps=())
            continue
        step = step_of(line["instruction"], line["value"], line["startline"] + 1)
        stages[name] = Stage(base=stages[name].base, steps=(*stages[name].steps, step))
    return stages


def step_of(name: str, value: str, line: int) -> Step:
    """An instruction, its flags apart."""
    flags = {}
    while found := re.match(r"--([a-z-]+)=(\S+)\s+", value):
        flags[found[1]] = found[2]
        value = value[found.end() :]
    return Step(name=name, flags=flags, value=value.strip(), line=line)


def in_context(path: Path, root: Path) -> bool:
    """Whether `.dockerignore` lets a file or folder below `root` into the build's context."""
    relative = path.relative_to(root).as_posix()
    let_in = False
    for pattern in (root / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not pattern or pattern.startswith("#"):
            continue
        plain = pattern.removeprefix("!").removeprefix("**/")
        parts = [relative, *(relative[: found.start()] for found in re.finditer("/", relative))]
        named = parts if "**/" not in pattern else [part.rpartition("/")[2] for part in parts]
        if any(fnmatch(part, plain) for part in named):
            let_in = pattern.startswith("!")
    return let_in
