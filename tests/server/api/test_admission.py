"""Admission: what the queue and the measured latency say about one more job."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.admission import (
    NO_WORKER_RETRY_MS,
    Load,
    decide,
    own_ms,
    predict_eta_ms,
    predict_latest_ms,
    predict_outlook,
)


def batch_ms(num_samples: int) -> float:
    """A worker that needs 20 ms for a batch, and 10 ms for each sample in it."""
    return 20.0 + 10.0 * num_samples


def load(*, waiting: int = 0, running: int = 0, num_workers: int = 2, max_batch: int = 8) -> Load:
    """Jobs of one sample each, which cost their part of a full batch."""
    ms = batch_ms(max_batch) / max_batch
    return Load(
        waiting=waiting,
        waiting_ms=waiting * ms,
        running_ms=running * ms,
        num_workers=num_workers,
        max_batch=max_batch,
    )


def eta_ms(state: Load, num_samples: int = 1) -> float | None:
    return predict_eta_ms(state, own_ms(state, batch_ms, num_samples))


def max_ahead_ms(state: Load, own: float, deadline_ms: float) -> float | None:
    outlook = predict_outlook(state, own, deadline_ms)
    return outlook.max_ahead_ms if outlook else None


def decide_one(state: Load, **changes: float) -> tuple[str | None, float | None, float | None]:
    arguments = {"num_samples": 1, "max_waiting": 10, "deadline_ms": 60_000.0} | changes
    decision = decide(state, batch_ms, **arguments)  # type: ignore[arg-type]
    return decision.reason, decision.eta_ms, decision.retry_after_ms


def test_idle_system_is_predicted_to_take_one_batch() -> None:
    assert decide_one(load()) == (None, 30.0, None)


def test_jobs_ahead_are_predicted_to_run_in_full_batches_on_all_workers() -> None:
    # Two workers end eight samples each per 100 ms: 6.25 ms for each of the 16 jobs ahead.
    assert eta_ms(load(waiting=8, running=8)) == pytest.approx(130.0)


def test_jobs_ahead_count_by_their_work() -> None:
    # One job of 16 samples, or 16 of one: the same wait behind them.
    one = Load(waiting=1, waiting_ms=200.0, running_ms=0.0, num_workers=2, max_batch=8)
    assert eta_ms(one) == eta_ms(load(waiting=16)) == pytest.approx(130.0)


def test_more_samples_than_a_batch_holds_take_several() -> None:
    assert eta_ms(load(max_batch=4), num_samples=10) == 3 * batch_ms(4)


def test_running_job_waits_for_nobody() -> None:
    state = load(waiting=9, running=9)
    assert predict_eta_ms(state, own_ms(state, batch_ms, 1), ahead_ms=0.0) == 30.0


def test_work_that_may_stand_before_a_job_is_what_all_workers_do_until_it_must_begin() -> None:
    assert max_ahead_ms(load(), own=30.0, deadline_ms=500.0) == 2 * 470.0
    assert max_ahead_ms(load(), own=600.0, deadline_ms=500.0) == 0.0
    assert max_ahead_ms(load(num_workers=0), own=30.0, deadline_ms=500.0) is None


def test_full_queue_refuses_until_one_place_is_free() -> None:
    reason, _, retry_after_ms = decide_one(load(waiting=99, running=16), max_waiting=90)

    assert reason == "queue"
    assert retry_after_ms == pytest.approx((99 - 90 + 1) * 6.25)


def test_job_that_cannot_make_its_deadline_is_refused_for_as_long_as_it_cannot() -> None:
    reason, eta_ms, retry_after_ms = decide_one(load(waiting=96), max_waiting=256, deadline_ms=500.0)

    assert reason == "deadline"
    assert eta_ms is not None
    assert retry_after_ms == pytest.approx(eta_ms - 500.0)


def test_without_a_worker_jobs_are_taken_while_there_is_room() -> None:
    assert decide_one(load(waiting=9, num_workers=0)) == (None, None, None)


def test_without_a_worker_a_full_queue_refuses() -> None:
    assert decide_one(load(waiting=10, num_workers=0)) == ("queue", None, NO_WORKER_RETRY_MS)


@given(
    waiting=st.integers(0, 1000),
    running=st.integers(0, 64),
    num_workers=st.integers(0, 16),
    max_batch=st.integers(1, 64),
    num_samples=st.integers(1, 10),
)
def test_refusals_name_a_time_in_the_future_and_admissions_none(
    waiting: int, running: int, num_workers: int, max_batch: int, num_samples: int
) -> None:
    state = load(waiting=waiting, running=running, num_workers=num_workers, max_batch=max_batch)
    decision = decide(state, batch_ms, num_samples=num_samples, max_waiting=256, deadline_ms=5_000.0)

    if decision.reason is None:
        assert decision.retry_after_ms is None
        assert waiting < 256
    else:
        assert decision.retry_after_ms is not None
        assert decision.retry_after_ms > 0


@given(waiting=st.integers(0, 500), num_workers=st.integers(1, 16))
def test_eta_grows_with_the_queue_and_shrinks_with_workers(waiting: int, num_workers: int) -> None:
    def eta(waiting: int, num_workers: int) -> float:
        found = eta_ms(load(waiting=waiting, num_workers=num_workers))
        assert found is not None
        return found

    assert eta(waiting + 1, num_workers) > eta(waiting, num_workers)
    assert eta(waiting, num_workers + 1) <= eta(waiting, num_workers)


def test_workers_that_are_slower_than_the_table_take_so_much_longer() -> None:
    state = load(waiting=8, running=8)
    slow = replace(state, pace=1.5)
    own = own_ms(state, batch_ms, 1)
    assert predict_eta_ms(slow, own) == pytest.approx(1.5 * 130.0)
    assert max_ahead_ms(slow, own, 450.0) == max_ahead_ms(state, own, 300.0)  # what they do in that time
    full = load(waiting=99)
    refused = [decide_one(one, max_waiting=90)[2] or 0.0 for one in (full, replace(full, pace=1.5))]
    assert refused[1] == pytest.approx(1.5 * refused[0])


def test_what_is_done_with_pixels_takes_its_time_too() -> None:
    state = replace(load(waiting=8, running=8), beside_ms=40.0)
    assert eta_ms(state) == pytest.approx(130.0 + 40.0)
    assert max_ahead_ms(state, own=30.0, deadline_ms=540.0) == 2 * 470.0


def test_a_job_that_only_the_table_believes_to_be_in_time_is_refused() -> None:
    assert decide_one(load(waiting=8, running=8), deadline_ms=150.0)[0] is None
    assert decide_one(replace(load(waiting=8, running=8), pace=1.5), deadline_ms=150.0)[0] == "deadline"


def test_whoever_waits_is_admitted_with_as_much_room_as_others_lately_needed() -> None:
    state = replace(load(waiting=8, running=8), margin=1.5)  # 100 ms behind them, 30 of its own
    own = own_ms(state, batch_ms, 1)
    assert eta_ms(state) == pytest.approx(130.0)  # what is told stays what is expected
    assert predict_latest_ms(state, own) == pytest.approx(180.0)
    assert max_ahead_ms(state, own, 180.0) == pytest.approx(200.0)  # just what is ahead
    assert decide_one(state, deadline_ms=181.0)[0] is None
    reason, _, retry_after_ms = decide_one(state, deadline_ms=120.0)
    assert reason == "deadline"
    assert retry_after_ms == pytest.approx(60.0)


def test_whoever_need_not_wait_needs_no_room() -> None:
    idle = replace(load(), margin=4.0)
    assert decide_one(idle, deadline_ms=31.0)[0] is None


def test_what_the_queue_is_told_adds_up_to_the_prediction() -> None:
    state = replace(load(waiting=8, running=8), pace=1.2, beside_ms=40.0, margin=1.5)
    own = own_ms(state, batch_ms, 1)
    outlook = predict_outlook(state, own, 1000.0)
    assert outlook is not None
    assert outlook.own_ms + 200.0 * outlook.per_work == pytest.approx(eta_ms(state))
    at_most = predict_latest_ms(state, own, ahead_ms=outlook.max_ahead_ms)
    assert at_most == pytest.approx(1000.0)
