"""Two versions of a bundle whose workers nobody supervises, as a Deployment of each would run them."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.bundle.integrity import content_version, hash_files
from engines.bundle.manifest import read_manifest, write_manifest
from server.queue.routes import Route, Routes
from server.supervisor.swap import Served, look, promote, roll_back, share
from tests.failures.deployment import MODEL, Deployment
from tests.failures.processes import Api
from tests.server.conftest import poll

NUM_JOBS = 100


@pytest.fixture(scope="session")
def newer(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with a note among its checkpoint's files, which makes it another version."""
    copy = shutil.copytree(bundle, tmp_path_factory.mktemp("newer") / "bundle")
    (copy / "checkpoint" / "NOTE.txt").write_text("trained a little longer")
    files = hash_files(copy)
    manifest = read_manifest(copy)
    changes = {"files": files, "version": content_version(files, manifest.buckets)}
    write_manifest(copy, manifest.model_copy(update=changes))
    return copy


def versions(deployment: Deployment, api: Api, count: int) -> Counter[str]:
    """Which versions draw so many pictures, asked for at once."""
    answers = list(deployment.background.map(lambda i: api.post(f"{i}"), range(count)))
    assert {answer.status_code for answer in answers} == {200}
    return Counter(answer.json()["version"] for answer in answers)


def test_share_is_exact_over_worker_processes_that_somebody_else_starts(
    deployment: Deployment, bundle: Path, newer: Path
) -> None:
    old, new = read_manifest(bundle).version, read_manifest(newer).version
    routes = Routes(deployment.redis.url)

    def decide(how: Callable[[Served], Route]) -> None:
        assert routes.put(MODEL, how(look(routes, MODEL)))

    api = deployment.api()
    base = deployment.worker("base")
    deployment.started(base)
    decide(lambda now: share(now, 0))
    trial = deployment.worker("trial", bundles=newer)
    deployment.started(trial)
    assert versions(deployment, api, 10) == {old: 10}  # held on to
    decide(lambda now: share(now, 20))
    drawn = versions(deployment, api, NUM_JOBS)
    assert abs(drawn[new] - NUM_JOBS // 5) <= 1
    assert trial.metric("version_jobs_total", version=new, outcome="done") == drawn[new]
    assert base.metric("version_jobs_total", version=old, outcome="done") == 10 + drawn[old]
    poll(lambda: api.metric("version_workers", version=new) == 1)

    decide(promote)
    assert versions(deployment, api, 10) == {new: 10}
    decide(roll_back)
    assert versions(deployment, api, 10) == {old: 10}
    routes.close()


def test_version_on_trial_that_kills_its_workers_costs_no_job(
    deployment: Deployment, bundle: Path, newer: Path
) -> None:
    old = read_manifest(bundle).version
    routes = Routes(deployment.redis.url)
    api = deployment.api()
    base, trial = deployment.worker("base"), deployment.worker("trial", bundles=newer)
    deployment.started(base)
    assert routes.put(MODEL, share(look(routes, MODEL), 0))
    deployment.started(trial.brake())
    assert routes.put(MODEL, share(look(routes, MODEL), 50))
    jobs = [api.accept(f"{i}") for i in range(8)]
    poll(lambda: trial.batches)
    trial.kill()

    answers = [api.ended(job) for job in jobs]
    assert {answer["status"] for answer in answers} == {"completed"}
    assert {answer["version"] for answer in answers} == {old}
    assert max(deployment.attempts(job) for job in jobs) == 2
    routes.close()
