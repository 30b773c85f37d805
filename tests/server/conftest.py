"""Real Redis servers for the tests: the embedded Valkey, and Debian's redis-server where installed."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
import redis

from engines.bundle.bucket import Bucket
from server.job import UNMEASURED_MS, GenerationRequest, Job, JobKind, Priority, new_job
from server.queue.connection import connect
from server.queue.job_queue import JobQueue
from server.queue.keys import GROUP
from server.queue.records import WorkerInfo
from server.queue.worker_queue import WorkerQueue
from server.supervisor.valkey import EmbeddedValkey, die_with_parent

if TYPE_CHECKING:
    from tests.server.collector import Collector

MODEL = "scenes"
VERSION = "0123456789ab"
STREAM = f"q:2:{{{MODEL}}}:s:{VERSION}"

T = TypeVar("T")

# Modules that assert for the tests: their failures are explained as those of tests are.
pytest.register_assert_rewrite(
    "tests.server.api.running",
    "tests.server.api.videos",
    "tests.server.queue.model",
    "tests.server.queue.verbs",
    "tests.server.worker.running",
)


def poll(look: Callable[[], T], *, timeout_s: float = 120.0) -> T:
    """The first truthy answer of `look`."""
    deadline = time.monotonic() + timeout_s
    pace_s = pace()
    while not (found := look()):
        assert time.monotonic() < deadline, f"still {found!r} after {timeout_s} s"
        time.sleep(next(pace_s))  # the pace of the polling, not a synchronisation
    return found


def pace() -> Iterator[float]:
    """Seconds between looks: soon at first, then seldom, which leaves the machine to those looked at."""
    pause_s = 0.005
    while True:
        yield pause_s
        pause_s = min(1.3 * pause_s, 0.2)


async def poll_async(look: Callable[[], Awaitable[bool]], *, timeout_s: float = 120.0) -> None:
    """Return once `look` says yes."""
    pace_s = pace()
    async with asyncio.timeout(timeout_s):
        while not await look():  # noqa: ASYNC110 - the other side is another process: it sets no event of ours
            await asyncio.sleep(next(pace_s))  # the pace of the polling, not a synchronisation


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_ms = 1_800_000_000_000

    def __call__(self) -> int:
        return self.now_ms


@pytest.fixture(scope="session")
def valkey_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded Valkey; it need not sync each write to disk, no test cuts the power."""
    with EmbeddedValkey(tmp_path_factory.mktemp("valkey"), appendfsync="everysec") as server:
        yield server.url


@pytest.fixture(scope="session")
def debian_redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's redis-server: the oldest version we serve, and not Valkey."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed (apt install redis-server)")
    folder = tmp_path_factory.mktemp("redis")
    socket = folder / "redis.sock"
    options = [
        "--appendonly",
        "yes",
        "--save",
        "",
        "--maxmemory-policy",
        "noeviction",
    ]
    process = subprocess.Popen(
        [binary, "--port", "0", "--unixsocket", str(socket), "--dir", str(folder), *options],
        stdout=subprocess.DEVNULL,
        preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, looked up before the fork
    )
    poll(lambda: _answers(f"unix://{socket}"))
    yield f"unix://{socket}"
    process.terminate()
    process.wait()


@pytest.fixture
def collector() -> Iterator["Collector"]:
    """Where traces may be sent."""
    from tests.server.collector import Collector  # OpenTelemetry, for the few who want it

    with Collector() as collector:
        yield collector


def _answers(url: str) -> bool:
    """True once the server listens; its socket file is there a moment before."""
    client = connect(url)
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False
    finally:
        client.close()


@pytest.fixture(params=["valkey", "redis"])
def redis_url(request: pytest.FixtureRequest) -> str:
    """Each server in turn, emptied and with its default limits."""
    url: str = request.getfixturevalue({"valkey": "valkey_url", "redis": "debian_redis_url"}[request.param])
    client = connect(url)
    client.flushall()
    client.config_set("maxmemory", 0)
    client.close()
    return url


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A plain client, to look behind the verbs."""
    client = connect(redis_url)
    yield client
    client.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def queue(redis_url: str, clock: Clock) -> AsyncIterator[JobQueue]:
    """An api process's queue, without its periodic sweep: tests call `sweep` themselves."""
    queue = JobQueue(redis_url, clock=clock)
    yield queue
    await queue.close()


@pytest.fixture
def make_worker(redis_url: str, clock: Clock) -> Iterator[Callable[..., WorkerQueue]]:
    """Worker queues, announced unless told otherwise."""
    made: list[WorkerQueue] = []

    def make(
        name: str = "w1", *, max_batch: int = 8, announce: bool = True, version: str = VERSION
    ) -> WorkerQueue:
        worker = WorkerQueue(redis_url, model=MODEL, version=version, consumer=name, clock=clock)
        made.append(worker)
        if announce:
            worker.beat(worker_info(name, max_batch=max_batch, version=version), "{}")
        return worker

    yield make
    for worker in made:
        worker.close()


@pytest.fixture
def new(clock: Clock) -> Callable[..., Job]:
    """Queued jobs as the api makes them."""

    def make(
        prompt: str = "a red cube",
        *,
        tenant: str = "public",
        priority: Priority = Priority.NORMAL,
        deadline_s: float = 60,
        kind: JobKind = JobKind.IMAGE,
        cost_ms: float | None = None,
        **request: Any,
    ) -> Job:
        return new_job(
            kind=kind,
            model=MODEL,
            request=request_of(prompt, fps=8 if kind is JobKind.VIDEO else None, **request),
            now_ms=clock.now_ms,
            deadline_ms=clock.now_ms + int(deadline_s * 1000),
            tenant=tenant,
            priority=priority,
            cost_ms=cost_ms,
        )

    return make


def request_of(prompt: str, **request: Any) -> GenerationRequest:
    """A request as the api makes it."""
    plain: dict[str, Any] = {"bucket": Bucket(64, 64), "seed": 7, "num_steps": 4, "output_format": "png"}
    return GenerationRequest(prompt=prompt, **{**plain, **request})


def worker_info(name: str, *, max_batch: int = 8, version: str = VERSION, **offer: Any) -> WorkerInfo:
    return WorkerInfo(
        id=name,
        model=MODEL,
        kind="image",
        version=version,
        backend="eager",
        max_batch=max_batch,
        batch_ms=max_batch * UNMEASURED_MS,
        pid=1,
        host="here",
        started_ms=0,
        **offer,
    )


def let_leases_lapse(client: redis.Redis, *, stream: str = STREAM, idle_ms: int = 60_000) -> None:
    """Make every lease as old as if nobody had extended it for `idle_ms`."""
    pending: Any = client.xpending_range(stream, GROUP, "-", "+", 1000)
    for entry in pending:
        client.xclaim(stream, GROUP, entry["consumer"], 0, [entry["message_id"]], idle=idle_ms, justid=True)


def socket_of(url: str) -> Path:
    """The unix socket behind a `unix://` URL."""
    return Path(url.removeprefix("unix://"))
