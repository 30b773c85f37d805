"""A collector of traces in the test's process: it takes what OTLP exporters send over HTTP, and keeps it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

KINDS = {
    Span.SPAN_KIND_SERVER: "server",
    Span.SPAN_KIND_PRODUCER: "producer",
    Span.SPAN_KIND_CONSUMER: "consumer",
    Span.SPAN_KIND_CLIENT: "client",
    Span.SPAN_KIND_INTERNAL: "internal",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenSpan:
    """A span as it arrived.

    Attributes:
        trace_id, span_id, parent_id: hex; a root has no parent.
        links: trace and span ids.
        begun_ns, ended_ns: unix ns.
    """

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    attributes: Mapping[str, str | int | float | bool]
    links: frozenset[tuple[str, str]]
    is_error: bool
    begun_ns: int
    ended_ns: int

    @property
    def place(self) -> tuple[str, str]:
        """What a link to it names."""
        return self.trace_id, self.span_id


class Collector:
    """Listens as long as its `with` block lasts."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: list[Mapping[str, str]] = []
        self.arrived = threading.Event()
        """A request has come."""
        self.answers = threading.Event()
        """Cleared: it takes requests, and does not answer them."""
        self.answers.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.answers.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What TDM_OTLP_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def spans(self) -> list[SeenSpan]:
        """All that have arrived."""
        return [span for body in self.bodies for span in _spans_of(body)]

    def named(self, name: str) -> list[SeenSpan]:
        """Those of this name, in the order in which they began."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.begun_ns)

    def one(self, name: str) -> SeenSpan:
        """The only one of this name."""
        (span,) = self.named(name)
        return span

    def children(self, parent: SeenSpan) -> list[str]:
        """Names of a span's children, in the order in which they began."""
        found = [span for span in self.spans if (span.trace_id, span.parent_id) == parent.place]
        return [span.name for span in sorted(found, key=lambda span: (span.begun_ns, span.ended_ns))]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.arrived.set()
                collector.answers.wait()
                collector.headers.append(dict(self.headers))
                collector.bodies.append(body)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def _spans_of(body: bytes) -> list[SeenSpan]:
    found = []
    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        service = str(_facts(resource.resource.attributes)["service.name"])
        for scope in resource.scope_spans:
            found += [_seen(service, span) for span in scope.spans]
    return found


def _seen(service: str, span: Span) -> SeenSpan:
    return SeenSpan(
        service=service,
        name=span.name,
        kind=KINDS[span.kind],
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        attributes=_facts(span.attributes),
        links=frozenset((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        is_error=span.status.code == Status.STATUS_CODE_ERROR,
        begun_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
    )


def _facts(attributes: Iterable[KeyValue]) -> dict[str, str | int | float | bool]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in attributes}
