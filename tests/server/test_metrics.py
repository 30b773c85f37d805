"""Metrics: names as dashboards know them, seconds where we count milliseconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from server.job import Job, JobKind, OutputRef, new_job
from server.metrics import OBJECTIVES, REQUEST_BUCKETS, STAGE_BUCKETS, Metrics, Outcome
from server.metrics_table import table
from server.scrape import MetricsServer
from tests.server.conftest import request_of


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, {key.rstrip("_"): text for key, text in labels.items()})


def test_every_name_has_our_prefix_and_a_unit() -> None:
    names = [
        family.name
        for family in Metrics().registry.collect()
        if not family.name.startswith(("process", "python"))
    ]

    assert all(name.startswith("tdm_") for name in names)
    histograms = [
        family.name
        for family in Metrics().registry.collect()
        if family.type == "histogram" and not family.name.endswith(("batch_size", "_ratio"))
    ]
    assert all(name.endswith("_seconds") for name in histograms)


def test_table_of_all_metrics_is_up_to_date() -> None:
    written = Path(__file__).resolve().parents[2] / "deploy/metrics.md"

    assert written.read_text(encoding="utf-8") == table(), (
        "python -m server.metrics_table > deploy/metrics.md"
    )


@pytest.mark.parametrize("kind", JobKind)
def test_every_objective_sits_on_an_edge(kind: JobKind) -> None:
    assert OBJECTIVES[kind].e2e_s in REQUEST_BUCKETS
    assert OBJECTIVES[kind].queue_s in STAGE_BUCKETS


def job(kind: JobKind = JobKind.IMAGE) -> Job:
    return new_job(kind=kind, model="scenes", request=request_of("x"), now_ms=1_000, deadline_ms=9_000)


def test_end_of_a_job_is_counted_with_its_stages_in_seconds() -> None:
    metrics = Metrics()

    metrics.observe_job_end(
        job(), Outcome.DONE, now_ms=2_500, timing_ms={"denoise": 250.0}, version="0123456789ab"
    )

    assert value(metrics, "tdm_jobs_total", class_="scenes", kind="image", outcome="done") == 1
    ended = {"class_": "scenes", "kind": "image", "priority": "normal", "outcome": "done"}
    assert value(metrics, "tdm_job_e2e_seconds_sum", **ended) == 1.5
    assert value(metrics, "tdm_job_stage_seconds_sum", class_="scenes", kind="image", stage="denoise") == 0.25
    version = {"class_": "scenes", "version": "0123456789ab", "outcome": "done"}
    assert value(metrics, "tdm_version_jobs_total", **version) == 1


@pytest.mark.parametrize("outcome", Outcome)
def test_every_way_to_end_has_its_name_and_poison_is_a_dead_letter(outcome: Outcome) -> None:
    metrics = Metrics()

    metrics.observe_job_end(job(JobKind.VIDEO), outcome, now_ms=2_500)

    assert value(metrics, "tdm_jobs_total", class_="scenes", kind="video", outcome=outcome.value) == 1
    letters = value(metrics, "tdm_dead_letters_total", class_="scenes", cause="poison")
    assert letters == (1 if outcome is Outcome.POISON else None)


def test_batch_is_counted_by_its_samples_and_its_fill() -> None:
    metrics = Metrics()

    metrics.observe_batch("scenes", size=3, capacity=4, num_steps=12, busy_ms=80.0, gpu="cpu")

    assert value(metrics, "tdm_batch_size_sum", class_="scenes") == 3
    assert value(metrics, "tdm_batch_fill_ratio_sum", class_="scenes") == 0.75
    assert value(metrics, "tdm_denoise_steps_total", class_="scenes") == 12
    assert value(metrics, "tdm_gpu_busy_seconds_total", gpu="cpu") == 0.08
    assert value(metrics, "tdm_output_engine_seconds_count", class_="scenes") == 3
    assert value(metrics, "tdm_output_engine_seconds_sum", class_="scenes") == pytest.approx(0.08)
    assert value(metrics, "tdm_padding_seconds_total", class_="scenes") == pytest.approx(0.02)


def test_time_a_job_took_is_compared_with_what_was_predicted() -> None:
    metrics = Metrics()
    output = OutputRef(key="k", content_type="image/png", size_bytes=1, width=8, height=8, frames=1, seed=0)
    done = replace(job(), finished_ms=2_500, outputs=(output,))

    metrics.observe_eta(done, 1_000.0)
    metrics.observe_eta(done, None)  # nothing was predicted
    metrics.observe_eta(job(), 1_000.0)  # not finished
    metrics.observe_eta(replace(done, outputs=()), 1_000.0)  # failed

    assert value(metrics, "tdm_eta_ratio_count", class_="scenes", kind="image") == 1
    assert value(metrics, "tdm_eta_ratio_sum", class_="scenes", kind="image") == 1.5


def test_two_processes_worth_of_metrics_do_not_mix() -> None:
    first, second = Metrics(), Metrics()

    first.result_waiters.inc()

    assert (value(first, "tdm_result_waiters"), value(second, "tdm_result_waiters")) == (1, 0)


def test_metrics_are_scraped_on_a_port_of_their_own() -> None:
    metrics = Metrics()
    metrics.result_waiters.set(3)
    server = MetricsServer(metrics, "127.0.0.1", 0)
    try:
        text = httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
    finally:
        server.close()

    assert "tdm_result_waiters 3.0" in text.splitlines()
