"""`python -m server up`: this machine's Valkey, api process and workers, started, watched, ended together.

The supervisor holds the listening socket: the port is known to be free before anything starts, and clients
wait instead of failing while a dead api process is replaced. It imports no torch and answers no request.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO, TypeVar

from engines.bundle import Manifest, list_gpus, read_manifest
from engines.errors import EngineError
from server.child import EXIT_USAGE, FIRST_BACKOFF_S, Child
from server.fleet import Fleet, Post
from server.job import JobKind
from server.queue.embedded import EmbeddedValkey, EmbeddedValkeyError
from server.queue.errors import QueueError
from server.queue.routes import Routes
from server.settings import Settings, child_environment

EXIT_FAILURE = 1
MAX_CPU_WORKERS = 4
KINDS = tuple(JobKind)
BACKLOG = 2048
API_GRACE_S = 10.0
API_FIRST_BACKOFF_S = 0.1
API_MAX_BACKOFF_S = 5.0
VALKEY_CHECK_S = 1.0
VALKEY_MAX_BACKOFF_S = 5.0
READY_CHECK_S = 0.25
READY_REMINDER_S = 15.0

SHIPPED = "demo/checkpoints"
STUDENT_SUFFIX = "-student"
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared with, not bound to)

THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

T = TypeVar("T")


class LaunchError(Exception):
    """The system cannot start; the message is one line for the operator, `status` the exit status."""

    def __init__(self, message: str, status: int = EXIT_USAGE) -> None:
        super().__init__(message)
        self.status = status


def run_supervisor(settings: Settings) -> int:
    """Run the whole system until SIGINT or SIGTERM.

    Returns:
        0 after a signal; 1 if a part gave up; 2 if the settings cannot work. One line on stderr says why.
    """
    try:
        with listen(settings.host, settings.port, "TDM_PORT") as listener:
            check_metrics_port(settings)
            return asyncio.run(_supervise(settings, listener))
    except LaunchError as error:
        say(f"error: {error}", file=sys.stderr)
        return error.status
    except EmbeddedValkeyError as error:
        say(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE


async def _supervise(settings: Settings, listener: socket.socket) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()
    _on_signals(stop, hurry)
    bundles = await _unless_stopped(prepare_bundles(settings), stop)
    if bundles is None:
        return 0
    async with _redis(settings) as redis_url:
        api = plan_api(settings, redis_url, listener)
        fleet = Fleet(
            plan_posts(settings, bundles),
            Routes(redis_url),
            partial(hire, settings, redis_url),
            swap_timeout_s=settings.swap_timeout_s,
            report=say,
        )
        serving = asyncio.create_task(api.keep_running())
        try:
            await fleet.start()
        except QueueError as error:
            raise LaunchError(f"Redis: {error}", EXIT_FAILURE) from error
        tending = asyncio.create_task(fleet.run())
        announcing = asyncio.create_task(_announce(listener, api, fleet))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, serving, tending}, return_when=asyncio.FIRST_COMPLETED)
        for task in (announcing, stopped, tending):
            task.cancel()
        hurrying = asyncio.create_task(_kill_on(hurry, lambda: [api, *fleet.workers]))
        # Without our copy of the socket new clients are refused at once, instead of hanging in its backlog.
        listener.close()
        await api.stop(API_GRACE_S)  # before the workers: they finish what its clients wait for
        await fleet.end()
        await serving
        hurrying.cancel()
    return 0 if stop.is_set() else EXIT_FAILURE


def listen(host: str, port: int, variable: str) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one.

    Args:
        host: address or name.
        port: 0..65535.
        variable: the setting that chose the port, for the message.

    Raises:
        LaunchError: the port is in use, or the address is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((address[0], port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise LaunchError(f"cannot listen on {host}:{port}: {reason} (TDM_HOST, {variable})") from error


def check_metrics_port(settings: Settings) -> None:
    """Find out before anything starts whether the api's metrics port is free.

    Raises:
        LaunchError: it is not.
    """
    if settings.metrics_port:
        listen(settings.host, settings.metrics_port, "TDM_METRICS_PORT").close()


async def prepare_bundles(settings: Settings) -> list[Path]:
    """The bundles to serve. With none set: the shipped students', built now unless ones that fit are there.

    Raises:
        LaunchError: TDM_BUNDLES names something else than bundles, or a build failed.
    """
    if settings.bundle_paths:
        return find_bundles(settings.bundle_paths)
    built = settings.data_dir.resolve() / "bundles"
    return [
        await _build_bundle(
            student, built / student.name.removesuffix(STUDENT_SUFFIX), settings.bundle_key_file
        )
        for student in shipped_students()
    ]


def shipped_students() -> list[Path]:
    """Directories of the students that come with the package."""
    return sorted(Path(str(files("engines"))).glob(f"{SHIPPED}/*{STUDENT_SUFFIX}"))


async def _build_bundle(student: Path, bundle: Path, key_file: Path | None) -> Path:
    signing = [] if key_file is None else ["--key-file", str(key_file)]
    build = Child(
        "engines build",
        ["-m", "engines", "build", str(student), "--out", str(bundle), "--if-needed", *signing],
        child_environment(),
        report=say,
    )
    status = await build.run_once()
    if status != 0:
        raise LaunchError(f"the bundle of {student.name} was not built: status {status}", EXIT_FAILURE)
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


def plan_posts(settings: Settings, bundles: Sequence[Path]) -> dict[str, Post]:
    """What each model is served with: a bundle for each of its workers. One whose manifest cannot be read is
    told of, and keeps no other from being served.

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
        seats += [(bundle, "") for bundle in deal(kinds["cpu"], settings.workers, num_cores)]
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


def plan_api(settings: Settings, redis_url: str, listener: socket.socket) -> Child:
    """The api process."""
    return Child(
        "api",
        ["-m", "server", "api"],
        child_environment(
            redis_url=redis_url, data_dir=settings.data_dir.resolve(), listen_fd=listener.fileno()
        ),
        pass_fds=[listener.fileno()],
        report=say,
        first_backoff_s=API_FIRST_BACKOFF_S,  # its clients wait
        max_backoff_s=API_MAX_BACKOFF_S,
    )


def hire(settings: Settings, redis_url: str, bundle: Path, index: int, expires: bool, gpu: str) -> Child:
    """A worker for one bundle; `expires`: it removes old results; `gpu`: the only one it sees, or ""."""
    limits = dict.fromkeys(THREAD_LIMITS, settings.worker_threads)
    device = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    environment = child_environment(
        redis_url=redis_url,
        data_dir=settings.data_dir.resolve(),
        worker_index=index,
        worker_expires=expires,
        bundles=bundle,
        **limits,
        **device,
    )
    return Child(f"worker {index}", ["-m", "server", "worker"], environment, report=say)


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


@asynccontextmanager
async def _redis(settings: Settings) -> AsyncIterator[str]:
    """URL of the Redis to use: the given one, or an embedded Valkey that is watched while this lasts."""
    if settings.redis_url:
        yield settings.redis_url
        return
    valkey = EmbeddedValkey(settings.data_dir, maxmemory=settings.valkey_memory)
    url = await valkey.start_beside()
    watching = asyncio.create_task(_keep_alive(valkey))
    try:
        yield url
    finally:
        watching.cancel()
        valkey.stop()


async def _keep_alive(valkey: EmbeddedValkey) -> None:
    """Start the Valkey again when it died, or when the `up` that ran it for us as well has ended.

    Its append-only file still has every accepted job. It is tried for as long as this lasts: what keeps it
    from starting (a full disk, a volume that is away) may pass.
    """
    while True:
        await asyncio.sleep(VALKEY_CHECK_S)
        if not valkey.lost:
            continue
        say("valkey died; starting it again" if valkey.owned else "valkey does not answer; taking over")
        backoff_s, said = FIRST_BACKOFF_S, ""
        while True:
            try:
                await valkey.start_beside()
                break
            except EmbeddedValkeyError as error:
                if str(error) != said:
                    say(f"valkey: {error}", file=sys.stderr)
                said = str(error)
                say(f"valkey does not start; trying again in {backoff_s:g} s")
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, VALKEY_MAX_BACKOFF_S)
        say("valkey is back")


async def _announce(listener: socket.socket, api: Child, fleet: Fleet) -> None:
    """Say that the system is ready once it is. What serves then is set up well, and is started again whatever
    becomes of it.
    """
    await announce(listener, num_workers=lambda: fleet.num_left)
    for child in [api, *fleet.workers]:
        child.proven = True


async def announce(listener: socket.socket, *, num_workers: Callable[[], int]) -> None:
    """Print the one line that people and scripts wait for, once `num_workers` workers are up."""
    waited_s = 0.0
    reminder_s = READY_REMINDER_S
    while True:
        readiness = await fetch_readiness(listener)
        models = readiness.get("models", {})
        live = sum(model["workers"] for model in models.values())
        if live >= num_workers() > 0:
            break
        if waited_s >= reminder_s:
            say(f"waiting: {live} of {num_workers()} workers are up")
            reminder_s += READY_REMINDER_S
        await asyncio.sleep(READY_CHECK_S)
        waited_s += READY_CHECK_S
    for model in models.values():
        for warning in model["warnings"]:
            say(f"warning: {warning}")
    say(describe_ready(url_of(listener), models))


def describe_ready(url: str, models: dict[str, Any]) -> str:
    """`ready: http://127.0.0.1:8000 (model scenes, 2 workers, aotinductor)`."""
    names = ", ".join(sorted(models))
    num_workers = sum(model["workers"] for model in models.values())
    backends = ", ".join(sorted({backend for model in models.values() for backend in model["backends"]}))
    return (
        f"ready: {url} (model{'s' * (len(models) > 1)} {names}, "
        f"{num_workers} worker{'s' * (num_workers > 1)}, {backends})"
    )


def url_of(listener: socket.socket) -> str:
    """Where a browser on this machine finds the listener."""
    host, port = listener.getsockname()[:2]
    host = ANY_ADDRESS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def fetch_readiness(listener: socket.socket) -> dict[str, Any]:
    """The api's `/readyz` body; empty while it does not answer."""
    host, port = listener.getsockname()[:2]
    with suppress(OSError, ValueError, TimeoutError):
        async with asyncio.timeout(READY_REMINDER_S):
            reader, writer = await asyncio.open_connection(ANY_ADDRESS.get(host, host), port)
            try:
                writer.write(b"GET /readyz HTTP/1.0\r\nhost: supervisor\r\n\r\n")
                reply = await reader.read()
            finally:
                writer.close()
        body: dict[str, Any] = json.loads(reply.partition(b"\r\n\r\n")[2])
        return body
    return {}


def _on_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """SIGINT and SIGTERM set `stop`; once it is set, another one sets `hurry`."""
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(
            signal_number, lambda: hurry.set() if stop.is_set() else stop.set()
        )


async def _kill_on(hurry: asyncio.Event, children: Callable[[], Sequence[Child]]) -> None:
    await hurry.wait()
    for child in children():
        child.send(signal.SIGKILL)


async def _unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Event) -> T | None:
    """The result of `work`, or None if `stop` comes first; `work` is cancelled then."""
    working = asyncio.create_task(work)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if working.done():
        return working.result()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    return None


def say(line: str, *, file: TextIO | None = None) -> None:
    """Print one line for the operator. That nobody can read it (its reader has gone, the disk is full) is no
    reason for anything to end.
    """
    out = file or sys.stdout
    try:
        out.write(line + "\n")
        out.flush()
    except BrokenPipeError:  # for good: what is still in the buffer must not make trouble at the exit
        with suppress(OSError, ValueError), open(os.devnull, "wb") as devnull:  # noqa: PTH123
            os.dup2(devnull.fileno(), out.fileno())
    except (OSError, ValueError):
        pass
