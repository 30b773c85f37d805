"""Routes: which version of a bundle gets which jobs, what that was before, and who carries decisions out.

A route is what somebody decided; it lasts in Redis. The pump (lua/_pump.lua) deals jobs by it, whoever
started the workers. Where an `up` runs them, its fleet (`server.supervisor.fleet`) starts and ends workers
until those that are there are those that the route names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from pydantic import ValidationError

from engines.bundle.manifest import Manifest
from server.job import GenerationRequest, Priority
from server.queue.clock import asked_each_time
from server.queue.connection import connect
from server.queue.keys import MODELS_KEY, class_prefix, job_key, waiting_key
from server.queue.records import UnreadableJobError, WorkerInfo, load_request, load_worker
from server.queue.scripts import script

SUPERVISOR_TTL_MS = 10_000
PAGE = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What is decided about one model. A version is a bundle's content hash; "" is none.

    Attributes:
        rev: counts decisions; who decides says which one it was that he knew.
        base: version that gets every job, but for the next one's share; "": any that has live workers.
        next: version on its way in, or on trial.
        share: percent of the jobs that are dealt to `next`.
        dealt, to_next: jobs dealt while both had live workers, and those of them that `next` got. Each job
            counts once.
        base_bundle, next_bundle, previous_bundle: their directories, as the `up` that runs them sees them.
        configured: version that TDM_BUNDLES led to when the `up` last started.
        previous: version that a rollback goes back to.
        goal: share that `next` gets once its workers are ready; 100 makes it the base.
        ready: its workers have been ready.
        result: why the last swap came to nothing; "" if it did not.
    """

    rev: int = 0
    base: str = ""
    next: str = ""
    share: int = 0
    dealt: int = 0
    to_next: int = 0
    base_bundle: str = ""
    next_bundle: str = ""
    configured: str = ""
    previous: str = ""
    previous_bundle: str = ""
    goal: int = 0
    ready: bool = False
    result: str = ""

    @property
    def versions(self) -> tuple[str, ...]:
        """Those that are to have workers."""
        return tuple(version for version in (self.base, self.next) if version)

    def swapping(self, version: str, bundle: str, goal: int) -> Route:
        """`version` is to be loaded beside the base."""
        return replace(self._apart(), next=version, next_bundle=bundle, goal=goal, result="")

    def sharing(self, share: int) -> Route:
        """`next` gets this share from now on, counted anew."""
        return replace(self, share=share, goal=share, ready=True, dealt=0, to_next=0)

    def promoted(self) -> Route:
        """`next` is the base."""
        return replace(
            self._apart(),
            base=self.next,
            base_bundle=self.next_bundle,
            previous=self.base,
            previous_bundle=self.base_bundle,
            result="",
        )

    def abandoned(self, why: str) -> Route:
        """`next` comes to nothing."""
        return replace(self._apart(), result=why)

    def _apart(self) -> Route:
        return replace(self, next="", next_bundle="", goal=0, share=0, ready=False, dealt=0, to_next=0)


class Routes:
    """The routes of all models of one Redis. All methods raise `QueueError` where it cannot be reached."""

    def __init__(self, url: str, *, clock: Callable[[], int] | None = None) -> None:
        """Connects with the first call.

        Args:
            url: of Redis 7.0+ or Valkey 8+.
            clock: unix ms; None: Redis is asked each time.
        """
        self._redis = connect(url)
        self._clock = clock or asked_each_time(self._redis)
        self._set_route = self._redis.register_script(script("set_route"))

    def close(self) -> None:
        """Disconnect."""
        self._redis.close()

    def models(self) -> list[str]:
        """Every model that was ever announced."""
        announced: Any = self._redis.hgetall(MODELS_KEY)
        return sorted(announced)

    def get(self, model: str) -> Route:
        """What is decided; an empty route if nothing is."""
        told: Any = self._redis.hgetall(f"{class_prefix(model)}:route")
        return load_route(told)

    def put(self, model: str, route: Route) -> bool:
        """Decide, and have what waits dealt again; False if `route` was made from what no longer stands."""
        args = [route.rev, *(part for pair in _dump(route).items() for part in pair)]
        done = bool(self._set_route(keys=[class_prefix(model)], args=args))
        if done and route.base:
            manifest: Any = self._redis.hget(f"{class_prefix(model)}:m", route.base)
            if manifest:  # what is asked for while no worker lives is checked against the base
                self._redis.hset(MODELS_KEY, model, manifest)
            self._forget_manifests(model, route)
        return done

    def drop(self, model: str, route: Route) -> bool:
        """Decide nothing any longer; False as `put`."""
        return bool(self._set_route(keys=[class_prefix(model)], args=[route.rev]))

    def manifest(self, model: str, version: str) -> Manifest | None:
        """Of a version whose workers announced it; None also if it is from a release that we do not read."""
        text: Any = self._redis.hget(f"{class_prefix(model)}:m", version)
        with suppress(ValidationError):
            return Manifest.model_validate_json(text) if text else None
        return None

    def workers(self, model: str) -> list[WorkerInfo]:
        """The live ones."""
        prefix = class_prefix(model)
        alive: Any = self._redis.zrangebyscore(f"{prefix}:alive", f"({self._clock()}", "+inf")
        infos: Any = self._redis.hgetall(f"{prefix}:w")
        return [load_worker(infos[consumer]) for consumer in alive if consumer in infos]

    def supervise(self, model: str, supervisor: str) -> None:
        """Say that the `up` of this name runs workers of the model; due every few seconds."""
        key, now_ms = f"{class_prefix(model)}:up", self._clock()
        self._redis.zremrangebyscore(key, "-inf", now_ms)
        self._redis.zadd(key, {supervisor: now_ms + SUPERVISOR_TTL_MS})

    def leave(self, model: str, supervisor: str) -> None:
        """Say that this `up` ends."""
        self._redis.zrem(f"{class_prefix(model)}:up", supervisor)

    def supervisors(self, model: str) -> list[str]:
        """Every `up` that runs workers of the model."""
        names: Any = self._redis.zrangebyscore(f"{class_prefix(model)}:up", f"({self._clock()}", "+inf")
        return list(names)

    def tell_failure(self, model: str, version: str, message: str) -> None:
        """Leave word of why a worker of this version ended before it was ready."""
        self._redis.set(self._failure_key(model, version), message, px=SUPERVISOR_TTL_MS * 6)

    def failure(self, model: str, version: str) -> str:
        """What `tell_failure` left lately."""
        return str(self._redis.get(self._failure_key(model, version)) or "")

    def stranded(self, model: str, manifest: Manifest) -> int:
        """Queued jobs that ask for what this manifest does not offer."""
        return sum(
            request.bucket not in manifest.buckets or request.num_steps not in manifest.num_steps
            for request in self._queued(model)
        )

    def _queued(self, model: str) -> Iterator[GenerationRequest]:
        """What waits; without what cannot be read, which no version draws better than another."""
        for priority in Priority:
            ids: Any = self._redis.zrange(waiting_key(model, priority), 0, -1)
            for start in range(0, len(ids), PAGE):
                pipeline = self._redis.pipeline(transaction=False)
                for job_id in ids[start : start + PAGE]:
                    pipeline.hget(job_key(model, job_id), "request")
                for text in filter(None, pipeline.execute()):
                    with suppress(UnreadableJobError):
                        yield load_request(text)

    def _forget_manifests(self, model: str, route: Route) -> None:
        key = f"{class_prefix(model)}:m"
        told: Any = self._redis.hgetall(key)
        kept = {*route.versions, *(worker.version for worker in self.workers(model))}
        if gone := [version for version in told if version not in kept]:
            self._redis.hdel(key, *gone)

    def _failure_key(self, model: str, version: str) -> str:
        return f"{class_prefix(model)}:failure:{version}"


def load_route(told: Mapping[str, str]) -> Route:
    """The route in hash `q:2:{model}:route` (field names: those of `Route`)."""
    read: dict[str, Any] = {}
    for field in fields(Route):
        if (text := told.get(field.name)) is not None:
            read[field.name] = text if isinstance(field.default, str) else type(field.default)(int(text))  # type: ignore[misc]
    return Route(**read)


def common_ground(manifests: Sequence[Manifest]) -> Manifest | None:
    """What all of these versions draw, as the first one's manifest; None if there is no such picture."""
    first, *others = manifests
    buckets = [bucket for bucket in first.buckets if all(bucket in other.buckets for other in others)]
    num_steps = [number for number in first.num_steps if all(number in other.num_steps for other in others)]
    if not buckets or not num_steps or any(other.fps != first.fps for other in others):
        return None
    defaults = [manifest.default_num_steps for manifest in manifests]
    default = next((number for number in defaults if number in num_steps), max(num_steps))
    return first.model_copy(update={"buckets": buckets, "num_steps": num_steps, "default_num_steps": default})


def _dump(route: Route) -> dict[str, str | int]:
    """Without `rev`, which the script counts, and without what is empty: no field says "none" best."""
    told = {field.name: getattr(route, field.name) for field in fields(route) if field.name != "rev"}
    return {name: value if isinstance(value, str) else int(value) for name, value in told.items() if value}
