"""`python -m server up`: this machine's Valkey, api process and workers, started, watched, ended together.

The supervisor holds the listening socket: the port is known to be free before anything starts, and clients
wait instead of failing while a dead api process is replaced. It imports no torch and answers no request.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from server.queue.errors import QueueError
from server.queue.routes import Routes
from server.settings import Settings, child_environment
from server.supervisor.bundles import plan_posts, prepare_bundles, prepare_more_bundles, shipped_bundles
from server.supervisor.child import FIRST_BACKOFF_S, Child
from server.supervisor.fleet import Fleet
from server.supervisor.ready import announce
from server.supervisor.report import EXIT_FAILURE, LaunchError, say
from server.supervisor.valkey import EmbeddedValkey, EmbeddedValkeyError

BACKLOG = 2048
API_GRACE_S = 10.0
API_FIRST_BACKOFF_S = 0.1
API_MAX_BACKOFF_S = 5.0
VALKEY_CHECK_S = 1.0
VALKEY_MAX_BACKOFF_S = 5.0


THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

T = TypeVar("T")


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
            plan_posts(settings, bundles, shipped_bundles(settings)),
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
        announcing = asyncio.create_task(_announce_all(settings, listener, api, fleet))
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


def hire(settings: Settings, redis_url: str, bundle: Path, index: int, gpu: str) -> Child:
    """A worker for one bundle; `gpu`: the only one it sees, or ""."""
    limits = dict.fromkeys(THREAD_LIMITS, settings.worker_threads)
    device = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
    environment = child_environment(
        redis_url=redis_url,
        data_dir=settings.data_dir.resolve(),
        worker_index=index,
        bundles=bundle,
        **limits,
        **device,
    )
    return Child(f"worker {index}", ["-m", "server", "worker"], environment, report=say)


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


async def _announce_all(settings: Settings, listener: socket.socket, api: Child, fleet: Fleet) -> None:
    """Say that the system is ready, and again with each model that comes later."""
    await _announce(listener, api, fleet)
    async for bundle in prepare_more_bundles(settings):
        try:
            posts = plan_posts(settings, [bundle], shipped_bundles(settings))
        except LaunchError as error:
            say(f"error: {error}; it is not served", file=sys.stderr)
            continue
        await fleet.add(posts)
        await _announce(listener, api, fleet)


async def _announce(listener: socket.socket, api: Child, fleet: Fleet) -> None:
    """Say that the system is ready once it is. What serves then is set up well, and is started again whatever
    becomes of it.
    """
    await announce(listener, num_workers=lambda: fleet.num_left)
    for child in [api, *fleet.workers]:
        child.proven = True


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
