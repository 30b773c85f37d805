"""Catalog: the models that can be asked for, as workers announced them in Redis, with the load on each.

The api process needs no bundle files: a worker publishes its manifest when it starts, and it stays known
after that.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import Manifest
from server.api.admission import Load
from server.api.errors import ModelNotFoundError, NoWorkerError, WrongKindError
from server.cost import batch_cost
from server.job import JobKind
from server.queue.errors import QueueError
from server.queue.job_queue import JobQueue
from server.queue.records import QueueStats
from server.queue.routes import common_ground

MAX_AGE_S = 0.5
PATIENCE_S = 0.5
"""How long a request waits for a fresh catalogue when there is an older one."""
FAILURE_AGE_S = 1.0
"""How long a failed read is remembered, so that nobody waits for the next one."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model at one moment."""

    manifest: Manifest
    stats: QueueStats

    @property
    def name(self) -> str:
        """The model's name, which is also its queue class."""
        return self.manifest.name

    @property
    def kind(self) -> JobKind:
        """What it generates."""
        return JobKind(self.manifest.kind)

    @property
    def examples(self) -> list[str]:
        """Prompts that show what it can draw, as its student's maker chose them."""
        return [str(prompt) for prompt in self.manifest.student.get("examples", ())]

    @property
    def backends(self) -> list[str]:
        """What its live workers run it with."""
        return sorted({worker.backend for worker in self.stats.workers})

    @property
    def load(self) -> Load:
        """What admission needs to know."""
        workers = self.stats.workers
        return Load(
            waiting=self.stats.total_waiting,
            waiting_ms=self.stats.waiting_ms,
            running_ms=self.stats.running_ms,
            num_workers=len(workers),
            pace=self.stats.pace.ratio,
            beside_ms=self.stats.pace.beside_ms,
            margin=self.stats.margin,
            max_batch=min((worker.max_batch for worker in workers), default=max(self.manifest.batch_sizes)),
        )

    def batch_ms(self, bucket: Bucket, num_steps: int) -> Callable[[int], float] | None:
        """Predicted time of a batch by its number of samples; None if nothing of the kind was measured.

        Workers may run another backend than the fastest that was measured; what runs decides.
        """
        backends = [*(worker.backend for worker in self.stats.workers), self.manifest.backend]
        return batch_cost(self.manifest, bucket, num_steps, backends)


class Catalog:
    """Reads models and their load from the queue; what it read stays good for `MAX_AGE_S`.

    So a flood of requests that will be refused costs Redis nothing. The caps that must hold exactly are kept
    by the enqueue script itself. While Redis does not answer, what was read last serves on: which models
    there are hardly ever changes, and the request will be refused anyway.
    """

    def __init__(self, queue: JobQueue, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._clock = clock
        self._models: dict[str, ServedModel] = {}
        self._read_at = -float("inf")
        self._failed_at = -float("inf")
        self._reading: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Stop reading."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait({self._reading})

    async def models(self, *, max_age_s: float = MAX_AGE_S) -> dict[str, ServedModel]:
        """Every known model by its name.

        Args:
            max_age_s: older than this is read anew; 0 takes nothing else, not even while Redis is away.

        Raises:
            QueueError: Redis does not answer, and nothing that was read before will do.
        """
        if self._clock() - self._read_at <= max_age_s:
            return self._models
        if max_age_s <= 0:
            if self._is_reading:  # began before we asked, and may have missed what we came for
                await self._read_once()
            await self._read_once()
        elif not self._models:
            await self._read_once()
        elif self._clock() - self._failed_at > FAILURE_AGE_S:
            with suppress(QueueError, TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    await self._read_once()
        return self._models

    @property
    def _is_reading(self) -> bool:
        return self._reading is not None and not self._reading.done()

    async def _read_once(self) -> None:
        """One read for all who ask meanwhile; it goes on when they leave."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._refresh(), name="catalog")
            # its error is for those who wait for it, if any
            self._reading.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(self._reading)

    async def _refresh(self) -> None:
        try:
            self._models = await self._read()
        except QueueError:
            self._failed_at = self._clock()
            raise
        self._read_at = self._clock()

    async def find(self, name: str | None, *, kind: JobKind) -> ServedModel:
        """The model called `name`, or without a name the first one of this kind, live ones first.

        Raises:
            ModelNotFoundError: there is no such model, or none at all of this kind.
            WrongKindError: the model called `name` is of another kind.
            NoWorkerError: no name was given, and no worker has announced any model yet.
        """
        for max_age_s in (MAX_AGE_S, 0.0):  # a worker may have announced the model a moment ago
            for model in await self._of_kind(kind, max_age_s):
                if name in (None, model.name):
                    return model
        models = await self.models()
        if name is None and not models:
            raise NoWorkerError(f"no worker has announced a model for {kind}s yet", retry_after_ms=1000)
        if name is None:
            raise ModelNotFoundError(
                f"this server serves no {kind} model; GET /v1/models lists what it serves", param="model"
            )
        if name in models:
            other = models[name].kind
            raise WrongKindError(
                f"{name} is a model for {other}s; use POST /v1/{other}s, or another model", param="model"
            )
        served = ", ".join(model.name for model in await self._of_kind(kind, MAX_AGE_S)) or "none"
        raise ModelNotFoundError(f"no {kind} model is called {name!r}; served are: {served}", param="model")

    async def _of_kind(self, kind: JobKind, max_age_s: float) -> list[ServedModel]:
        models = await self.models(max_age_s=max_age_s)
        found = [model for model in models.values() if model.kind is kind]
        return sorted(found, key=lambda model: (not model.stats.workers, model.name))

    async def _read(self) -> dict[str, ServedModel]:
        models = {}
        for name, announced in (await self._queue.models()).items():
            stats = await self._queue.stats(name)
            manifest = await self._offer(name, announced, stats)
            if manifest is not None:
                models[name] = ServedModel(manifest=manifest, stats=stats)
        return models

    async def _offer(self, name: str, announced: Mapping[str, Any], stats: QueueStats) -> Manifest | None:
        """What can be asked for now: while several versions are served, what all of them draw."""
        workers = sorted(stats.workers, key=lambda worker: worker.started_ms)
        versions = list(dict.fromkeys(worker.version for worker in workers))
        if versions in ([], [announced.get("version")]):
            return _parse_manifest(name, announced)
        told = await self._queue.manifests(name, versions)
        manifests = [found for one in told if (found := _parse_manifest(name, one)) is not None]
        if not manifests:
            return _parse_manifest(name, announced)
        return common_ground(manifests) or manifests[0]


def _parse_manifest(name: str, announced: Mapping[str, Any]) -> Manifest | None:
    """What a worker announced. Fields that it does not know are no reason for an api process to drop a model:
    while a new version is rolled out, its workers may come before its apis.
    """
    try:
        return Manifest.model_validate(_without_unknown(announced))
    except ValidationError as error:
        # What it serves cannot be asked for through this process.
        logger.warning(
            "manifest not understood: %s", error.errors(include_input=False)[0]["loc"], extra={"model": name}
        )
        return None


def _without_unknown(announced: Mapping[str, Any]) -> Mapping[str, Any]:
    """The manifest without the fields, at any depth, that `Manifest` does not know and so forbids."""
    try:
        Manifest.model_validate(announced)
    except ValidationError as error:
        unknown = [problem["loc"] for problem in error.errors() if problem["type"] == "extra_forbidden"]
    else:
        return announced
    known: dict[str, Any] = copy.deepcopy(dict(announced))
    for *path, field in unknown:
        place: Any = known
        for step in path:
            place = place[step]
        del place[field]
    return known
