"""The command `bundle`: another version of a model's bundle in, on trial or for good, and back.

The commands decide; what they decide is a route (`server.queue.routes`). Where an `up` runs the workers its
fleet carries it out, and the commands wait for that. Where something else does, such as a Deployment of
Kubernetes, they deal the jobs out to the versions that it runs; starting and ending workers is its business.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from engines.bundle.integrity import verify_files
from engines.bundle.manifest import Manifest, read_manifest
from engines.errors import EngineError
from server.queue.records import WorkerInfo
from server.queue.routes import Route, Routes, common_ground
from server.supervisor.console import EXIT_OK, PIPE_WIDTH

POLL_S = 0.2


class SwapError(Exception):
    """What was asked for cannot be done now; the message says why, and what can."""


@dataclass(frozen=True, slots=True)
class Served:
    """One model as it is served: what is decided, which workers live, and which `up` run some."""

    model: str
    route: Route
    workers: tuple[WorkerInfo, ...]
    supervisors: tuple[str, ...]

    @property
    def versions(self) -> list[str]:
        """Those with live workers, the one that has served longest first."""
        workers = sorted(self.workers, key=lambda worker: worker.started_ms)
        return list(dict.fromkeys(worker.version for worker in workers))

    @property
    def state(self) -> str:
        """In a word or two."""
        if not self.route.base:
            return "any version"
        if not self.route.next:
            return "steady"
        return "canary" if self.route.ready else "loading"


def begin(served: Served, manifest: Manifest, base: Manifest | None, bundle: Path, share: int) -> Route:
    """The route that loads `bundle` beside what serves now.

    Args:
        served: the model that it is a version of.
        manifest: of the new bundle.
        base: manifest of the version that serves now, as far as it is known.
        bundle: its directory.
        share: percent of the jobs that it is to get; 100 puts it in the other's place.

    Raises:
        SwapError: it does not fit, or it is not the time.
    """
    route, model = served.route, served.model
    _check_share(share, least=1)
    if not served.supervisors:
        raise SwapError(
            f"no `up` that serves {model} is running; start it, or, where something else runs the workers, "
            "start some on the new bundle and deal jobs out to them with `bundle canary`"
        )
    if len(served.supervisors) > 1:
        raise SwapError(f"{len(served.supervisors)} `up` serve {model}; swapping works with one")
    if route.next:
        raise SwapError(
            f"a swap of {model} to version {route.next} is under way; "
            "`bundle promote` or `bundle rollback` ends it"
        )
    if manifest.version == route.base:
        raise SwapError(f"{bundle} is version {route.base}, which {model} is served with already")
    if base is not None and manifest.kind != base.kind:
        raise SwapError(f"{bundle} draws {manifest.kind}s, and {model} {base.kind}s")
    if base is not None and common_ground([base, manifest]) is None:
        raise SwapError(
            f"{bundle} and version {route.base} have no size and number of steps in common, so nothing "
            "could be asked for while both are served; start `up` anew with it"
        )
    return route.swapping(manifest.version, str(bundle), share)


def share(served: Served, percent: int) -> Route:
    """The route that deals `percent` of the jobs to the next version.

    Where no `up` runs the workers, the versions are those with live workers, and the newer one is the next.

    Raises:
        SwapError: there is no next version, or it is not ready, or the percentage is out of range.
    """
    _check_share(percent, least=0)
    route, model, versions = served.route, served.model, served.versions
    if route.next:
        if not route.ready:
            raise SwapError(f"version {route.next} of {model} is not ready yet")
        return route.sharing(percent)
    if served.supervisors:
        raise SwapError(f"{model} has no version on trial; `bundle swap DIR --canary PERCENT` begins one")
    base = route.base if route.base in versions else next(iter(versions), "")
    others = [version for version in versions if version != base]
    if not base or len(others) > 1 or (percent and not others):
        raise SwapError(
            f"two versions of {model} must have live workers, "
            f"not {len(versions)}: {', '.join(versions) or 'none'}"
        )
    return replace(route, base=base, next=next(iter(others), "")).sharing(percent)


def promote(served: Served) -> Route:
    """The route that makes the version on trial the base.

    Raises:
        SwapError: there is none, or it is not ready.
    """
    if not served.route.next:
        raise SwapError(f"{served.model} has no version on trial")
    if not served.route.ready:
        raise SwapError(f"version {served.route.next} of {served.model} is not ready yet")
    return served.route.promoted()


def roll_back(served: Served) -> Route:
    """The route back: without the version that is coming, or else to the one before the present base.

    Raises:
        SwapError: there is nothing to go back to, or it is no longer there.
    """
    route, model = served.route, served.model
    if route.next:
        return route.abandoned(f"version {route.next} was rolled back")
    if not route.previous:
        raise SwapError(f"{model} has no version to go back to")
    if not served.supervisors:
        if route.previous not in served.versions:
            raise SwapError(f"no live worker serves version {route.previous} of {model}; deploy it first")
        return replace(route, next=route.previous).promoted()
    try:
        found = read_manifest(Path(route.previous_bundle)).version
    except EngineError as error:
        raise SwapError(
            f"version {route.previous} of {model} is gone: {route.previous_bundle}: {error}"
        ) from None
    if found != route.previous:
        raise SwapError(
            f"version {route.previous} of {model} is gone: {route.previous_bundle} holds {found} now"
        )
    return route.swapping(route.previous, route.previous_bundle, 100)


def look(routes: Routes, model: str) -> Served:
    """How a model is served."""
    return Served(model, routes.get(model), tuple(routes.workers(model)), tuple(routes.supervisors(model)))


def run_swap(routes: Routes, bundle: Path, percent: int) -> int:
    """Load a bundle beside the version that serves its model, and let it take over, or have a share.

    Raises:
        SwapError: it cannot be, or it did not get ready; what served before serves on.
    """
    bundle = bundle.expanduser().resolve()
    try:
        manifest = verify_files(bundle)
    except EngineError as error:
        raise SwapError(f"{bundle}: {error}") from None
    model = manifest.name
    if model not in routes.models():
        served = ", ".join(routes.models()) or "none"
        raise SwapError(f"{bundle} is of model {model!r}, which is not served here; served are: {served}")

    def decide(served: Served) -> Route:
        return begin(served, manifest, routes.manifest(model, served.route.base), bundle, percent)

    decided = _decide(routes, model, decide)
    _say(f"{model}: loading version {manifest.version} beside {decided.base}")
    return _follow(routes, model, manifest.version)


def run_share(routes: Routes, model: str | None, percent: int) -> int:
    """Deal another share of the jobs to the version on trial."""
    served = _pick(routes, model, lambda one: bool(one.route.next) or len(one.versions) > 1)
    route = _decide(routes, served.model, lambda now: share(now, percent))
    _say(
        f"{served.model}: version {route.next or 'none yet'} gets {percent} % of the jobs, "
        f"{route.base} the others"
    )
    return EXIT_OK


def run_promote(routes: Routes, model: str | None) -> int:
    """Make the version on trial the one that serves."""
    served = _pick(routes, model, lambda one: bool(one.route.next))
    route = _decide(routes, served.model, promote)
    return _follow(routes, served.model, route.base)


def run_rollback(routes: Routes, model: str | None) -> int:
    """Go back to the version before, or away from the one that is coming."""
    served = _pick(routes, model, lambda one: bool(one.route.next or one.route.previous))
    route = _decide(routes, served.model, roll_back)
    if route.next:
        _say(f"{served.model}: loading version {route.next} beside {route.base}")
    return _follow(routes, served.model, route.next or route.base)


def run_forget(routes: Routes, model: str | None) -> int:
    """Deal jobs to whatever live workers serve, as if nothing had been decided."""
    served = _pick(routes, model, lambda one: bool(one.route.base))
    if served.supervisors:
        raise SwapError(f"an `up` serves {served.model}; it goes by what was decided")
    routes.drop(served.model, served.route)
    _say(f"{served.model}: every version that live workers serve gets jobs")
    return EXIT_OK


def run_status(routes: Routes, *, as_json: bool) -> int:
    """Show which version of each model is served, and what is under way."""
    models = [look(routes, model) for model in routes.models()]
    if as_json:
        sys.stdout.write(json.dumps([_fields(served) for served in models], indent=2) + "\n")
        return EXIT_OK
    table = Table("model", "state", "version", "share %", "dealt", "workers", "bundle")
    for column in table.columns:
        column.overflow = "fold"
    for served in models:
        name, state = served.model, served.state
        for row in _fields(served)["versions"]:
            dealt = "" if row["dealt"] is None else str(row["dealt"])
            share = "" if row["share"] is None else str(row["share"])
            cells = (row["version"], share, dealt, str(row["workers"]), row["bundle"])
            table.add_row(name, state, *cells)
            name = state = ""
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    console.print(table)
    for served in models:
        if served.route.previous and not served.route.next:
            console.print(f"{served.model}: a rollback goes to {served.route.previous}")
        if served.route.result:
            console.print(f"{served.model}: {served.route.result}")
    return EXIT_OK


def _fields(served: Served) -> dict[str, Any]:
    route, workers = served.route, Counter(worker.version for worker in served.workers)
    is_split = bool(route.next and route.ready)
    shares = {route.next: route.share, route.base: 100 - route.share} if route.base else {}
    dealt = {route.next: route.to_next, route.base: route.dealt - route.to_next} if is_split else {}
    bundles = {route.next: route.next_bundle, route.base: route.base_bundle}
    rows = [
        {
            "version": version,
            "share": shares.get(version, 0 if shares else None),
            "dealt": dealt.get(version),
            "workers": workers[version],
            "bundle": bundles.get(version, ""),
        }
        for version in dict.fromkeys([*route.versions, *served.versions])
    ]
    return {
        "model": served.model,
        "state": served.state,
        "versions": rows,
        "previous": route.previous or None,
        "previous_bundle": route.previous_bundle or None,
        "result": route.result or None,
    }


def _check_share(percent: int, *, least: int) -> None:
    if not least <= percent <= 100:
        raise SwapError(f"a share is {least} to 100 percent, not {percent}")


def _pick(routes: Routes, model: str | None, concerns: Callable[[Served], bool]) -> Served:
    """The model that is meant, if it need not be named.

    Raises:
        SwapError: it must be, or there is no such model.
    """
    known = routes.models()
    if model is not None and model not in known:
        raise SwapError(f"no model is called {model!r}; served are: {', '.join(known) or 'none'}")
    if model is not None:
        return look(routes, model)
    served = [look(routes, name) for name in known]
    found = [one for one in served if concerns(one)] or served
    if len(found) != 1:
        raise SwapError(
            f"say which model with --model: {', '.join(one.model for one in found) or 'none is served'}"
        )
    return found[0]


def _decide(routes: Routes, model: str, make: Callable[[Served], Route]) -> Route:
    """Decide on what stands, again if somebody else decided meanwhile."""
    while True:
        route = make(look(routes, model))
        if routes.put(model, route):
            return route


def _follow(routes: Routes, model: str, version: str) -> int:
    """Return when `version` serves as was asked for, and no worker lives that no longer should.

    Raises:
        SwapError: it came to nothing, or nobody is left to carry it out.
    """
    while True:
        served = look(routes, model)
        route = served.route
        if version not in route.versions:
            raise SwapError(route.result or f"somebody else decided on version {route.base} of {model}")
        is_settled = version == route.base if not route.next else route.ready and version == route.next
        if is_settled and not served.supervisors:
            _say(f"{model}: every job goes to version {version}; nobody here ends the workers of others")
            return EXIT_OK
        if is_settled and set(served.versions) <= set(route.versions):
            share_of = f"gets {route.share} % of the jobs" if route.next else "serves"
            _say(f"{model}: version {version} {share_of}")
            return EXIT_OK
        if not served.supervisors:
            raise SwapError(
                f"the `up` that serves {model} is gone; when it is started again it goes on with this"
            )
        time.sleep(POLL_S)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
