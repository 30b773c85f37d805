"""What the benchmark asks of a queue: a client in one process, a worker in another, and what they promise."""

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

Engine = Callable[[Mapping[str, Any]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promises:
    """What a queue says about a job once `enqueue` has returned, in the settings of the benchmark.

    Read in the sources of the versions that constraints.txt names.

    Attributes:
        acknowledged: when a worker's job leaves the queue.
        killed_worker: what becomes of the job of a worker that got SIGKILL, and when.
        heartbeat: how a long job shows that it still runs.
        same_job_twice: what a repeated enqueue does, say after a lost reply.
        one_result: whether a second execution can change a result that a client has seen.
        poison: what ends a job that kills its worker every time.
        waiting: how the client learns that the result is there.
    """

    acknowledged: str
    killed_worker: str
    heartbeat: str
    same_job_twice: str
    one_result: str
    poison: str
    waiting: str


class Client(Protocol):
    """One process's connection to a queue, for many coroutines at once."""

    async def enqueue(self, serial: int) -> Any:
        """Hand in job `serial`; returns a handle once the server has it."""

    async def result(self, handle: Any) -> Any:
        """The job's result, waited for."""


class Contender(Protocol):
    """A queue under test."""

    name: str
    promises: Promises
    distributions: tuple[str, ...]
    settings: Mapping[str, Any]

    def client(self, url: str, *, in_flight: int) -> AbstractAsyncContextManager[Client]:
        """A client that at most `in_flight` coroutines use at once."""

    def serve(self, url: str, engine: Engine) -> None:
        """Run one worker process until SIGTERM."""
