"""The batch policies, side by side at the same simulated requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from engines.bundle.bucket import Bucket
from engines.bundle.manifest import write_manifest
from loadtests.batching.__main__ import LOADS, MIXES, Engine, compare, main, requests, verdicts
from loadtests.batching.policies import OURS, POLICIES, fixed_delay, no_batches
from server.worker.batch_policy import Row, Run, Wait
from server.worker.simulation import SimulatedJob
from tests.server.manifests import make_manifest

PNG = b"\x89PNG"
USUAL = Engine(name="usual", batch_ms=lambda size: 12.0 + 11.0 * size, max_batch=16)
"""Of the shape that was measured on a CPU."""


def rows(*came_ms: float) -> list[Row[SimulatedJob]]:
    return [Row(SimulatedJob(one, 1, Bucket(64, 64)), 0) for one in came_ms]


def test_fixed_delay_counts_from_the_oldest_and_runs_what_is_full() -> None:
    policy = fixed_delay(20.0)
    assert policy(rows(100.0, 110.0), now_ms=112.0, max_batch=4) == Wait(8.0)
    waited, full = rows(100.0, 110.0), rows(100.0, 101.0, 101.0, 102.0)
    assert policy(waited, now_ms=120.0, max_batch=4) == Run(tuple(waited))
    assert policy(full, now_ms=102.0, max_batch=4) == Run(tuple(full))
    assert no_batches(full) == Run(tuple(full[:1]))


@pytest.mark.parametrize("mix", MIXES)
def test_requests_come_at_the_rate_that_is_asked_for(mix: str) -> None:
    jobs = list(requests(mix, 0.05, 6000))
    samples = sum(job.num_left for job in jobs)
    assert samples / jobs[-1].came_ms == pytest.approx(0.05, rel=0.1)
    assert [job.came_ms for job in jobs] == sorted(job.came_ms for job in jobs)


def means(mix: str, load: float) -> dict[str, float]:
    return {row.policy: row.mean_ms for row in compare(USUAL, mix, load, 1500, 1)}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("load", [LOADS[0], LOADS[3], LOADS[-1]])
def test_ours_is_as_good_as_whichever_is_best_at_that_load(mix: str, load: float) -> None:
    found = means(mix, load)
    assert found.pop(OURS) <= 1.06 * min(found.values())


def test_ours_is_better_than_any_where_requests_differ() -> None:
    for load in (0.3, 0.5):
        found = means("mixed", load)
        assert found.pop(OURS) < min(found.values())


def test_command_writes_result_and_picture(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_manifest(tmp_path / "bundle", make_manifest())
    out = tmp_path / "found.json"
    assert main([str(tmp_path / "bundle"), "--requests", "30", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    engines: Sequence[str] = list(dict.fromkeys(row["engine"] for row in result["rows"]))
    assert len(engines) == 3
    assert len(result["rows"]) == len(engines) * len(MIXES) * len(LOADS) * len(POLICIES)
    assert len(result["verdicts"]) == len(engines) * len(MIXES) * len(LOADS)
    assert out.with_suffix(".png").read_bytes().startswith(PNG)


def test_verdict_is_over_the_best_of_the_others() -> None:
    found = compare(USUAL, "single", 0.5, 300, 1)
    (verdict,) = verdicts(found)
    ours = next(row for row in found if row.policy == OURS)
    best = min(row.mean_ms for row in found if row.policy != OURS)
    assert verdict["mean_over_best"] == pytest.approx(ours.mean_ms / best, abs=1e-3)
