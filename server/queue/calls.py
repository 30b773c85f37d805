"""Calls: what several coroutines ask of Redis at the same time, sent as one pipeline.

With `appendfsync always` Redis syncs the disk once for everything that it finds on its connections, so calls
that travel together share one sync, and the cost of a round trip. One that is alone leaves at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import redis.asyncio
from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as NoAnswerError

from server.queue.ops import Observe, observe_nothing, timed
from server.queue.scripts import script, script_sha

MAX_PIPELINE = 256
# While this many pipelines are on their way, further calls gather for the next.
MAX_UNDERWAY = 2
# A Redis that has said nothing at all for this long hangs: who waits for it is told so now, all at once,
# instead of one after the other when their turn on a connection has come and has timed out.
SILENCE_S = 2.0
# The loop may have been late itself: what has arrived by then is yet to be read.
GRACE_S = 0.1

T = TypeVar("T")
Command = tuple[str | int, ...]


class Calls:
    """Commands and verbs of one event loop. They have no order: who needs one waits for the reply."""

    def __init__(self, client: redis.asyncio.Redis, observe: Observe = observe_nothing) -> None:
        """Sends nothing by itself."""
        self._redis = client
        self._observe = observe
        self._waiting: list[tuple[Command, asyncio.Future[Any]]] = []
        self._underway: set[asyncio.Task[None]] = set()
        self._loading: dict[str, asyncio.Future[Any]] = {}
        self._heard_at = 0.0
        self._asked: dict[asyncio.Future[Any], float] = {}
        self._check: asyncio.TimerHandle | None = None

    async def verb(self, verb: str, prefix: str, *args: str | int) -> Any:
        """Run lua/<verb>.lua on the class with this key prefix.

        Raises:
            RedisError: also if only this call of the pipeline failed.
        """
        call: Command = ("EVALSHA", script_sha(verb), 1, prefix, *args)
        with timed(self._observe, verb):
            try:
                return await self._replied(call)
            except NoScriptError:  # a server that was restarted, or never saw it
                await self._load(verb)
                return await self._replied(call)

    async def _load(self, verb: str) -> None:
        """Load a script, once for all calls that have just missed it."""
        if verb not in self._loading:
            self._loading[verb] = loading = asyncio.ensure_future(
                self._replied(("SCRIPT LOAD", script(verb)))
            )
            loading.add_done_callback(lambda _: self._loading.pop(verb))
        await asyncio.shield(self._loading[verb])  # a caller that is cancelled leaves it to the others

    async def command(self, *command: str | int) -> Any:
        """Run one command; its reply is what the client's method of that name returns.

        Raises:
            RedisError: also if only this command of the pipeline failed.
        """
        with timed(self._observe, str(command[0]).lower()):
            return await self._replied(command)

    async def _replied(self, command: Command) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((command, future))
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._send)
        try:
            return await self._unless_silent(future)
        finally:
            future.cancel()  # of no effect once it is done; else its reply is for nobody

    async def unless_silent(self, op: str, reply: Awaitable[T]) -> T:
        """Wait for a reply from Redis as long as any come at all.

        Args:
            op: what was asked, by its name in `API_OPS`.
            reply: will be there when it was answered.

        Raises:
            redis.exceptions.TimeoutError: none came for `SILENCE_S`.
        """
        task = asyncio.ensure_future(reply)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task.add_done_callback(lambda _: _pass_on(task, future))
        try:
            with timed(self._observe, op):
                return await self._unless_silent(future)
        finally:
            task.cancel()

    async def _unless_silent(self, future: asyncio.Future[T]) -> T:
        """Wait for a future that the silence check may fail. One timer serves all who wait."""
        loop = asyncio.get_running_loop()
        self._asked[future] = asked_at = loop.time()
        if self._check is None:
            self._check = loop.call_later(SILENCE_S, self._check_silence)
        try:
            result = await future
        finally:
            del self._asked[future]
        self._heard_at = max(self._heard_at, asked_at)
        return result

    def _check_silence(self, suspected: Sequence[asyncio.Future[Any]] = ()) -> None:
        """Tell all who have waited for `SILENCE_S` while nothing was heard, once a moment has confirmed it.

        Args:
            suspected: found by the check of a moment ago.
        """
        loop = asyncio.get_running_loop()
        self._check = None
        if not self._asked:
            return  # the next one to wait starts it again
        horizon = loop.time() - SILENCE_S
        is_silent = self._heard_at < horizon
        if is_silent:
            for future in suspected:
                if future in self._asked and not future.done():
                    future.set_exception(NoAnswerError(f"Redis has not answered for {SILENCE_S:g} s"))
        late = [future for future, asked_at in self._asked.items() if asked_at <= horizon and is_silent]
        late = [future for future in late if not future.done()]
        if late:
            self._check = loop.call_later(GRACE_S, self._check_silence, late)
            return
        # The first moment at which one of them can have waited for so long without a word.
        oldest = next((at for future, at in self._asked.items() if not future.done()), loop.time())
        due_at = max(oldest, self._heard_at) + SILENCE_S
        self._check = loop.call_at(due_at, self._check_silence)

    async def close(self) -> None:
        """Cancel whoever still waits for a reply."""
        if self._check is not None:
            self._check.cancel()
            self._check = None
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        tasks = self._underway
        while tasks:
            for task in tasks:
                task.cancel()
            # Again and again: before Python 3.12 asyncio.wait_for, inside redis-py, can swallow a cancel.
            _, tasks = await asyncio.wait(tasks, timeout=0.1)

    def _send(self) -> None:
        # Whoever no longer waits has told a client that it was not done, and so it should not be.
        self._waiting = [call for call in self._waiting if not call[1].done()]
        while self._waiting and len(self._underway) < MAX_UNDERWAY:
            batch, self._waiting = self._waiting[:MAX_PIPELINE], self._waiting[MAX_PIPELINE:]
            task = asyncio.create_task(self._execute(batch), name="queue calls")
            self._underway.add(task)
            task.add_done_callback(self._arrived)

    def _arrived(self, task: asyncio.Task[None]) -> None:
        self._underway.discard(task)
        self._send()

    async def _execute(self, batch: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for command, _ in batch:
            pipeline.execute_command(*command)
        try:
            replies = await pipeline.execute(raise_on_error=False)
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the callers' to handle
            replies = [error] * len(batch)
        else:
            self._heard_at = asyncio.get_running_loop().time()
        for (_, future), reply in zip(batch, replies, strict=True):
            if future.done():  # its caller was cancelled
                continue
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)


def _pass_on(task: asyncio.Future[T], future: asyncio.Future[T]) -> None:
    """Have a future end as a task did; its error is retrieved in any case."""
    error = None if task.cancelled() else task.exception()
    if future.done():
        return
    if task.cancelled():
        future.cancel()
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())
