"""Spans of every call for OpenTelemetry: one for the whole, under the client's own span where it sends a `traceparent`,
and one for each stay in the queue, in prefill and in decoding. Attributes follow the GenAI conventions; ours begin with
`headrace.`. Prompts and answers are in none. Imported only with `--otlp-endpoint`; needs `pip install headrace[otel]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from headrace import __version__
from headrace.core import clock
from headrace.core.explain.record import PREFILL, QUEUE, Record, Stay
from headrace.gateway.explaining import Note, Visit

_PATH = "/v1/traces"
_COMPLETES = ("/v1/completions", "/api/generate")  # texts; the others are chats


class Traces:
    """Owns the provider, whose thread sends what has ended. `processor` is for tests."""

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.name": "headrace", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer: Tracer = self._provider.get_tracer("headrace", __version__)
        self._context = TraceContextTextMapPropagator()

    @classmethod
    def to(cls, endpoint: str) -> Traces:
        """Sends OTLP over HTTP to a collector, such as http://localhost:4318."""
        url = endpoint if endpoint.endswith(_PATH) else endpoint.rstrip("/") + _PATH
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))

    def tell(self, note: Note, visit: Visit, records: Sequence[Record]) -> None:
        """A call has ended, however it did."""
        since_s = clock.wall() - clock.now()
        parent = self._context.extract({name: visit.headers[name] for name in _CARRIED if name in visit.headers})
        operation = "text_completion" if visit.path in _COMPLETES else "chat"
        span = self._tracer.start_span(
            f"{operation} {note.model}",
            parent,
            SpanKind.SERVER,
            _attributes(note, visit, records, operation),
            start_time=_ns(since_s + note.began_s),
        )
        if visit.status is None or visit.status >= 500:
            span.set_status(Status(StatusCode.ERROR, note.refused or "the connection broke off"))
        inside = set_span_in_context(span, parent)
        for record in records:
            for stay in record.stays:
                self._stay(record, stay, inside, since_s)
        end_s = clock.now() if note.end_s is None else note.end_s
        span.end(_ns(since_s + end_s))

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()

    def _stay(self, record: Record, stay: Stay, inside: Context, since_s: float) -> None:
        if stay.end_s is None:
            return
        span = self._tracer.start_span(
            stay.kind, inside, SpanKind.INTERNAL, _about(record, stay), start_time=_ns(since_s + stay.begin_s)
        )
        for lost in record.yielded:
            if lost.at_s == stay.end_s:
                about: dict[str, str | int] = {"headrace.reason": lost.reason, "headrace.lost_tokens": lost.lost_tokens}
                span.add_event("preempted", about, _ns(since_s + lost.at_s))
        span.end(_ns(since_s + stay.end_s))


_CARRIED = ("traceparent", "tracestate")


def _attributes(
    note: Note, visit: Visit, records: Sequence[Record], operation: str
) -> Mapping[str, str | int | float | Sequence[str]]:
    about: dict[str, str | int | float | Sequence[str]] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": note.model,
        "gen_ai.response.model": note.model,
        "gen_ai.response.id": note.id,
        "http.request.method": "POST",
        "url.path": visit.path,
        "headrace.request_id": note.request_id,
    }
    if visit.status is not None:
        about["http.response.status_code"] = visit.status
    if note.tenant:
        about["headrace.tenant"] = note.tenant
    if records:
        about |= {
            "gen_ai.usage.input_tokens": records[0].prompt_tokens,
            "gen_ai.usage.output_tokens": sum(one.output_tokens for one in records),
            "gen_ai.request.max_tokens": records[0].max_new_tokens,
            "gen_ai.response.finish_reasons": [one.finish.value for one in records if one.finish is not None],
            "headrace.cached_tokens": records[0].cached_tokens,
            "headrace.preemptions": sum(one.preemptions for one in records),
        }
    return about


def _about(record: Record, stay: Stay) -> Mapping[str, str | int | float]:
    about: dict[str, str | int | float] = {"headrace.choice": record.id}
    meanwhile = stay.meanwhile
    if stay.kind == QUEUE:
        about |= {"headrace.prompts_s": meanwhile.prompts_s, "headrace.places_s": meanwhile.places_s}
        about["headrace.memory_s"] = meanwhile.memory_s
    elif stay.kind == PREFILL:
        about |= {"headrace.cached_tokens": record.cached_tokens, "headrace.cache_miss": record.missed}
    else:
        about |= {"headrace.steps": meanwhile.turns, "headrace.slowed_s": meanwhile.slowed_s}
    return about


def _ns(unix_s: float) -> int:
    return int(unix_s * 1e9)
