"""`python -m tests.image`: the images without Docker, and one picture drawn by what is in them.

Carries out the Dockerfile's steps for the targets `api`, `worker-cpu` and `engines-cpu` in layers over a
fresh Debian, then runs what docker-compose.yml makes of them: a bundle is built, an api and a worker are
healthy, a picture comes, both end in order. Valkey is the embedded one. Needs root, Linux, `debootstrap` and
several minutes. What it mounts ends with it, whatever happens: it runs in namespaces of its own.

Exit status: 0; 1 if a step or a service fails; 2 where it cannot run.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import yaml
from PIL import Image

from server.supervisor.valkey import find_server
from tests.image.containers import Container, leave_the_network
from tests.image.dockerfile import read_stages
from tests.image.layers import Builder, Built, make_base

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("debootstrap", "unshare", "setpriv", "ip", "chroot", "mount")
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
URL = "http://127.0.0.1:8000"
PATIENCE_S = 300.0
UNPINNED = {"pip", "setuptools", "tdm-server", "async-timeout"}
"""What an environment begins with, ourselves, and what redis wants with Debian's Python, 3.11.2."""


def wait_for(what: str, look: Callable[[], bool]) -> None:
    """Return once `look` says yes.

    Raises:
        TimeoutError: it never does.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} has not come")
        time.sleep(0.2)  # the pace of the polling


def run_services(services: dict[str, Any], builder: Builder, folder: Path) -> None:
    """Build the bundle, run api and worker, draw a picture."""
    names = ("redis", "bundle", "api", "worker")
    bundle, api, worker = (
        Container(name, services[name], builder.build(services[name]["build"]["target"]), folder, names)
        for name in ("bundle", "api", "worker")
    )
    bundle.run()
    (folder / "queue").mkdir()
    valkey = [find_server(), *services["redis"]["command"][1:]]
    with ExitStack() as running:
        redis = running.enter_context(
            subprocess.Popen(valkey, cwd=folder / "queue", stdout=subprocess.DEVNULL)
        )
        running.callback(redis.kill)
        for container in (api, worker):
            running.enter_context(container.running())
            wait_for(f"{container.name}'s health", container.is_healthy)
        body = {"prompt": "a large red sphere on the left, on grass at sunset", "seed": 7}
        accept = {"accept": "image/png"}
        answer = httpx.post(f"{URL}/v1/images", json=body, headers=accept, timeout=PATIENCE_S)
        answer.raise_for_status()
        picture = Image.open(io.BytesIO(answer.content))
        picture.load()
        print(f"a picture: {picture.format}, {picture.width} x {picture.height}, {len(answer.content)} bytes")


def check_contents(target: str, built: Built, bill: Path) -> None:
    """Make an image's bill of materials, write it to a file, and compare it with what is pinned.

    Raises:
        AssertionError: something in it has another version, or is not pinned at all.
    """
    script = (ROOT / "deploy/sbom.py").read_bytes()
    command: list[str | Path] = ["chroot", built.root, "python", "-"]
    done = subprocess.run(command, input=script, env=built.environment, check=True, capture_output=True)
    bill.write_bytes(done.stdout)
    components = json.loads(done.stdout)["components"]
    purls = [unquote(one["purl"]) for one in components if one.get("purl", "").startswith("pkg:pypi/")]
    found = dict(purl.removeprefix("pkg:pypi/").split("@") for purl in purls)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {one_name(name): number for name, _, number in (line.partition("==") for line in lines)}
    print(f"{target}: {len(found)} distributions of Python, {len(components) - len(found)} other components")
    loose = {
        name for name, number in found.items() if pinned.get(name) != number.partition("+")[0]
    } - UNPINNED
    assert not loose, f"{target}: not as pinned: {sorted(loose)}"


def one_name(name: str) -> str:
    """How PyPI spells a distribution's name, however it is written."""
    return re.sub(r"[-_.]+", "-", name).lower()


def build_and_run(folder: Path, scratch: Path) -> None:
    """All of it, inside namespaces for mounts and processes; `scratch` takes what is not kept."""
    pip_cache = folder / "pip"
    pip_cache.mkdir(exist_ok=True)
    builder = Builder(
        ROOT,
        read_stages(ROOT / "Dockerfile"),
        base=make_base(folder),
        folder=scratch / "stages",
        pip_cache=pip_cache,
    )
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    for name in ("api", "worker", "bundle"):
        target = services[name]["build"]["target"]
        check_contents(target, builder.build(target), folder / f"{target}.cdx.json")
    (scratch / "run").mkdir()
    leave_the_network()
    run_services(services, builder, scratch / "run")


def obstacle(folder: Path) -> str | None:
    """Why it cannot run on this machine, in words; None if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if os.getuid() != 0:
        return "it takes root to mount and to change roots"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        below, layer, work, root = (Path(scratch, name) for name in ("below", "layer", "work", "root"))
        for one in (below, layer, work, root):
            one.mkdir()
        options = f"lowerdir={below},upperdir={layer},workdir={work}"
        command: list[str | Path] = [*NAMESPACES, "mount", "-t", "overlay", "overlay", "-o", options, root]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    return None if done.returncode == 0 else f"no layers in namespaces: {done.stderr.strip()}"


def main() -> int:
    """Start over in namespaces, and clean up after that.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.image", description=(__doc__ or "").split("\n")[0])
    default = ROOT / "runs/image"
    parser.add_argument(
        "--folder",
        type=Path,
        default=default,
        help="keeps Debian, pip's cache and bills of materials (runs/image)",
    )
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.inside is not None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        build_and_run(folder, arguments.inside)
        return 0
    if why := obstacle(folder):
        print(f"error: the images cannot be made here: {why}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        again = (sys.executable, "-m", "tests.image", f"--folder={folder}", f"--inside={scratch}")
        return min(1, abs(subprocess.run([*NAMESPACES, *again], cwd=ROOT, check=False).returncode))


if __name__ == "__main__":
    sys.exit(main())
