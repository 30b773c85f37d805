"""Outcome: what a scenario's run has come to, and whether that is good enough."""

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtests.lib.accounts import Accounts

K6_THRESHOLDS_FAILED = 99
K6_INTERRUPTED = 105

GOODPUT_KEPT = 0.8
"""Beyond its knee a server still draws this share of its best."""
KEPT_UP = 0.85
"""On a stair of a few seconds; less means that a queue has grown on it."""
MUST_NOT_GROW = ("process_resident_memory_bytes", "process_open_fds")
"""Gauges of a soak. Redis grows for a day, as long as it keeps finished jobs."""
MOST_GROWTH = 1.15
"""Of their last quarter, compared with the second: a process grows while it warms up."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2::before { content: "✓ "; color: #187a3a } h2.bad::before { content: "✗ " }
.bad, h2.bad::before { color: #b3261e } td, th { text-align: right; padding: 0 .8rem } small { color: #667 }
"""
STAIR_HEADINGS = ("%", "offered/s", "drawn/s", "p95 ms", "refused")


@dataclass(slots=True)
class Outcome:
    """One scenario's run, as it is written down.

    Attributes:
        started: date and time.
        k6_status: exit status of k6.
        blows: how many commands were run to kill something.
        summary: what k6's `handleSummary` is given and the scenario adds to it; empty if k6 failed before.
        accounts: None if they could not be made.
        audit: report of `python -m server audit`; None if it was not asked.
        stairs: of a ramp: percent, offered and drawn pictures/s, p95 and refusals of each stair.
        gauges: address -> gauge -> its values in the order of time.
        problems: why it has failed, a line each; none if it has passed.
    """

    scenario: str
    started: str
    k6_status: int = 0
    interrupted: bool = False
    blows: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    accounts: Accounts | None = None
    audit: dict[str, Any] | None = None
    stairs: list[dict[str, float]] = field(default_factory=list)
    gauges: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def value(self, metric: str, value: str) -> float:
        """One of k6's numbers; 0 where it has none."""
        return float(self.summary.get("metrics", {}).get(metric, {}).get("values", {}).get(value, 0))

    @property
    def verdict(self) -> str:
        """In a word."""
        return "FAILED" if self.problems else "interrupted" if self.interrupted else "passed"

    def judge(self, *, num_blows: int) -> None:
        """Write down why it has failed.

        Args:
            num_blows: how many commands there were to run.
        """
        ended_badly = self.k6_status not in (0, K6_THRESHOLDS_FAILED, K6_INTERRUPTED)
        if ended_badly or not (self.summary or self.interrupted):
            self.problems.append(f"k6 ended with status {self.k6_status}: see {self.scenario}.log")
        if self.accounts is not None:
            self.problems += self.accounts.problems
        if self.interrupted:  # so were requests, and that is nobody's fault
            return
        self.problems += [
            f"{name} is not kept: {values}" for name, kept, values in thresholds(self.summary) if not kept
        ]
        for check in self.summary.get("root_group", {}).get("checks", []):
            if check["fails"]:
                total = check["passes"] + check["fails"]
                self.problems.append(f"{check['name']}: failed {check['fails']} of {total} times")
        if self.blows < num_blows:
            self.problems.append(f"{self.blows} of {num_blows} blows fell: too few jobs for --blow-every")
        self.stairs = stairs(self)
        self.problems += judge_stairs(self.stairs)
        if self.scenario == "soak":
            self.problems += judge_gauges(self.gauges)

    def figures(self, slo_ms: float) -> str:
        """Its numbers in a line."""
        parts = []
        if count := self.value("pictures", "count"):
            parts.append(f"{count:g} pictures, p95 {self.value('picture_ms', 'p(95)'):.0f} ms")
        if count := self.value("video_ms", "count"):
            parts.append(f"{count:g} videos, p95 {self.value('video_ms', 'p(95)') / 1000:.1f} s")
        if count := self.value("job_ms", "count"):
            parts.append(f"{count:g} jobs followed, p95 {self.value('job_ms', 'p(95)') / 1000:.1f} s")
            parts.append(f"{self.blows} blows")
        if count := self.value("refused", "count"):
            parts.append(f"{count:g} refused, p95 {self.value('refusal_ms', 'p(95)'):.0f} ms")
        if self.stairs:
            best = max(one["drawn_per_s"] for one in self.stairs)
            parts.append(f"knee {knee(self.stairs, slo_ms):g}/s, best {best:g}/s")
        if self.accounts is not None:
            ends = ", ".join(f"{count} {end}" for end, count in sorted(self.accounts.ends.items()))
            parts.append(f"{self.accounts.accepted} accepted: {ends or 'none asked for'}")
        if self.audit is not None:
            parts.append(f"audit {'clean' if self.audit['clean'] else 'not clean'}")
        return "; ".join(parts)


def thresholds(summary: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    """Every threshold that could fail: what it says, whether it is kept, the values it is about."""
    for name, metric in summary.get("metrics", {}).items():
        for threshold, verdict in metric.get("thresholds", {}).items():
            if not threshold.endswith(">=0"):
                values = ", ".join(f"{key} {value:.4g}" for key, value in metric["values"].items())
                yield f"{name}: {threshold}", verdict["ok"], values


def stairs(outcome: Outcome) -> list[dict[str, float]]:
    """What a ramp has found, stair by stair; nothing of another scenario."""
    plan = outcome.summary.get("stairs", {"percent": [], "per_s": []})
    return [
        {
            "percent": percent,
            "offered_per_s": round(per_s, 2),
            "drawn_per_s": round(outcome.value(f"pictures{{step:{percent}}}", "count") / plan["step_s"], 2),
            "p95_ms": round(outcome.value(f"picture_ms{{step:{percent}}}", "p(95)"), 1),
            "refused": outcome.value(f"refused{{step:{percent}}}", "count"),
        }
        for percent, per_s in zip(plan["percent"], plan["per_s"], strict=True)
    ]


def knee(found: Sequence[Mapping[str, float]], slo_ms: float) -> float:
    """The most pictures/s that were offered and drawn in time, before the first stair where some were not.

    Nor does a stair count on which the queue grew: a short one ends before that makes anybody late.
    """
    in_time = itertools.takewhile(lambda one: not one["refused"] and one["p95_ms"] <= slo_ms, found)
    offered = [
        one["offered_per_s"] for one in in_time if one["drawn_per_s"] >= KEPT_UP * one["offered_per_s"]
    ]
    return max(offered, default=0.0)


def judge_stairs(found: Sequence[Mapping[str, float]]) -> Iterator[str]:
    """Whether a server that is asked for too much draws less than it could."""
    if found:
        best, last = max(one["drawn_per_s"] for one in found), found[-1]
        if last["drawn_per_s"] < GOODPUT_KEPT * best:
            yield f"at {last['percent']:g} % it draws {last['drawn_per_s']:g} pictures/s, at best {best:g}"


def judge_gauges(gauges: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    """Whether something grows: medians of the last quarter of the values and of the second."""
    for address, named in gauges.items():
        for name, values in named.items():
            quarter = len(values) // 4
            if quarter == 0 or name not in MUST_NOT_GROW:
                continue
            parts = values[quarter : 2 * quarter], values[-quarter:]
            before, after = (sorted(part)[quarter // 2] for part in parts)
            if after > MOST_GROWTH * before:
                yield f"{name} of {address} has grown from {before:g} to {after:g}"


def write_page(outcomes: Sequence[Outcome], folder: Path, about: Mapping[str, Any], slo_ms: float) -> None:
    """`index.html`: every scenario's verdict and thresholds, and links to its other files."""
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    sections = "".join(_section(outcome, folder, slo_ms) for outcome in outcomes)
    head = f"<!doctype html><meta charset=utf-8><title>Load</title><style>{STYLE}</style>"
    page = f"{head}<h1>Load</h1><p>{html.escape(facts)}{sections}\n"
    (folder / "index.html").write_text(page, encoding="utf-8")


def _section(outcome: Outcome, folder: Path, slo_ms: float) -> str:
    names = [f"{outcome.scenario}.{suffix}" for suffix in ("html", "json", "log")]
    links = " ".join(f'<a href="{name}">{name}</a>' for name in names if (folder / name).exists())
    heading = "bad" if outcome.problems else "ok"
    problems = "".join(f"<li class=bad>{html.escape(problem)}" for problem in outcome.problems)
    kept = "".join(
        f"<li class={'ok' if ok else 'bad'}>{html.escape(name)} <small>{html.escape(values)}</small>"
        for name, ok, values in thresholds(outcome.summary)
    )
    rows = "".join("<tr>" + "".join(f"<td>{value:g}" for value in one.values()) for one in outcome.stairs)
    table = f"<table><tr>{''.join(f'<th>{name}' for name in STAIR_HEADINGS)}{rows}</table>" if rows else ""
    figures = html.escape(outcome.figures(slo_ms))
    return (
        f"<h2 class={heading}>{outcome.scenario}</h2><p>{outcome.verdict}: {figures}"
        f"<p>{links}<ul>{problems}</ul>{table}<details><summary>thresholds</summary><ul>{kept}</ul></details>"
    )
