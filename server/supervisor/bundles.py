"""Bundles: what an `up` serves, and which of its workers serves which."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType

from engines.bundle.manifest import Manifest, read_manifest
from engines.bundle.platform import list_gpus
from engines.errors import EngineError
from server.job import JobKind
from server.settings import Settings, child_environment
from server.supervisor.child import Child
from server.supervisor.fleet import Post
from server.supervisor.report import EXIT_FAILURE, LaunchError, say

MAX_CPU_WORKERS = 4
KINDS = tuple(JobKind)
SHIPPED = {"scenes": JobKind.IMAGE, "clips": JobKind.VIDEO}
"""Students that come with the package, in the order in which they are built, and what they draw."""


async def prepare_bundles(settings: Settings) -> list[Path]:
    """The bundles to begin with. With none set: the first shipped student's, built now unless it is there.

    Raises:
        LaunchError: TDM_BUNDLES names something else than bundles, or the build failed.
    """
    if settings.bundle_paths:
        return find_bundles(settings.bundle_paths)
    return [await _build_bundle(settings, next(iter(SHIPPED)))]


async def prepare_more_bundles(settings: Settings) -> AsyncIterator[Path]:
    """Those of the other shipped students, each once it is built. One that cannot be is told of."""
    for name in list(SHIPPED)[1:] if not settings.bundle_paths else ():
        try:
            # One core: the others are drawing by now.
            yield await _build_bundle(settings, name, "--jobs", "1")
        except LaunchError as error:
            say(f"error: {error}; {name} is not served", file=sys.stderr)


def shipped_student(name: str) -> Path:
    """Directory of a student that comes with the package."""
    return Path(str(files("engines"))) / "demo" / "checkpoints" / f"{name}-student"


def shipped_bundles(settings: Settings) -> dict[Path, JobKind]:
    """Where the bundles of the shipped students are, or will be; none if others were set."""
    return {} if settings.bundle_paths else {_built(settings, name): kind for name, kind in SHIPPED.items()}


def _built(settings: Settings, name: str) -> Path:
    return settings.data_dir.resolve() / "bundles" / name


async def _build_bundle(settings: Settings, name: str, *options: str) -> Path:
    bundle, key_file = _built(settings, name), settings.bundle_key_file
    signing = [] if key_file is None else ["--key-file", str(key_file)]
    command = ["build", str(shipped_student(name)), "--out", str(bundle), "--if-needed", *options, *signing]
    build = Child("engines build", ["-m", "engines", *command], child_environment(), report=say)
    status = await build.run_once()
    if status != 0:
        raise LaunchError(f"the bundle of {name} was not built: status {status}", EXIT_FAILURE)
    return bundle


def find_bundles(paths: Sequence[Path]) -> list[Path]:
    """Directories that hold a manifest, among `paths` and one level below them.

    Raises:
        LaunchError: one of `paths` leads to no bundle.
    """
    bundles: list[Path] = []
    for path in paths:
        manifests = sorted([*path.glob("manifest.json"), *path.glob("*/manifest.json")])
        if not manifests:
            raise LaunchError(f"no bundle (a directory with a manifest.json) in {path} (TDM_BUNDLES)")
        bundles += [manifest.parent for manifest in manifests]
    return bundles


def plan_posts(
    settings: Settings, bundles: Sequence[Path], beside: Mapping[Path, JobKind] = MappingProxyType({})
) -> dict[str, Post]:
    """What each model is served with: a bundle for each of its workers. One whose manifest cannot be read is
    told of, and keeps no other from being served.

    Args:
        settings: of the `up`.
        bundles: to serve now.
        beside: what CPUs serve as well, before or later: it gets its share of TDM_WORKERS, but no post.

    Raises:
        LaunchError: no bundle's manifest can be read, or two different bundles have one name.
    """
    gpus = visible_gpus(settings)
    manifests: dict[Path, Manifest] = {}
    known: dict[str, Manifest] = {}
    unreadable: list[str] = []
    for bundle in bundles:
        try:
            manifests[bundle] = manifest = read_manifest(bundle)
        except EngineError as error:
            unreadable.append(f"{bundle}: {error} (TDM_BUNDLES)")
            continue
        # The name is the queue class: a job would be drawn by whichever of the two is free.
        if known.setdefault(manifest.name, manifest).version != manifest.version:
            raise LaunchError(f"{bundle}: another bundle is called {manifest.name!r}, too (TDM_BUNDLES)")
    if not manifests and unreadable:
        raise LaunchError(unreadable[0])
    for problem in unreadable:
        say(f"error: {problem}; it is not served", file=sys.stderr)
    kinds: dict[str, dict[Path, JobKind]] = {"cpu": {}, "cuda": {}}
    for bundle, manifest in manifests.items():
        # without a GPU such a bundle is served by the CPU, and says so
        kinds[manifest.device if gpus else "cpu"][bundle] = JobKind(manifest.kind)
    seats: list[tuple[Path, str]] = []
    if kinds["cpu"]:
        num_cores = len(os.sched_getaffinity(0))
        dealt_all = deal({**beside, **kinds["cpu"]}, settings.workers, num_cores)
        seats += [(bundle, "") for bundle in dealt_all if bundle in kinds["cpu"]]
    seats += deal_gpus(kinds["cuda"], settings.workers, gpus)
    dealt: dict[str, list[tuple[Path, str]]] = {}
    for bundle, gpu in seats:
        dealt.setdefault(manifests[bundle].name, []).append((bundle, gpu))
    return {
        name: Post(
            manifest=known[name],
            bundles=[bundle for bundle, _ in workers],
            gpus=[gpu for _, gpu in workers],
        )
        for name, workers in dealt.items()
    }


def deal(kinds: Mapping[Path, JobKind], num_workers: int, num_cores: int) -> list[Path]:
    """Which bundle each worker serves; every bundle has one at least.

    Args:
        kinds: of the bundles.
        num_workers: TDM_WORKERS, dealt out in turn. 0 leaves it open: then images get the workers that this
            machine has room for, and each bundle for videos one more, so that a long clip never stands in a
            picture's way and workers without clips to draw leave their cores to the others.
        num_cores: of this machine.
    """
    images, videos = ([bundle for bundle, kind in kinds.items() if kind == which] for which in KINDS)
    if num_workers or not (images and videos):
        return _in_turn([*images, *videos], num_workers or count_workers(num_cores))
    return [*_in_turn(images, count_workers(num_cores)), *videos]


def deal_gpus(kinds: Mapping[Path, JobKind], num_workers: int, gpus: Sequence[str]) -> list[tuple[Path, str]]:
    """Which bundle each worker on a GPU serves, and on which one; every bundle has one at least.

    Args:
        kinds: of the bundles built for a GPU.
        num_workers: TDM_WORKERS; 0: one per GPU. Beyond their number workers share GPUs, and each finds out
            at start whether there is memory left for it.
        gpus: as `visible_gpus`; at least one if there are bundles.
    """
    if not kinds:
        return []
    bundles = sorted(kinds, key=lambda bundle: KINDS.index(kinds[bundle]))
    dealt = _in_turn(bundles, num_workers or len(gpus))
    return [(bundle, gpus[index % len(gpus)]) for index, bundle in enumerate(dealt)]


def visible_gpus(settings: Settings) -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls each GPU that workers may have."""
    if settings.cuda_visible_devices is not None:
        return [part.strip() for part in settings.cuda_visible_devices.split(",") if part.strip()]
    return [gpu.uuid for gpu in list_gpus()]


def _in_turn(bundles: Sequence[Path], num_workers: int) -> list[Path]:
    return [bundles[index % len(bundles)] for index in range(max(num_workers, len(bundles)))]


def count_workers(num_cores: int) -> int:
    """Workers for one kind of bundle when TDM_WORKERS leaves it open: one per core, up to `MAX_CPU_WORKERS`.

    On a CPU several single-threaded workers draw more than one with several threads.
    """
    return max(1, min(num_cores, MAX_CPU_WORKERS))
