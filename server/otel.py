"""OpenTelemetry behind `server.tracing`: the SDK, its sampler, and the exporter to a collector.

The one module that imports OpenTelemetry, from the extra `tracing`. Requests never wait for the collector:
ended spans go into a bounded queue, and a thread sends them. What does not fit, or cannot be sent, is dropped
and counted.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import (
    Decision,
    ParentBasedTraceIdRatio,
    Sampler,
    SamplingResult,
)
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    set_span_in_context,
)
from opentelemetry.trace import Span as OtelApiSpan
from opentelemetry.util.types import Attributes as OtelAttributes

from server.metrics import Metrics
from server.tracing import Attributes, Kind, Span, TraceContext, Tracing

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"
MAX_QUEUED = 4096
"""Ended spans that wait to be sent, a few kB each; one more is dropped."""

_KINDS = {kind: SpanKind[kind.name] for kind in Kind}


class _Recorded(Span):
    """A span that the SDK records."""

    __slots__ = ("_ended", "_now_ns", "otel")

    def __init__(self, otel: OtelApiSpan, now_ns: Callable[[], int]) -> None:
        super().__init__(_portable(otel.get_span_context()))
        self.otel = otel
        self._now_ns = now_ns
        self._ended = False

    @property
    def is_recorded(self) -> bool:
        return not self._ended

    @property
    def log_ids(self) -> dict[str, str]:
        assert self.context is not None
        return {"trace_id": self.context.trace_id, "span_id": self.context.span_id}

    def rename(self, name: str) -> None:
        self.otel.update_name(name)

    def set(self, attributes: Attributes) -> None:
        self.otel.set_attributes(attributes)

    def link(self, other: Span) -> None:
        if other.context is not None:
            self.otel.add_link(_context_of(other))

    def fail(self, code: str) -> None:
        self.otel.set_attribute("error.type", code)
        self.otel.set_status(StatusCode.ERROR)

    def end(self, at_ns: int | None = None) -> None:
        if not self._ended:
            self._ended = True
            self.otel.end(self._now_ns() if at_ns is None else at_ns)


class OtelTracing(Tracing):
    """Records spans with OpenTelemetry's SDK."""

    is_on = True

    def __init__(
        self, endpoint: str, ratio: float, *, service: str, now_ns: Callable[[], int], metrics: Metrics
    ) -> None:
        """Sends nothing before the first span has ended. Arguments: `server.tracing.start_tracing`."""
        # A collector that is away is a line for every batch that it has cost, not for every try.
        logging.getLogger("opentelemetry").setLevel(logging.ERROR)
        self._now_ns = now_ns
        self._provider = TracerProvider(
            sampler=_FollowsLinks(ratio), resource=_resource(service), shutdown_on_exit=False
        )
        self._provider.add_span_processor(
            _CountingProcessor(OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces"), metrics)
        )
        self._tracer = self._provider.get_tracer("tdm-server", version("tdm-server"), SCHEMA_URL)

    def start(
        self,
        name: str,
        kind: Kind,
        parent: Span,
        attributes: Attributes,
        *,
        links: Sequence[Span] = (),
        start_ns: int | None = None,
    ) -> Span:
        # Always with a context of its own: without one, the SDK takes whatever is current in this thread.
        context = Context()
        if parent.context is not None:
            context = set_span_in_context(NonRecordingSpan(_context_of(parent)), context)
        span = self._tracer.start_span(
            name,
            context,
            _KINDS[kind],
            attributes,
            [Link(_context_of(link)) for link in links if link.context is not None],
            self._now_ns() if start_ns is None else start_ns,
        )
        if span.is_recording():
            return _Recorded(span, self._now_ns)
        found = span.get_span_context()
        return Span(_portable(found)) if found.is_valid else parent  # invalid: OTEL_SDK_DISABLED

    def now_ns(self) -> int:
        return self._now_ns()

    def close(self, patience_s: float) -> None:
        # The SDK would wait for half a minute, and for the exporter's own patience after that.
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(patience_s)


class _FollowsLinks(Sampler):
    """Does as the parent does. A root with links is recorded if one of those is, another one by the ratio."""

    def __init__(self, ratio: float) -> None:
        self._ratio = ratio
        self._others = ParentBasedTraceIdRatio(ratio)

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: OtelAttributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        if links and not parent_context:  # a root's context is empty
            is_sampled = any(link.context.trace_flags.sampled for link in links)
            return SamplingResult(Decision.RECORD_AND_SAMPLE if is_sampled else Decision.DROP, attributes)
        return self._others.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        return f"FollowsLinks{{{self._ratio:g}}}"


class _CountingProcessor(BatchSpanProcessor):
    """Sends ended spans from a thread, and counts what became of them."""

    def __init__(self, exporter: SpanExporter, metrics: Metrics) -> None:
        self._lock = threading.Lock()
        self._num_queued = 0
        self._dropped = metrics.trace_spans.labels("dropped")
        counting = _CountingExporter(exporter, metrics, self._taken)
        super().__init__(counting, max_queue_size=MAX_QUEUED)

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock:
            fits = self._num_queued < MAX_QUEUED
            self._num_queued += fits
        if not fits:  # the SDK would drop the oldest one instead, and count neither
            self._dropped.inc()
            return
        super().on_end(span)

    def _taken(self, num_spans: int) -> None:
        with self._lock:
            self._num_queued -= num_spans


class _CountingExporter(SpanExporter):
    """Another exporter, whose results are counted."""

    def __init__(self, exporter: SpanExporter, metrics: Metrics, taken: Callable[[int], None]) -> None:
        self._exporter = exporter
        self._spans = metrics.trace_spans
        self._taken = taken

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._taken(len(spans))
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            outcome = "exported" if result is SpanExportResult.SUCCESS else "dropped"
            self._spans.labels(outcome).inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


def _resource(service: str) -> Resource:
    """Who sends the spans; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` have the last word."""
    ours = {
        "service.name": service,
        "service.namespace": "tdm",
        "service.version": version("tdm-server"),
        "service.instance.id": f"{os.uname().nodename}-{os.getpid()}",
    }
    return Resource.create(ours).merge(OTELResourceDetector().detect())


def _portable(context: SpanContext) -> TraceContext:
    return TraceContext(f"{context.trace_id:032x}", f"{context.span_id:016x}", int(context.trace_flags))


def _context_of(span: Span) -> SpanContext:
    """A span's context in the SDK's form: its own if it was recorded here, else one from elsewhere."""
    if isinstance(span, _Recorded):
        return span.otel.get_span_context()
    assert span.context is not None
    return SpanContext(
        int(span.context.trace_id, 16),
        int(span.context.span_id, 16),
        is_remote=True,
        trace_flags=TraceFlags(span.context.flags),
    )
