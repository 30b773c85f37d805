"""Tracing: spans as api and worker make them, and the trace contexts that come with requests and jobs.

Off, which is the default, nothing is recorded, and nothing of OpenTelemetry's SDK is loaded: a caller's
context is only passed on, so that log lines join up. On, `server.otel` records the spans and sends them to a
collector.

Attributes are facts about the work: ids, sizes, steps, codes. Never a prompt, a tenant, a key or the message
of an error, which may quote one. Names are those of OpenTelemetry's semantic conventions; what these have no
name for begins with `tdm.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from server.job import Job
from server.metrics import Metrics

Value = str | int | float | bool
Attributes = Mapping[str, Value]

# https://www.w3.org/TR/trace-context/#traceparent-header: ids of zeros and version ff are invalid; versions
# to come may append fields, version 00 may not.
_TRACEPARENT = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_SAMPLED = 0x01
_KNOWN_FLAGS = 0x03  # sampled, and random trace id of level 2; others are not to be passed on


class Kind(StrEnum):
    """What a span is to the one that began its trace; OpenTelemetry's span kinds."""

    SERVER = "server"
    PRODUCER = "producer"
    CONSUMER = "consumer"
    CLIENT = "client"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A place in a trace, as it travels from process to process.

    Attributes:
        trace_id: 32 hex digits.
        span_id: 16 hex digits.
        flags: of the traceparent.
    """

    trace_id: str
    span_id: str
    flags: int

    @property
    def sampled(self) -> bool:
        """Whoever began the trace wants it recorded."""
        return bool(self.flags & _SAMPLED)

    @property
    def traceparent(self) -> str:
        """The W3C header's value, version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def parse_traceparent(value: str) -> TraceContext | None:
    """The context that a W3C `traceparent` names; None for one that is to be ignored."""
    found = _TRACEPARENT.fullmatch(value)
    if found is None or (found[1] == "00" and found[5]):
        return None
    return TraceContext(found[2], found[3], int(found[4], 16) & _KNOWN_FLAGS)


class Span:
    """One operation in a trace. This one is not recorded: it has its place or the caller's, if any."""

    __slots__ = ("context",)

    def __init__(self, context: TraceContext | None = None) -> None:
        self.context = context

    @property
    def is_recorded(self) -> bool:
        """What it is told goes to the collector."""
        return False

    @property
    def traceparent(self) -> str | None:
        """What whoever goes on with the work is to be given."""
        return None if self.context is None else self.context.traceparent

    @property
    def log_ids(self) -> dict[str, str]:
        """What its log lines carry."""
        return {} if self.context is None else {"trace_id": self.context.trace_id}

    def rename(self, name: str) -> None:
        """Give it another name, once more is known."""

    def set(self, attributes: Attributes) -> None:
        """Add facts."""

    def link(self, other: Span) -> None:
        """Point at a span that is related to it, but is not its parent."""

    def fail(self, code: str) -> None:
        """Mark it as failed, and say why in one word."""

    def end(self, at_ns: int | None = None) -> None:
        """It is over, now or at this unix time; whatever comes later changes nothing."""


NO_SPAN = Span()


class Tracing:
    """Makes the spans of one process. This one records none."""

    is_on = False

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
        """A span that begins now, or began at this unix time.

        Args:
            name: low in cardinality: no ids.
            kind: what it is to its trace.
            parent: one without a context makes it the root of a trace.
            attributes: known at its start.
            links: spans that it belongs to beside its parent. Where it is a root with links, it is recorded
                if one of those is.
            start_ns: unix ns.
        """
        del name, kind, attributes, links, start_ns
        return parent

    def now_ns(self) -> int:
        """Unix ns by the clock that its spans go by; 0 where there are none."""
        return 0

    def close(self, patience_s: float) -> None:
        """Send what is left, for so long at most."""
        del patience_s


NO_TRACING = Tracing()

current_span: ContextVar[Span] = ContextVar("current_span", default=NO_SPAN)
"""Of the HTTP request being answered by this task; `server.api.middleware` sets it."""


def check_extra(endpoint: str) -> None:
    """Return if spans can be sent wherever they are to be sent.

    Raises:
        ValueError: the extra `tracing` is not installed.
    """
    if endpoint:
        try:
            import server.otel  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError(
                f"TDM_OTLP_ENDPOINT: {error.name} is not installed: pip install 'tdm-server[tracing]'"
            ) from None


def start_tracing(
    endpoint: str, ratio: float, *, service: str, now_ns: Callable[[], int], metrics: Metrics
) -> Tracing:
    """What makes the spans of this process.

    Args:
        endpoint: base URL of an OTLP/HTTP collector; empty: tracing is off.
        ratio: share of the traces begun here that are recorded.
        service: what this process is called, unless `OTEL_SERVICE_NAME` says otherwise.
        now_ns: unix ns, by the clock of the queue's other processes.
        metrics: of this process.

    Raises:
        ValueError: as `check_extra`.
    """
    if not endpoint:
        return NO_TRACING
    check_extra(endpoint)
    from server.otel import OtelTracing

    return OtelTracing(endpoint, ratio, service=service, now_ns=now_ns, metrics=metrics)


def messaging(operation: str, model: str, job_id: str) -> dict[str, Value]:
    """Attributes of a span about one job in the queue."""
    return {
        "messaging.system": "redis",
        "messaging.operation.name": operation,
        "messaging.operation.type": operation,
        "messaging.destination.name": model,
        "messaging.message.id": job_id,
        "tdm.job.id": job_id,
    }


def trace_of(job: Job) -> Span:
    """Where a job stands in the trace of its request; a span without context if there is none."""
    return Span(parse_traceparent(job.traceparent)) if job.traceparent else NO_SPAN


def record_settled(tracing: Tracing, job: Job, code: str, *, is_error: bool = True) -> None:
    """Show in a job's trace that it was ended without (another) attempt."""
    parent = trace_of(job)
    if tracing.is_on and parent.context is not None:
        attributes = {**messaging("settle", job.model, job.id), "tdm.attempt": job.attempt}
        span = tracing.start(f"settle {job.model}", Kind.CLIENT, parent, attributes)
        if is_error:
            span.fail(code)
        else:
            span.set({"tdm.job.outcome": code})
        span.end()
