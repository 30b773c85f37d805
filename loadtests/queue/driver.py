"""The client process of one round: hands in jobs, waits for their results, checks them, prints what it saw.

    python -m loadtests.queue.driver NAME URL DIRECTORY PLAN    PLAN: JSON of `Plan`; prints JSON of `Round`

It starts the worker process itself, after the jobs of the first phase are in the queue.
"""

import asyncio
import itertools
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from loadtests.queue.contender import Client, Contender
from loadtests.queue.contenders import contender
from loadtests.queue.task import Executions, WrongResultError, check
from server.supervisor.valkey import die_with_parent

ROOT = Path(__file__).resolve().parent.parent.parent
WARM_UP_ROUND_TRIPS = 5
STOP_TIMEOUT_S = 60.0
RESULT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how hard to measure in one round.

    Attributes:
        burst: jobs handed in while no worker runs, by the first `in_flight` coroutines.
        idle_s: how long to measure round trips one after another.
        warm_up_s: before each saturated window.
        seconds: each saturated window.
        in_flight: coroutines that each hand in a job and wait for its result.
    """

    burst: int
    idle_s: float
    warm_up_s: float
    seconds: float
    in_flight: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Round trips: from handing in a job to its result in the client's hands, ms."""

    num_jobs: int
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """A closed loop. CPU is that of this process and of the worker, for each job."""

    jobs_per_s: float
    client_cpu_ms: float
    latency: Latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One queue, on an empty server of its own, measured once.

    Attributes:
        enqueued_per_s: jobs accepted a second while no worker ran.
        num_jobs: handed in, executed, and with the right result.
        num_repeated: executions beyond one for each job, which at-least-once allows.
    """

    enqueued_per_s: float
    idle: Latency
    saturated: dict[int, Saturation]
    num_jobs: int
    num_repeated: int


@dataclass(frozen=True, slots=True)
class _RoundTrip:
    started_s: float
    ended_s: float


class Driver:
    """The phases of a round, over one contender."""

    def __init__(self, subject: Contender, url: str, directory: Path, plan: Plan) -> None:
        self._subject = subject
        self._url = url
        self._plan = plan
        self._executions = directory / "executions"
        self._log = directory / "worker.log"
        self._serials = itertools.count()
        self._num_jobs = 0

    async def run(self) -> Round:
        """All phases.

        Raises:
            WrongResultError: a result was wrong, or a job was not executed.
        """
        in_flight = self._plan.in_flight[0]
        saturated: dict[int, Saturation] = {}
        with Executions(self._executions) as executions:
            async with self._subject.client(self._url, in_flight=in_flight) as client:
                handles, enqueued_per_s = await self._burst(client, in_flight)
                with self._worker():
                    await self._collect(client, handles, in_flight)
                    async with self._subject.client(self._url, in_flight=1) as alone:
                        idle = await self._idle(alone)
                    for level in self._plan.in_flight:
                        async with self._subject.client(self._url, in_flight=level) as many:
                            saturated[level] = await self._saturate(many, level)
            num_executed = executions.count()
        if num_executed < self._num_jobs:
            raise WrongResultError(f"{self._num_jobs} jobs handed in, {num_executed} executed")
        return Round(
            enqueued_per_s=enqueued_per_s,
            idle=idle,
            saturated=saturated,
            num_jobs=self._num_jobs,
            num_repeated=num_executed - self._num_jobs,
        )

    async def _burst(self, client: Client, in_flight: int) -> tuple[list[tuple[int, Any]], float]:
        """Jobs handed in while nobody works, and how many a second."""
        handles: list[tuple[int, Any]] = []

        async def hand_in(count: int) -> None:
            for _ in range(count):
                serial = self._next()
                handles.append((serial, await client.enqueue(serial)))

        started_s = time.perf_counter()
        share = math.ceil(self._plan.burst / in_flight)
        await asyncio.gather(*(hand_in(share) for _ in range(in_flight)))
        return handles, round(len(handles) / (time.perf_counter() - started_s), 1)

    async def _collect(self, client: Client, handles: Sequence[tuple[int, Any]], in_flight: int) -> None:
        """The results of the burst."""
        waiting = iter(handles)

        async def collect() -> None:
            for serial, handle in waiting:
                async with asyncio.timeout(RESULT_TIMEOUT_S):
                    check(serial, await client.result(handle))

        await asyncio.gather(*(collect() for _ in range(in_flight)))

    async def _idle(self, client: Client) -> Latency:
        for _ in range(WARM_UP_ROUND_TRIPS):
            await self._round_trip(client)
        trips: list[_RoundTrip] = []
        closes_s = time.perf_counter() + self._plan.idle_s
        while len(trips) < 2 or time.perf_counter() < closes_s:
            trips.append(await self._round_trip(client))
        return _latency(trips)

    async def _saturate(self, client: Client, in_flight: int) -> Saturation:
        trips: list[_RoundTrip] = []
        opens_s = time.perf_counter() + self._plan.warm_up_s
        closes_s = opens_s + self._plan.seconds

        async def caller() -> None:
            while time.perf_counter() < closes_s:
                trips.append(await self._round_trip(client))

        cpu_before_s = time.process_time()
        await asyncio.gather(*(caller() for _ in range(in_flight)))
        cpu_s = time.process_time() - cpu_before_s
        # A window shorter than one round trip, as on a busy machine, goes on until a first one ends.
        closes_s = max(closes_s, min(trip.ended_s for trip in trips if trip.ended_s >= opens_s))
        counted = [trip for trip in trips if opens_s <= trip.ended_s <= closes_s]
        return Saturation(
            jobs_per_s=round(len(counted) / (closes_s - opens_s), 1),
            client_cpu_ms=round(cpu_s / len(trips) * 1000, 3),
            latency=_latency(counted),
        )

    async def _round_trip(self, client: Client) -> _RoundTrip:
        serial = self._next()
        started_s = time.perf_counter()
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            result = await client.result(await client.enqueue(serial))
        ended_s = time.perf_counter()
        check(serial, result)
        return _RoundTrip(started_s, ended_s)

    def _next(self) -> int:
        self._num_jobs += 1
        return next(self._serials)

    @contextmanager
    def _worker(self) -> Iterator[None]:
        """The contender's worker process, for as long as the block runs."""
        command = [sys.executable, "-m", "loadtests.queue.worker", self._subject.name, self._url]
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*command, str(self._executions)],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent(),  # noqa: PLW1509 - one prctl call, looked up before the fork
            )
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _latency(trips: Sequence[_RoundTrip]) -> Latency:
    """Median and 99th percentile, both of them latencies that occurred.

    Raises:
        WrongResultError: no round trip ended in the window.
    """
    if not trips:
        raise WrongResultError("no job was finished within the measured window")
    latencies = sorted((trip.ended_s - trip.started_s) * 1000 for trip in trips)
    return Latency(
        num_jobs=len(latencies),
        p50_ms=round(latencies[len(latencies) // 2], 3),
        p99_ms=round(latencies[math.ceil(0.99 * len(latencies)) - 1], 3),
    )


def main(name: str, url: str, directory: str, plan: str) -> None:
    """Measure one round and print it as one line of JSON."""
    options = json.loads(plan)
    made = Plan(**{**options, "in_flight": tuple(options["in_flight"])})
    driver = Driver(contender(name), url, Path(directory), made)
    result = uvloop.run(driver.run())
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main(*sys.argv[1:])
