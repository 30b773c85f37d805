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
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, TextIO, TypeVar

from engines.bundle import read_manifest
from engines.errors import EngineError
from server.child import EXIT_USAGE, Child
from server.queue.embedded import EmbeddedValkey, EmbeddedValkeyError
from server.settings import Settings, child_environment

EXIT_FAILURE = 1
MAX_CPU_WORKERS = 4
BACKLOG = 2048
API_GRACE_S = 10.0
WORKER_GRACE_S = 30.0
VALKEY_CHECK_S = 1.0
READY_CHECK_S = 0.25
READY_REMINDER_S = 15.0

DEMO_STUDENT = "demo/checkpoints/scenes-student"
DEMO_BUNDLE = "bundles/scenes"
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
        api, *workers = children = plan_children(settings, bundles, redis_url, listener)
        running = [asyncio.create_task(child.keep_running()) for child in children]
        announcing = asyncio.create_task(announce(listener, num_workers=len(workers)))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({stopped, *running}, return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        stopped.cancel()
        hurrying = asyncio.create_task(_kill_on(hurry, children))
        # Without our copy of the socket new clients are refused at once, instead of hanging in its backlog.
        listener.close()
        await api.stop(API_GRACE_S)  # before the workers: they finish what its clients wait for
        await asyncio.gather(*(worker.stop(WORKER_GRACE_S) for worker in workers))
        await asyncio.gather(*running)
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
    """The bundles to serve. With none set: the demo student's, built now unless one that fits is there.

    Raises:
        LaunchError: TDM_BUNDLES names something else than bundles, or the build failed.
    """
    if settings.bundle_paths:
        return find_bundles(settings.bundle_paths)
    student = str(files("engines") / DEMO_STUDENT)
    bundle = settings.data_dir.resolve() / DEMO_BUNDLE
    build = Child(
        "engines build",
        ["-m", "engines", "build", student, "--out", str(bundle), "--if-needed"],
        child_environment(),
        report=say,
    )
    status = await build.run_once()
    if status != 0:
        raise LaunchError(f"the demo student's bundle was not built: status {status}", EXIT_FAILURE)
    return [bundle]


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


def plan_children(
    settings: Settings, bundles: Sequence[Path], redis_url: str, listener: socket.socket
) -> list[Child]:
    """The api process, then the workers. Bundles are dealt out in turn, so each has at least one worker.

    Raises:
        LaunchError: a bundle's manifest cannot be read.
    """
    for bundle in bundles:
        try:
            read_manifest(bundle)
        except EngineError as error:
            raise LaunchError(f"{bundle}: {error} (TDM_BUNDLES)") from error
    num_workers = settings.workers or count_workers(len(os.sched_getaffinity(0)))
    shared = {"redis_url": redis_url, "data_dir": settings.data_dir.resolve()}
    api = Child(
        "api",
        ["-m", "server", "api"],
        child_environment(**shared, listen_fd=listener.fileno()),
        pass_fds=[listener.fileno()],
        report=say,
    )
    limits = dict.fromkeys(THREAD_LIMITS, settings.worker_threads)
    workers = [
        Child(
            f"worker {index}",
            ["-m", "server", "worker"],
            child_environment(**shared, **limits, worker_index=index, bundles=bundles[index % len(bundles)]),
            report=say,
        )
        for index in range(max(num_workers, len(bundles)))
    ]
    return [api, *workers]


def count_workers(num_cores: int) -> int:
    """Workers to start when TDM_WORKERS leaves it open: one per core, up to `MAX_CPU_WORKERS`.

    Bundles run on the CPU today, where several single-threaded workers draw more than one with several
    threads.
    """
    return max(1, min(num_cores, MAX_CPU_WORKERS))


@asynccontextmanager
async def _redis(settings: Settings) -> AsyncIterator[str]:
    """URL of the Redis to use: the given one, or an embedded Valkey that is watched while this lasts."""
    if settings.redis_url:
        yield settings.redis_url
        return
    valkey = EmbeddedValkey(settings.data_dir)
    url = valkey.start()
    watching = asyncio.create_task(_keep_alive(valkey))
    try:
        yield url
    finally:
        watching.cancel()
        valkey.stop()


async def _keep_alive(valkey: EmbeddedValkey) -> None:
    """Start the Valkey again when it died; its append-only file still has every accepted job.

    `start` runs on this thread on purpose: the kernel ends the server with the thread that started it.
    """
    while True:
        await asyncio.sleep(VALKEY_CHECK_S)
        if valkey.owned and _has_exited(valkey.pid):
            say("valkey died; starting it again")
            try:
                valkey.start()
            except EmbeddedValkeyError as error:
                say(f"valkey: {error}", file=sys.stderr)


def _has_exited(pid: int | None) -> bool:
    """Whether a child process has ended, without taking its exit status from who waits for it."""
    return pid is not None and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


async def announce(listener: socket.socket, *, num_workers: int) -> None:
    """Print the one line that people and scripts wait for, once `num_workers` workers are up."""
    waited_s = 0.0
    reminder_s = READY_REMINDER_S
    while True:
        readiness = await fetch_readiness(listener)
        models = readiness.get("models", {})
        live = sum(model["workers"] for model in models.values())
        if live >= num_workers:
            break
        if waited_s >= reminder_s:
            say(f"waiting: {live} of {num_workers} workers are up")
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


async def _kill_on(hurry: asyncio.Event, children: Sequence[Child]) -> None:
    await hurry.wait()
    for child in children:
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
    """Print one line for the operator."""
    out = file or sys.stdout
    out.write(line + "\n")
    out.flush()
