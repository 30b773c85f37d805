"""Carries out a Dockerfile's steps without Docker: a stage is a layer over the layers of its base.

Needs root, and a mount namespace of its own: nothing here is unmounted, all mounts end with the namespace.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.image.dockerfile import Stage, Step, in_context

log = logging.getLogger(__name__)

BASE_IMAGE = "python:3.11-slim-bookworm"
"""Which digest of it the Dockerfile names is of no account here."""
BASE_PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
BASE_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A stage that has been built.

    Attributes:
        layers: its own and those below it, the topmost first.
        args: what its `ARG`s say; no running container knows them.
    """

    layers: tuple[Path, ...]
    root: Path
    environment: dict[str, str] = field(default_factory=lambda: dict(BASE_ENVIRONMENT))
    args: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()


def mount(*arguments: str | Path) -> None:
    """Mount something until this namespace ends."""
    subprocess.run(["mount", *arguments], check=True)


def mount_layers(layers: Sequence[Path], root: Path, *more: str) -> None:
    """Mount layers, the topmost first, read-only unless `more` names a writable one."""
    root.mkdir(parents=True)
    lower = ":".join(str(layer) for layer in layers)
    mount("-t", "overlay", "overlay", "-o", ",".join((f"lowerdir={lower}", *more)), root)


def mount_kernel(root: Path) -> None:
    """Give a root `/proc` and the devices that programs count on."""
    mount("-t", "proc", "proc", root / "proc")
    mount("-t", "tmpfs", "tmpfs", root / "dev", "-o", "mode=755")
    for name in DEVICES:
        (root / "dev" / name).touch()
        mount("--bind", f"/dev/{name}", root / "dev" / name)
    (root / "dev/shm").mkdir()
    mount("-t", "tmpfs", "tmpfs", root / "dev/shm")


def make_base(folder: Path) -> Path:
    """A Debian with Python, which stands in for `BASE_IMAGE`; made once."""
    base, done = folder / "base", folder / "base.done"
    if not done.exists():
        shutil.rmtree(base, ignore_errors=True)
        command: list[str | Path] = [
            "debootstrap",
            "--variant=minbase",
            f"--include={BASE_PACKAGES}",
            "bookworm",
            base,
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
        shutil.rmtree(base / "var/cache/apt/archives")
        done.touch()
    return base


@dataclass(frozen=True, slots=True)
class PipHere:
    """What pip is told on this machine, for pip in the layers: without it, some machines reach no index."""

    environment: dict[str, str]
    paths: tuple[Path, ...]

    @classmethod
    def ask(cls) -> PipHere:
        """Ask pip."""
        command = [sys.executable, "-m", "pip", "config", "list"]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        named = dict(re.findall(r"^[\w:]+\.([\w-]+)='(.*)'$", told, flags=re.MULTILINE))
        environment = {f"PIP_{name.replace('-', '_').upper()}": value for name, value in named.items()}
        words = [word for value in named.values() for word in value.split()]
        paths = {Path(word) for word in words if word.startswith("/")}
        paths |= {Path(word.removeprefix("file://")).parent for word in words if word.startswith("file://")}
        proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
        paths = {path for path in paths if path.exists()}
        return cls({**proxies, **environment}, tuple(sorted({Path("/etc/resolv.conf"), *paths})))

    def mount(self, root: Path) -> None:
        """Make what it names visible in a root."""
        for path in self.paths:
            inside = root / path.relative_to("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                inside.mkdir(exist_ok=True)
            else:
                inside.touch()
            mount("--bind", path, inside)


class Builder:
    """Builds stages, each once."""

    def __init__(
        self, context: Path, stages: Mapping[str, Stage], *, base: Path, folder: Path, pip_cache: Path
    ) -> None:
        """Build in `folder` what `stages` say, from the files in `context`; pip keeps what it fetches."""
        self._context = context
        self._stages = stages
        self._folder = folder
        self._pip = PipHere.ask()
        self._pip_cache = pip_cache
        self._built = {BASE_IMAGE: Built(layers=(base,), root=base)}

    def build(self, name: str) -> Built:
        """A stage, and before it those that it needs."""
        if name not in self._built:
            stage = self._stages[name]
            below = self.build(stage.base)
            for step in stage.steps:
                if "from" in step.flags:
                    self.build(step.flags["from"])
            layer, work, root = (self._folder / name / part for part in ("layer", "work", "root"))
            layer.mkdir(parents=True)
            work.mkdir()
            mount_layers(below.layers, root, f"upperdir={layer}", f"workdir={work}")
            mount_kernel(root)
            self._pip.mount(root)
            built = replace(below, layers=(layer, *below.layers), root=root, args={})
            for step in stage.steps:
                log.info("%s: line %d: %s %.100s", name, step.line, step.name, step.value)
                built = STEPS[step.name](self, built, step)
            self._built[name] = built
        return self._built[name]

    def run(self, built: Built, step: Step) -> Built:
        """`RUN`, with pip's cache where it is asked for."""
        if "mount" in step.flags:
            asked = dict(part.split("=") for part in step.flags["mount"].split(","))
            assert (asked["type"], asked["target"]) == ("cache", "/root/.cache/pip"), asked
            inside = built.root / asked["target"].removeprefix("/")
            if not inside.is_mount():
                inside.mkdir(parents=True, exist_ok=True)
                mount("--bind", self._pip_cache, inside)
        command: list[str | Path] = ["chroot", f"--userspec={built.user}", built.root, "/bin/sh", "-c"]
        environment = {**self._pip.environment, "HOME": "/root", **built.environment, **built.args}
        script = f"cd {built.workdir}\n{step.value}"
        subprocess.run([*command, script], check=True, env=environment, stdout=sys.stderr)
        return built

    def copy(self, built: Built, step: Step) -> Built:
        """`COPY` from the context or from another stage. Of folders it copies what is in them."""
        *sources, target = step.words
        inside = built.root / Path(built.workdir, target).relative_to("/")
        if "from" in step.flags:
            (source,) = sources
            root = self.build(step.flags["from"]).root
            inside.parent.mkdir(parents=True, exist_ok=True)
            # Into a folder that is there already, as in Docker, and not beside what is in it.
            below = root / source.removeprefix("/")
            subprocess.run(["cp", "--archive", "--no-target-directory", below, inside], check=True)
            return built
        for path in (self._context / source for source in sources):
            assert in_context(path, self._context), f"{path} is not in the context: {step}"
            if path.is_dir():
                shutil.copytree(path, inside, ignore=self._left_out, dirs_exist_ok=True)
            else:
                into = inside / path.name if target.endswith("/") else inside
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, into)
        return built

    def _left_out(self, folder: str, names: list[str]) -> list[str]:
        return [name for name in names if not in_context(Path(folder, name), self._context)]

    def env(self, built: Built, step: Step) -> Built:
        """`ENV`."""
        return replace(built, environment={**built.environment, **step.assigned(built.environment)})

    def arg(self, built: Built, step: Step) -> Built:
        """`ARG`: what pip is told here goes before the default, as with `--build-arg`."""
        name, _, default = step.value.partition("=")
        value = self._pip.environment.get(name, default)
        return replace(built, args={**built.args, name: value}) if value else built

    def workdir(self, built: Built, step: Step) -> Built:
        """`WORKDIR`, which makes the folder."""
        (built.root / step.value.removeprefix("/")).mkdir(parents=True, exist_ok=True)
        return replace(built, workdir=step.value)

    def user(self, built: Built, step: Step) -> Built:
        """`USER`."""
        return replace(built, user=step.value)

    def entrypoint(self, built: Built, step: Step) -> Built:
        """`ENTRYPOINT`."""
        return replace(built, entrypoint=tuple(step.words), command=())

    def command(self, built: Built, step: Step) -> Built:
        """`CMD`."""
        return replace(built, command=tuple(step.words))

    def healthcheck(self, built: Built, step: Step) -> Built:
        """`HEALTHCHECK`."""
        found = re.fullmatch(r"CMD (\[.*\])", step.value)
        return replace(built, healthcheck=tuple(json.loads(found[1])) if found else ())

    def expose(self, built: Built, step: Step) -> Built:
        """`EXPOSE` tells people something, and does nothing."""
        return built


STEPS: dict[str, Callable[[Builder, Built, Step], Built]] = {
    "RUN": Builder.run,
    "COPY": Builder.copy,
    "ENV": Builder.env,
    "ARG": Builder.arg,
    "WORKDIR": Builder.workdir,
    "USER": Builder.user,
    "ENTRYPOINT": Builder.entrypoint,
    "CMD": Builder.command,
    "HEALTHCHECK": Builder.healthcheck,
    "EXPOSE": Builder.expose,
}
