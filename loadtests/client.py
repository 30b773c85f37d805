"""Measure a server over HTTP: one request at a time, a closed loop of many clients, or an open loop."""

import asyncio
import base64
import io
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp
from PIL import Image

ROUTE = "/v1/images/generations"


class BadReplyError(Exception):
    """The server answered something else than a picture of the right size."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered request; times are of `time.perf_counter()`."""

    started_s: float
    ended_s: float
    status: int
    body: bytes

    @property
    def latency_ms(self) -> float:
        """First byte out to last byte in."""
        return (self.ended_s - self.started_s) * 1000

    def picture(self, size: tuple[int, int]) -> Image.Image:
        """Decode the picture in full.

        Args:
            size: width and height that it must have.
        Raises:
            BadReplyError: the reply is an error, not a PNG, damaged, or of another size.
        """
        if self.status != 200:
            raise BadReplyError(f"status {self.status}: {self.body[:300]!r}")
        try:
            data = json.loads(self.body)["data"]
            image = Image.open(
                io.BytesIO(base64.b64decode(data[0]["b64_json"], validate=True)), formats=["PNG"]
            )
            image.load()
        except (KeyError, IndexError, TypeError, ValueError, OSError) as error:
            raise BadReplyError(f"no PNG in the reply: {error!r}; {self.body[:200]!r}") from error
        if image.size != size:
            raise BadReplyError(f"picture is {image.size}, asked for {size}")
        return image


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Latencies of one measurement, ms."""

    num_requests: int
    p50_ms: float
    p95_ms: float
    max_ms: float

    @classmethod
    def of(cls, replies: Sequence[Reply]) -> "Latency":
        """Summarise at least two replies."""
        latencies = [reply.latency_ms for reply in replies]
        cuts = statistics.quantiles(latencies, n=20, method="inclusive")
        return cls(
            num_requests=len(latencies),
            p50_ms=round(statistics.median(latencies), 1),
            p95_ms=round(cuts[18], 1),
            max_ms=round(max(latencies), 1),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Saturation:
    """A closed loop: `concurrency` clients, each asking for its next picture when it has the last."""

    concurrency: int
    seconds: float
    pictures_per_s: float
    client_cpu_ms: float
    """CPU time the measuring process itself spent on each request, on the server's machine."""
    latency: Latency


MIN_MEASURED = 2
"""Replies without which there are no quantiles."""


class LoadClient:
    """HTTP client for one server, every connection kept open.

    aiohttp, because it shares the machine with the server: 0.2 ms of CPU a request where httpx takes 2.7.
    """

    def __init__(self, base_url: str, *, size: tuple[int, int], timeout_s: float = 120.0) -> None:
        self.size = size
        self._http = aiohttp.ClientSession(
            base_url,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close all connections."""
        await self._http.close()

    async def ask(self, body: dict[str, Any], started_s: float | None = None) -> Reply:
        """Send one request and read the whole reply, whatever its status.

        Args:
            started_s: from when its time counts; None: from now.
        """
        started_s = time.perf_counter() if started_s is None else started_s
        async with self._http.post(ROUTE, json=body) as response:
            content = await response.read()
        return Reply(started_s, time.perf_counter(), response.status, content)

    async def pictures(self, bodies: Sequence[dict[str, Any]]) -> list[Image.Image]:
        """The pictures for these requests, asked for one by one.

        Raises:
            BadReplyError: as in `Reply.picture`.
        """
        return [(await self.ask(body)).picture(self.size) for body in bodies]

    async def idle_latency(self, bodies: Iterator[dict[str, Any]], *, num_requests: int) -> Latency:
        """Latency of single requests to a server that has nothing else to do.

        Raises:
            BadReplyError: a reply is not a picture.
        """
        replies = [await self.ask(next(bodies)) for _ in range(num_requests)]
        self._check(replies)
        return Latency.of(replies)

    async def saturate(
        self, bodies: Iterator[dict[str, Any]], *, concurrency: int, warm_up_s: float, seconds: float
    ) -> Saturation:
        """Throughput of a closed loop.

        Only replies that end within the measured window count; it opens after the warm-up, and stays open
        until two have ended in it, however slow the server is. They are decoded when it has closed, so that
        checking them costs the server nothing.

        Raises:
            BadReplyError: a reply is not a picture.
        """
        replies: list[Reply] = []
        after_warm_up: list[Reply] = []
        opens_s = time.perf_counter() + warm_up_s
        closes_s = opens_s + seconds

        async def client() -> None:
            while time.perf_counter() < closes_s or len(after_warm_up) < MIN_MEASURED:
                reply = await self.ask(next(bodies))
                replies.append(reply)
                if reply.ended_s >= opens_s:
                    after_warm_up.append(reply)

        cpu_before_s = time.process_time()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        cpu_s = time.process_time() - cpu_before_s

        self._check(replies)
        closes_s = max(closes_s, after_warm_up[MIN_MEASURED - 1].ended_s)
        counted = [reply for reply in after_warm_up if reply.ended_s <= closes_s]
        return Saturation(
            concurrency=concurrency,
            seconds=round(closes_s - opens_s, 3),
            pictures_per_s=round(len(counted) / (closes_s - opens_s), 2),
            client_cpu_ms=round(cpu_s / len(replies) * 1000, 2),
            latency=Latency.of(counted),
        )

    async def offer(
        self,
        bodies: Iterator[dict[str, Any]],
        *,
        rate_per_s: float,
        seconds: float,
        patience_s: float,
        seed: int,
    ) -> list[Reply]:
        """An open loop: requests come at random moments (a Poisson process), however the server keeps up.

        Their time counts from the moment at which they were due, also if this process was late itself.

        Args:
            rate_per_s: mean rate.
            seconds: how long they come.
            patience_s: what is not answered so long after the last has come is given up.
            seed: of the moments.

        Returns:
            A reply to each, in their order; status 0 where there is none.
        """
        rng, began_s, due_s = random.Random(seed), time.perf_counter(), 0.0
        moments: list[float] = []
        tasks: list[asyncio.Task[Reply]] = []
        while (due_s := due_s + rng.expovariate(rate_per_s)) < seconds:
            moments.append(began_s + due_s)
            await asyncio.sleep(max(0.0, moments[-1] - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(next(bodies), moments[-1])))
        if not tasks:
            return []
        _, unanswered = await asyncio.wait(tasks, timeout=patience_s)
        for task in unanswered:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        ended_s = time.perf_counter()
        return [
            one if isinstance(one, Reply) else Reply(started_s, ended_s, 0, b"")
            for started_s, one in zip(moments, done, strict=True)
        ]

    def _check(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            reply.picture(self.size)
