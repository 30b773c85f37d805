"""`python -m server plan`: the smallest fleet that keeps a promise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.bundle.manifest import write_manifest
from server.__main__ import main
from server.worker.plan import Demand, ImpossibleError, fleets, most_for
from tests.server.manifests import make_manifest


def batch_ms(batch: int) -> float:
    return 20.0 + 30.0 * batch


def demand(**changes: float) -> Demand:
    plain = {"rate_per_s": 40.0, "num_samples": 1, "slo_ms": 400.0, "percent": 95.0, "beside_ms": 10.0}
    return Demand(**{**plain, **changes})  # type: ignore[arg-type]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    write_manifest(tmp_path, make_manifest("scenes"))
    return tmp_path


def test_smallest_fleet_that_keeps_the_promise_is_the_last_one() -> None:
    *smaller, found = fleets(demand(), batch_ms, max_batch=8)
    assert found.outcome.percentile_ms(95) <= 400
    assert all(fleet.outcome.percentile_ms(95) > 400 for fleet in smaller)
    # A worker makes at most 8 / 260 ms = 30.8 a second.
    assert found.num_workers >= 2


@pytest.mark.parametrize(
    ("stricter", "laxer"),
    [({"rate_per_s": 90.0}, {}), ({"slo_ms": 130.0}, {}), ({"percent": 99.9}, {"percent": 50.0})],
)
def test_more_is_never_had_for_less(stricter: dict[str, float], laxer: dict[str, float]) -> None:
    few, many = ([*fleets(demand(**one), batch_ms, 8)][-1].num_workers for one in (laxer, stricter))
    assert few <= many


@pytest.mark.parametrize("num_workers", [1, 3])
def test_most_that_a_fleet_serves_is_just_what_it_takes_to_serve_it(num_workers: int) -> None:
    most = most_for(demand(), num_workers, batch_ms, max_batch=8)
    assert most.outcome.percentile_ms(95) <= 400
    *_, enough = fleets(demand(rate_per_s=most.rate_per_s), batch_ms, max_batch=8)
    assert enough.num_workers == num_workers
    *_, more = fleets(demand(rate_per_s=1.1 * most.rate_per_s), batch_ms, max_batch=8)
    assert more.num_workers == num_workers + 1


def test_promise_that_one_request_alone_breaks_is_impossible() -> None:
    with pytest.raises(ImpossibleError, match="one request alone takes 60 ms; 55 ms are allowed"):
        list(fleets(demand(slo_ms=55.0), batch_ms, 8))


@pytest.mark.slow
def test_promise_too_close_to_one_alone_is_impossible() -> None:
    with pytest.raises(ImpossibleError, match="do not keep 60 ms, too close to the 60 ms of one alone"):
        list(fleets(demand(slo_ms=60.0, percent=99.99, rate_per_s=400.0), batch_ms, 8))


def test_command_prints_a_table_and_what_it_comes_to(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(bundle), "--rate", "5", "--slo", "2", "--price", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "95 % within 2 s" in printed
    assert "worker-hours a day" in printed
    assert "which cost" in printed


def test_command_says_what_given_workers_can_do(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(bundle), "--workers", "2", "--slo", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # A batch of 8 takes 6 times 100 ms: one worker makes at most 13.3 a second.
    assert plan["workers"] == 2
    assert 20 < plan["requests_per_s"] < 26.7


def test_workers_that_are_slower_than_the_table_serve_so_much_less(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for pace in ("1", "2"):
        command = ["plan", str(bundle), "--workers", "2", "--slo", pace, "--pace", pace, "--json"]
        assert main(command) == 0
        found.append(json.loads(capsys.readouterr().out)["requests_per_s"])
    assert found[1] == pytest.approx(found[0] / 2, rel=0.03)  # with twice the time for it


def test_command_prints_json(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(bundle), "--rate", "5", "--slo", "2", "--json", "--price", "3"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["workers"] == plan["fleets"][-1]["workers"] >= 1
    assert plan["fleets"][-1]["p95_ms"] <= 2000
    assert plan["worker_hours_per_1000"] == pytest.approx(plan["workers"] / 18)
    assert plan["price_per_1000"] == pytest.approx(plan["workers"] / 6)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--slo", "0.0001"], 1, "one request alone takes"),
        (["--slo", "2", "--size", "12x12"], 2, "--size 12x12: scenes has 64x64"),
        (["--slo", "2", "--size", "big"], 2, "WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES is expected"),
        (["--slo", "2", "--steps", "3"], 2, "--steps 3: scenes has"),
    ],
)
def test_what_cannot_be_planned_is_said(
    bundle: Path, capsys: pytest.CaptureFixture[str], options: list[str], status: int, said: str
) -> None:
    assert main(["plan", str(bundle), "--rate", "5", *options]) == status
    printed = capsys.readouterr()
    assert said in " ".join((printed.out + printed.err).split())


@pytest.mark.parametrize("options", [["--rate", "0"], ["--rate", "1", "--percentile", "100"], ["--n", "0"]])
def test_numbers_that_mean_nothing_are_refused(bundle: Path, options: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", str(bundle), "--slo", "2", "--rate", "1", *options])
    assert ended.value.code == 2


def test_folder_that_is_no_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tmp_path), "--rate", "1", "--slo", "2"]) == 2
    assert "is not a bundle" in capsys.readouterr().err
