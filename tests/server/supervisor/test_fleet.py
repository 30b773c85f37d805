"""With which version an `up` starts, given what was decided before; the rest of the fleet is in tests/e2e."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from engines.bundle.manifest import write_manifest
from server.queue.routes import Route, Routes
from server.supervisor.child import Child
from server.supervisor.fleet import Crew, Fleet, Post
from tests.server.manifests import make_manifest

MODEL = "scenes"
OWN, SWAPPED, FORMER = "aaaaaaaaaaaa", "bbbbbbbbbbbb", "cccccccccccc"


class Hired(Child):
    """A worker that never starts: which bundle it would serve is what is asked here."""

    async def keep_running(self) -> None:
        """Nothing."""


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[str], Path]:
    def make(version: str) -> Path:
        directory = tmp_path / version
        directory.mkdir()
        write_manifest(directory, make_manifest(MODEL, version=version))
        return directory

    return make


async def start(
    routes: Routes, own: Path, *, version: str = OWN, later: Mapping[str, Post] = MappingProxyType({})
) -> tuple[list[tuple[Path, int]], str]:
    """Start a fleet of two workers, and then those of models that come later; what it hired, what it said."""
    hired: list[tuple[Path, int]] = []
    said: list[str] = []

    def hire(bundle: Path, index: int, gpu: str) -> Child:
        assert gpu == ""
        hired.append((bundle, index))
        return Hired("worker", [], {}, report=said.append)

    post = Post(manifest=make_manifest(MODEL, version=version), bundles=[own, own])
    fleet = Fleet({MODEL: post}, routes, hire, swap_timeout_s=60, report=said.append)
    await fleet.start()
    if later:
        await fleet.add(later)
        assert len(fleet.workers) == len(hired)
    return hired, " ".join(said)


@pytest.fixture
def routes(redis_url: str) -> Any:
    routes = Routes(redis_url)
    yield routes
    routes.close()


async def test_first_start_decides_on_what_it_is_set_up_with(
    routes: Routes, bundle: Callable[[str], Path]
) -> None:
    own = bundle(OWN)
    hired, _ = await start(routes, own)
    assert hired == [(own, 0), (own, 1)]
    assert routes.get(MODEL) == Route(rev=1, base=OWN, base_bundle=str(own), configured=OWN)
    await start(routes, own)
    assert routes.get(MODEL).rev == 1  # nothing new was decided


async def test_model_that_comes_later_gets_workers_of_its_own(
    routes: Routes, bundle: Callable[[str], Path]
) -> None:
    own, other = bundle(OWN), bundle(FORMER)
    clips = Post(manifest=make_manifest("clips", version=FORMER), bundles=[other])
    hired, _ = await start(routes, own, later={"clips": clips})
    assert hired == [(own, 0), (own, 1), (other, 2)]
    assert routes.get("clips").base_bundle == str(other)


async def test_swapped_in_version_outlasts_a_restart(routes: Routes, bundle: Callable[[str], Path]) -> None:
    own, swapped = bundle(OWN), bundle(SWAPPED)
    decided = Route(base=SWAPPED, base_bundle=str(swapped), configured=OWN, next=OWN, next_bundle=str(own))
    assert routes.put(MODEL, decided)
    hired, said = await start(routes, own)
    assert [path for path, _ in hired] == [swapped, swapped]
    assert "as swapped in" in said
    assert routes.get(MODEL).next == OWN  # and what was under way goes on


async def test_what_is_set_up_holds_if_it_was_changed_since_the_swap(
    routes: Routes, bundle: Callable[[str], Path]
) -> None:
    own, swapped = bundle(OWN), bundle(SWAPPED)
    assert routes.put(MODEL, Route(base=SWAPPED, base_bundle=str(swapped), configured=FORMER))
    hired, _ = await start(routes, own)
    assert [path for path, _ in hired] == [own, own]
    route = routes.get(MODEL)
    assert (route.base, route.configured) == (OWN, OWN)


@pytest.mark.parametrize("how", ["gone", "another"])
async def test_what_is_set_up_holds_if_the_swapped_in_bundle_is_no_longer_there(
    routes: Routes, bundle: Callable[[str], Path], how: str
) -> None:
    own = bundle(OWN)
    directory = bundle(FORMER) if how == "another" else own.parent / "nowhere"
    assert routes.put(MODEL, Route(base=SWAPPED, base_bundle=str(directory), configured=OWN))
    hired, said = await start(routes, own)
    assert [path for path, _ in hired] == [own, own]
    assert f"no longer in {directory}" in said


async def test_up_that_was_killed_a_moment_ago_is_not_counted_on(
    routes: Routes, bundle: Callable[[str], Path]
) -> None:
    dead = f"{socket.gethostname()}-{2**22 + 1}-abcd"  # above the largest process id
    for name in (dead, "elsewhere-1-abcd"):
        routes.supervise(MODEL, name)
    await start(routes, bundle(OWN))
    assert routes.supervisors(MODEL) == ["elsewhere-1-abcd"]


class Unstartable(Child):
    """A worker that the system has no memory for."""

    async def keep_running(self) -> None:
        """Fail as a fork does."""
        raise OSError(12, "Cannot allocate memory")


async def test_worker_that_cannot_even_be_started_is_lost() -> None:
    worker = Unstartable("worker 1", [], {}, report=lambda _: None)
    crew = Crew(SWAPPED, {1: worker}, on_trial=True)
    assert crew.lost == ""
    await crew.leave()
    assert crew.lost == "worker 1 could not be started: [Errno 12] Cannot allocate memory"


def test_replaced_route_counts_on() -> None:
    route = Route(rev=3, base=OWN, next=SWAPPED, share=10, ready=True)
    assert replace(route.promoted(), rev=0).previous == OWN
    assert route.abandoned("why").versions == (OWN,)
