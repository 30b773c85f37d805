"""Tracing: W3C contexts, what is recorded and reaches a collector, and that nothing is loaded when off."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.__main__ import main
from server.metrics import Metrics
from server.otel import MAX_QUEUED
from server.tracing import NO_SPAN, NO_TRACING, Kind, Span, Tracing, parse_traceparent, start_tracing
from tests.server.collector import Collector

ROOT = Path(__file__).resolve().parents[2]
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SAMPLED = Span(parse_traceparent(f"00-{TRACE}-{CALLER}-01"))
UNSAMPLED = Span(parse_traceparent(f"00-{TRACE}-{CALLER}-00"))
PATIENCE_S = 60.0


def tracing_to(collector: Collector, *, ratio: float = 1.0, metrics: Metrics | None = None) -> Tracing:
    return start_tracing(
        collector.url, ratio, service="test", now_ns=time.time_ns, metrics=metrics or Metrics()
    )


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (f"00-{TRACE}-{CALLER}-01", "01"),
        (f"00-{TRACE}-{CALLER}-00", "00"),
        (f"00-{TRACE}-{CALLER}-ff", "03"),  # flags that nobody knows yet are not passed on
        (f"cc-{TRACE}-{CALLER}-01", "01"),
        (f"cc-{TRACE}-{CALLER}-01-what-comes-later", "01"),
    ],
)
def test_valid_traceparent_is_passed_on_as_version_00(header: str, flags: str) -> None:
    context = parse_traceparent(header)

    assert context is not None
    assert context.traceparent == f"00-{TRACE}-{CALLER}-{flags}"
    assert context.sampled == (flags != "00")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "traceparent",
        f"00-{TRACE}-{CALLER}",
        f"00-{TRACE}-{CALLER}-1",
        f"00-{TRACE}-{CALLER}-01-more",
        f"00-{TRACE}-{CALLER}-01\n",
        f"cc-{TRACE}-{CALLER}-01.more",
        f"ff-{TRACE}-{CALLER}-01",
        f"00-{TRACE.upper()}-{CALLER}-01",
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
    ],
)
def test_invalid_traceparent_is_ignored(header: str) -> None:
    assert parse_traceparent(header) is None


def test_without_tracing_a_span_is_its_parent_and_takes_no_notice() -> None:
    tracing = start_tracing("", 1.0, service="test", now_ns=time.time_ns, metrics=Metrics())
    span = tracing.start("work", Kind.INTERNAL, SAMPLED, {"tdm.model": "scenes"})
    span.set({"tdm.attempt": 1})
    span.link(UNSAMPLED)
    span.fail("poison")
    span.end()
    tracing.close(PATIENCE_S)

    assert tracing is NO_TRACING
    assert (span.is_recorded, span.traceparent) == (False, f"00-{TRACE}-{CALLER}-01")
    assert span.log_ids == {"trace_id": TRACE}
    assert (NO_SPAN.traceparent, NO_SPAN.log_ids) == (None, {})


def test_span_reaches_the_collector_with_all_that_it_was_told(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20of-the-collector")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    tracing = tracing_to(collector)
    span = tracing.start("work", Kind.CONSUMER, SAMPLED, {"tdm.attempt": 2}, start_ns=1_000)
    child = tracing.start("decode", Kind.INTERNAL, span, {}, start_ns=2_000)
    child.end(3_000)
    span.rename("process scenes")
    span.set({"tdm.backend": "eager"})
    span.link(child)
    span.link(NO_SPAN)
    span.fail("poison")
    ids = span.log_ids
    span.end(4_000)
    span.end(5_000)
    span.set({"tdm.backend": "late"})
    tracing.close(PATIENCE_S)

    seen, inner = collector.one("process scenes"), collector.one("decode")
    assert (seen.service, seen.kind, seen.trace_id, seen.parent_id) == ("ours", "consumer", TRACE, CALLER)
    assert seen.attributes == {"tdm.attempt": 2, "tdm.backend": "eager", "error.type": "poison"}
    assert (seen.is_error, seen.begun_ns, seen.ended_ns) == (True, 1_000, 4_000)
    assert seen.links == {inner.place}
    assert (inner.trace_id, inner.parent_id, inner.is_error) == (TRACE, seen.span_id, False)
    assert ids == {"trace_id": TRACE, "span_id": seen.span_id}
    assert collector.headers[0]["authorization"] == "Bearer of-the-collector"


def test_caller_decides_whether_its_trace_is_recorded(collector: Collector) -> None:
    always, never = tracing_to(collector), tracing_to(collector, ratio=0.0)
    ignored = always.start("ignored", Kind.SERVER, UNSAMPLED, {})
    recorded = never.start("recorded", Kind.SERVER, SAMPLED, {})
    for span in (ignored, recorded):
        span.end()
    for tracing in (always, never):
        tracing.close(PATIENCE_S)

    assert [span.name for span in collector.spans] == ["recorded"]
    assert ignored.context is not None
    assert (ignored.context.trace_id, ignored.context.sampled) == (TRACE, False)
    assert ignored.traceparent != UNSAMPLED.traceparent  # it is in the trace, though nobody sees it


def test_trace_that_begins_here_is_recorded_by_the_ratio_and_one_with_links_if_a_link_is(
    collector: Collector,
) -> None:
    tracing = tracing_to(collector, ratio=0.0)
    tracing.start("root", Kind.SERVER, NO_SPAN, {}).end()
    tracing.start("of nobody", Kind.INTERNAL, NO_SPAN, {}, links=[UNSAMPLED]).end()
    tracing.start("of one", Kind.INTERNAL, NO_SPAN, {}, links=[UNSAMPLED, SAMPLED]).end()
    tracing.close(PATIENCE_S)

    (span,) = collector.spans
    assert (span.name, span.parent_id) == ("of one", "")
    assert span.trace_id != TRACE


def test_spans_beyond_what_may_wait_for_the_collector_are_dropped_and_counted(collector: Collector) -> None:
    def count(outcome: str) -> float | None:
        return metrics.registry.get_sample_value("tdm_trace_spans_total", {"outcome": outcome})

    metrics = Metrics()
    tracing = tracing_to(collector, metrics=metrics)
    collector.answers.clear()
    first = 512  # so many are sent at once
    for _ in range(first):
        tracing.start("work", Kind.INTERNAL, NO_SPAN, {}).end()
    assert collector.arrived.wait(PATIENCE_S)
    for _ in range(MAX_QUEUED + 5):
        tracing.start("work", Kind.INTERNAL, NO_SPAN, {}).end()

    assert count("dropped") == 5
    collector.answers.set()
    tracing.close(PATIENCE_S)
    assert count("exported") == len(collector.spans) == first + MAX_QUEUED


def test_collector_that_never_answers_does_not_hold_up_the_end(collector: Collector) -> None:
    tracing = tracing_to(collector)
    collector.answers.clear()
    tracing.start("work", Kind.INTERNAL, NO_SPAN, {}).end()

    tracing.close(0.01)

    assert collector.spans == []


def test_nothing_that_traces_is_loaded_where_tracing_is_off() -> None:
    # FastAPI always loads OpenTelemetry's API, and redis-py the SDK's metrics if it finds them.
    script = """
import sys
from server.api.app import create_app
from server.settings import Settings
import server.worker.batcher, server.worker.finisher

create_app(Settings(redis_url="redis://nowhere"))
ours = ("opentelemetry.sdk.trace", "opentelemetry.exporter", "opentelemetry.proto", "server.otel")
print(*(name for name in sys.modules if name.startswith(ours)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, check=False, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize("role", ["up", "api", "worker"])
def test_process_ends_at_its_start_where_the_extra_is_missing(
    role: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "server.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    monkeypatch.setenv("TDM_OTLP_ENDPOINT", "http://127.0.0.1:4318")

    assert main([role]) == 2
    assert capsys.readouterr().err == (
        "error: TDM_OTLP_ENDPOINT: opentelemetry.sdk.resources is not installed: "
        "pip install 'tdm-server[tracing]'\n"
    )
