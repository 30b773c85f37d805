"""The simulated fleet, against what queueing theory knows of such a queue."""

from __future__ import annotations

import statistics

import pytest

from server.worker.simulation import poisson, simulate

SERVICE_MS = 100.0


def per_sample(batch: int) -> float:
    """Batches that save nothing."""
    return SERVICE_MS * batch


def flat(batch: int) -> float:
    """Batches that cost no more than one sample."""
    return SERVICE_MS


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_one_worker_without_batches_is_an_m_d_1_queue(load: float) -> None:
    outcome = simulate(
        poisson(1000 * load / SERVICE_MS, 60_000, seed=3), batch_ms=per_sample, max_batch=1, num_workers=1
    )
    # Pollaczek-Khinchine, for service times that do not vary.
    wait_ms = SERVICE_MS * load / (2 * (1 - load))
    assert statistics.fmean(outcome.latencies_ms) == pytest.approx(SERVICE_MS + wait_ms, rel=0.03)
    assert outcome.busy == pytest.approx(load, rel=0.02)
    assert outcome.mean_batch == 1


def test_idle_fleet_takes_what_the_engine_takes_and_what_is_beside_it() -> None:
    moments = [10_000.0 * i for i in range(20)]
    outcome = simulate(moments, batch_ms=per_sample, max_batch=4, num_workers=2, beside_ms=7.0)
    assert set(outcome.latencies_ms) == {SERVICE_MS + 7.0}


def test_more_arrivals_than_one_at_a_time_could_serve_are_served_in_batches() -> None:
    outcome = simulate(
        poisson(4 * 1000 / SERVICE_MS, 8000, seed=3), batch_ms=flat, max_batch=8, num_workers=1
    )
    assert 4 <= outcome.mean_batch <= 8
    assert outcome.percentile_ms(95) < 3 * SERVICE_MS


def test_samples_beyond_one_batch_are_run_one_batch_after_the_other() -> None:
    outcome = simulate([0.0, 10_000.0], batch_ms=flat, max_batch=4, num_workers=1, num_samples=10, warm_up=0)
    assert set(outcome.latencies_ms) == {3 * SERVICE_MS}


def test_more_workers_are_never_slower_and_the_same_seed_gives_the_same() -> None:
    def p95(num_workers: int) -> float:
        arrivals = poisson(18.0, 4000, seed=5)
        return simulate(arrivals, batch_ms=per_sample, max_batch=1, num_workers=num_workers).percentile_ms(95)

    found = [p95(num_workers) for num_workers in (2, 3, 4)]
    assert found == sorted(found, reverse=True)
    assert p95(2) == found[0]


def test_percentiles_are_of_all_requests() -> None:
    outcome = simulate([0.0, 0.0, 0.0, 0.0], batch_ms=per_sample, max_batch=1, num_workers=1, warm_up=0)
    assert list(outcome.latencies_ms) == [100, 200, 300, 400]
    assert [outcome.percentile_ms(percent) for percent in (0, 50, 99)] == [100, 300, 400]


def test_nothing_to_serve_is_refused() -> None:
    with pytest.raises(ValueError, match="needs requests"):
        simulate([], batch_ms=flat, max_batch=1, num_workers=1)
