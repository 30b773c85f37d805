"""Runs what has been built as docker-compose.yml says: read-only, without rights, with volumes and settings.

All containers share one network, in which nothing else listens, and each finds the others by name.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.image.layers import Built, mount, mount_kernel, mount_layers

HOME = "/home/tdm"
CLONE_NEWNET = 0x40000000
"""Python's `os` knows it from 3.12 on."""


def leave_the_network() -> None:
    """Have a network from now on in which there is nothing but the loopback.

    Raises:
        OSError: that is not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


DOCKERS_TMPFS = ("noexec", "nosuid", "nodev")
"""How Docker mounts one that says nothing else."""


class Container:
    """A service of docker-compose.yml in the stage that it names."""

    def __init__(
        self, name: str, service: Mapping[str, Any], built: Built, folder: Path, hosts: Sequence[str]
    ) -> None:
        """Mount its files below `folder`; volumes are folders there that containers share."""
        self.name = name
        self._built = built
        self._command = [*built.entrypoint, *service.get("command", built.command)]
        self._root = folder / name
        self._environment = {**built.environment, "HOME": HOME, **service.get("environment", {})}
        names = folder / f"{name}.layer"
        (names / "etc").mkdir(parents=True)
        (names / "etc/hosts").write_text(f"127.0.0.1 localhost {' '.join(hosts)}\n", encoding="utf-8")
        assert service["read_only"] is True
        mount_layers((names, *built.layers), self._root)
        mount_kernel(self._root)
        for place in service["tmpfs"]:
            inside, _, options = place.partition(":")
            flags = ["mode=1777", *DOCKERS_TMPFS, *filter(None, options.split(","))]
            mount("-t", "tmpfs", "tmpfs", self._root / inside.removeprefix("/"), "-o", ",".join(flags))
        for volume in service["volumes"]:
            source, inside, *options = volume.split(":")
            outside = folder / "volumes" / source
            if not outside.exists():  # a new volume takes over what the image has there
                outside.parent.mkdir(exist_ok=True)
                subprocess.run(
                    ["cp", "--archive", built.root / inside.removeprefix("/"), outside], check=True
                )
            mount("--bind", outside, self._root / inside.removeprefix("/"))
            if "ro" in options:
                mount("-o", "remount,bind,ro", self._root / inside.removeprefix("/"))

    def _inside(self, command: Sequence[str]) -> list[str | Path]:
        """A command as it runs in the container: as its user, and without any right beyond."""
        user, group = self._built.user.split(":")
        return [
            *("chroot", self._root, "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"),
            *("--bounding-set=-all", "--no-new-privs", "--"),
            *("/bin/sh", "-c", 'cd "$0" && exec "$@"', self._built.workdir, *command),
        ]

    def run(self) -> None:
        """Run it to its end.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        subprocess.run(self._inside(self._command), env=self._environment, check=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """It runs meanwhile, and ends in order afterwards."""
        with subprocess.Popen(self._inside(self._command), env=self._environment) as process:
            try:
                yield
                process.terminate()
                status = process.wait(timeout=120)
                assert status == 0, f"{self.name} ended with status {status}"
            finally:
                process.kill()

    def is_healthy(self) -> bool:
        """What its `HEALTHCHECK` says."""
        command = self._inside(self._built.healthcheck)
        done = subprocess.run(command, env=self._environment, check=False, capture_output=True)
        return done.returncode == 0
