"""Fleet: the workers of one `up`, a crew for each version of a model that its route names.

Twice a second the fleet reads the routes (`server.queue.routes`) and goes one step towards them: starts the
crew of a version that is to have one, makes a version that is ready the base or lets it have its share, gives
one up that does not get ready, ends a crew that no route names any longer. All that it remembers is in the
routes, so it may be killed at any point, and the next `up` goes on.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from engines.bundle.manifest import Manifest, read_manifest
from engines.errors import EngineError
from server.queue.errors import QueueError
from server.queue.routes import Route, Routes
from server.supervisor.child import Child

TICK_S = 0.5
SUPERVISE_S = 2.0
GRACE_S = 30.0

T = TypeVar("T")

Hire = Callable[[Path, int, str], Child]
"""(bundle, index, its GPU or "") -> a worker that is not started yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Post:
    """One model that this `up` serves, as it was set up.

    Attributes:
        manifest: of its bundle.
        bundles: a directory of the bundle for each of its workers.
        gpus: what `CUDA_VISIBLE_DEVICES` calls the GPU of each worker, "" for one without; empty: all are.
    """

    manifest: Manifest
    bundles: Sequence[Path]
    gpus: Sequence[str] = ()


class Crew:
    """The workers of one version of a model."""

    def __init__(self, version: str, workers: Mapping[int, Child], *, on_trial: bool) -> None:
        """Starts them.

        Args:
            version: of their bundle.
            workers: by their index among all workers of this `up`.
            on_trial: they have yet to show that they can be ready; until then none is started again.
        """
        self.version = version
        self.workers = workers
        self.since = time.monotonic()
        self.leaving: asyncio.Task[None] | None = None
        for worker in workers.values():
            worker.on_trial = on_trial
        self._running = [asyncio.create_task(worker.keep_running()) for worker in workers.values()]

    @property
    def lost(self) -> str:
        """How a worker ended that will not be started again; "" while there is none."""
        return next(iter(self._ends()), "")

    @property
    def num_left(self) -> int:
        """Workers that run, or will run again."""
        return 0 if self.leaving is not None else len(self.workers) - len(self._ends())

    def _ends(self) -> list[str]:
        if self.leaving is not None:
            return []
        ends = []
        for worker, task in zip(self.workers.values(), self._running, strict=True):
            if task.done():
                error = task.exception()
                ends.append(worker.end if error is None else f"{worker.name} could not be started: {error}")
        return ends

    @property
    def pids(self) -> set[int]:
        """Process ids of their present lives."""
        return {worker.pid for worker in self.workers.values() if worker.pid is not None}

    def pass_trial(self) -> None:
        """From now on they are started again when they die."""
        for worker in self.workers.values():
            worker.on_trial = False

    async def leave(self) -> None:
        """Let them finish what they have started and hand back the rest."""
        await asyncio.gather(*(worker.stop(GRACE_S) for worker in self.workers.values()))
        await asyncio.gather(*self._running, return_exceptions=True)


class Fleet:
    """Call `run` once."""

    def __init__(
        self,
        posts: Mapping[str, Post],
        routes: Routes,
        hire: Hire,
        *,
        swap_timeout_s: float,
        report: Callable[[str], None],
    ) -> None:
        """Starts nothing.

        Args:
            posts: by model, in the order in which their workers are numbered.
            routes: of the Redis.
            hire: makes a worker.
            swap_timeout_s: how long a new version may take until its workers are ready.
            report: takes one line for the operator.
        """
        self._posts = dict(posts)
        self._routes = routes
        self._hire = hire
        self._swap_timeout_s = swap_timeout_s
        self._report = report
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._crews: dict[str, dict[str, Crew]] = {model: {} for model in posts}
        self._known: dict[str, Route] = {}
        self._strange: dict[str, str] = {}
        self._told_lost: dict[str, int] = {}
        self._next_word = 0.0
        self._silent = False

    @property
    def workers(self) -> list[Child]:
        """All of them."""
        return [
            worker
            for crews in self._crews.values()
            for crew in crews.values()
            for worker in crew.workers.values()
        ]

    async def start(self) -> None:
        """Start the workers of every base; returns when their processes are being started.

        Raises:
            QueueError: Redis does not answer.
        """
        for model, post in list(self._posts.items()):
            await self._serve(model, post)

    async def add(self, posts: Mapping[str, Post]) -> None:
        """Start the workers of further models; waits until Redis answers."""
        for model, post in posts.items():
            self._posts[model] = post
            self._crews[model] = {}
            while True:
                try:
                    await self._serve(model, post)
                    break
                except QueueError as error:
                    self._report(f"{model} is not served yet: {error}")
                    await asyncio.sleep(SUPERVISE_S)

    async def _serve(self, model: str, post: Post) -> None:
        await self._bury_the_dead(model)
        told = await _aside(self._routes.get, model)
        route = self._settle(model, post, told)
        if route != told:
            await _aside(self._routes.put, model, route)
            route = replace(route, rev=route.rev + 1)
        self._known[model] = route
        self._begin(model, route.base, self._bundles(model, route))

    async def run(self) -> None:
        """Keep what runs in line with the routes; returns when no worker of any base is left."""
        while self._is_anything_left():
            try:
                await self._say_that_we_live()
                for model in list(self._known):
                    await self._tend(model)
                self._silent = False
            except QueueError as error:
                if not self._silent:
                    self._report(f"versions are left as they are while Redis is away: {error}")
                self._silent = True
            await asyncio.sleep(TICK_S)

    @property
    def num_left(self) -> int:
        """Workers that run, or will run again."""
        return sum(crew.num_left for crews in self._crews.values() for crew in crews.values())

    def _is_anything_left(self) -> bool:
        """Whether any model is still served. One that cannot be is told of, and takes no other with it."""
        bases = {model: self._crews[model][route.base] for model, route in self._known.items()}
        if not any(crew.num_left or crew.leaving for crew in bases.values()):
            return False
        for model, crew in bases.items():
            if crew.lost and self._told_lost.get(model) != crew.num_left:
                self._told_lost[model] = crew.num_left
                left = f"workers left: {crew.num_left}" if crew.num_left else "it is not served"
                self._report(f"{model}: {crew.lost}; {left}")
        return True

    async def end(self) -> None:
        """End every worker."""
        crews = [crew for crews in self._crews.values() for crew in crews.values()]
        await asyncio.gather(*(crew.leaving or crew.leave() for crew in crews))
        try:
            for model in self._known:
                await _aside(self._routes.leave, model, self._name)
        except QueueError:
            pass  # then it will be forgotten in a few seconds

    async def _bury_the_dead(self, model: str) -> None:
        """Forget each `up` of this machine that was killed a moment ago, so that nobody counts on it."""
        for name in await _aside(self._routes.supervisors, model):
            host, pid, _ = name.rsplit("-", 2)
            if host == socket.gethostname() and not _is_process(int(pid)):
                await _aside(self._routes.leave, model, name)

    def _settle(self, model: str, post: Post, route: Route) -> Route:
        """The route to start with: what was decided, unless TDM_BUNDLES leads elsewhere since."""
        own, directory = post.manifest.version, str(post.bundles[0])
        if own == route.base:  # at home: if it was moved, what TDM_BUNDLES says holds
            return replace(route, configured=own, base_bundle=directory)
        if own == route.configured and route.base:
            if _version_in(route.base_bundle) == route.base:
                self._report(f"{model}: serving version {route.base} from {route.base_bundle}, as swapped in")
                return route
            self._report(
                f"{model}: version {route.base} was swapped in, and is no longer in {route.base_bundle}; "
                f"serving {own} from {directory}"
            )
        return Route(rev=route.rev, base=own, base_bundle=directory, configured=own)

    def _bundles(self, model: str, route: Route) -> Sequence[Path]:
        post = self._posts[model]
        if route.base == post.manifest.version:
            return post.bundles
        return [Path(route.base_bundle)] * len(post.bundles)

    async def _tend(self, model: str) -> None:
        route = await _aside(self._routes.get, model)
        if not route.base:  # Redis lost its data; what we know still holds
            await self._decide(model, replace(self._known[model], rev=route.rev))
            return
        crews = self._crews[model]
        if route.base not in crews:  # another `up` on the same Redis was set up with another bundle
            if self._strange.get(model) != route.base:
                self._report(f"{model}: version {route.base} is the base now, which does not run here")
            self._strange[model] = route.base
            return
        self._known[model] = route
        if route.next:
            await self._tend_next(model, route)
        for crew in list(crews.values()):
            if crew.version not in route.versions and crew.leaving is None:
                await self._dismiss(model, route, crew)

    async def _say_that_we_live(self) -> None:
        if time.monotonic() >= self._next_word:
            for model in list(self._known):
                await _aside(self._routes.supervise, model, self._name)
            self._next_word = time.monotonic() + SUPERVISE_S

    async def _tend_next(self, model: str, route: Route) -> None:
        """One step towards the next version."""
        crew = self._crews[model].get(route.next)
        if crew is not None and crew.leaving is not None:
            return  # it is on its way out, from an earlier swap
        if crew is None:
            bundles = [Path(route.next_bundle)] * len(self._posts[model].bundles)
            self._report(f"{model}: loading version {route.next} beside {route.base}")
            self._begin(model, route.next, bundles, on_trial=not route.ready)
        elif crew.lost:
            why = await _aside(self._routes.failure, model, route.next) or crew.lost
            await self._give_up(model, route, f"version {route.next} cannot be served: {why}")
        elif not route.ready:
            live = await _aside(self._routes.workers, model)
            here = {one.pid for one in live if (one.version, one.host) == (route.next, socket.gethostname())}
            waited_s = time.monotonic() - crew.since
            if crew.pids <= here and len(crew.pids) == len(crew.workers):
                await self._let_in(model, route, crew)
            elif waited_s > self._swap_timeout_s:
                why = f"version {route.next} was not ready after {self._swap_timeout_s:g} s"
                await self._give_up(model, route, f"{why} (TDM_SWAP_TIMEOUT_S)")

    async def _let_in(self, model: str, route: Route, crew: Crew) -> None:
        crew.pass_trial()
        if route.goal == 100:
            if await self._decide(model, route.promoted()):
                self._report(f"{model}: version {route.next} serves instead of {route.base}")
        elif await self._decide(model, route.sharing(route.goal)):
            self._report(f"{model}: version {route.next} gets {route.goal} % of the jobs")

    async def _give_up(self, model: str, route: Route, why: str) -> None:
        if await self._decide(model, route.abandoned(why)):
            self._report(f"{model}: {why}; {route.base} stays")

    async def _dismiss(self, model: str, route: Route, crew: Crew) -> None:
        """End a crew once no job waits that it alone could draw."""
        manifest = await _aside(self._routes.manifest, model, route.base)
        if manifest is not None and await _aside(self._routes.stranded, model, manifest) > 0:
            return

        async def leave() -> None:
            await crew.leave()
            del self._crews[model][crew.version]
            self._report(f"{model}: the workers of version {crew.version} have ended")

        crew.leaving = asyncio.create_task(leave())

    def _begin(self, model: str, version: str, bundles: Sequence[Path], *, on_trial: bool = False) -> None:
        taken = {index for crews in self._crews.values() for crew in crews.values() for index in crew.workers}
        workers: dict[int, Child] = {}
        # a new version's workers have the GPUs of those they are to follow
        gpus = self._posts[model].gpus or [""] * len(bundles)
        for bundle, gpu in zip(bundles, gpus, strict=True):
            index = next(number for number in range(len(taken) + 1) if number not in taken)
            taken.add(index)
            workers[index] = self._hire(bundle, index, gpu)
        self._crews[model][version] = Crew(version, workers, on_trial=on_trial)

    async def _decide(self, model: str, route: Route) -> bool:
        """False if somebody else decided meanwhile; the next round sees what."""
        return await _aside(self._routes.put, model, route)


async def _aside(call: Callable[..., T], *args: Any) -> T:
    """Run what waits for Redis on another thread."""
    return await asyncio.to_thread(call, *args)


def _version_in(directory: str) -> str:
    try:
        return read_manifest(Path(directory)).version
    except (EngineError, OSError):
        return ""


def _is_process(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
