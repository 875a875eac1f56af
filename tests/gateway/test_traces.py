"""Spans of real calls through the application, with OpenTelemetry's own SDK and its exporter in memory."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
from gateway_rig import RoteService, ask, chat, make_text
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.events import Admitted, Arrived, Drew, Finished, Preempted
from headrace.core.explain.fold import Explanations
from headrace.core.metrics import Metrics
from headrace.core.types import FinishReason, Request, Usage
from headrace.gateway.app import build
from headrace.gateway.endpoints import Extras
from headrace.gateway.explaining import Book
from headrace.gateway.traces import Traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Observed(RoteService):
    """Tells an observer of every request what an engine would: it is preempted once."""

    book: Book

    def generate(self, request: Request) -> Any:
        observe = self.book.explanations.observer("rote").observe
        now, name = clock.now(), request.id
        observe(Arrived(now, name, request.prompt_tokens, request.max_new_tokens, request))
        observe(Admitted(now + 0.1, name, 3, 0.1, again=False))
        observe(Drew(now + 0.2, (name,), (1,), (name,)))
        observe(Preempted(now + 0.3, name, 27, "memory"))
        observe(Admitted(now + 0.4, name, 16, 0.1, again=True))
        observe(Drew(now + 0.5, (name,), (1,), ()))
        usage = Usage(request.prompt_tokens, 4, 3, 1)
        observe(Finished(now + 0.6, name, FinishReason.LENGTH, usage, now, now + 0.1, now + 0.2, 4))
        return super().generate(request)


def spans_of(body: bytes, headers: dict[str, str], service: RoteService | None = None) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    book = Book(Explanations(10), 10, Traces(SimpleSpanProcessor(exporter)))
    service = service or Observed()
    service.book = book  # type: ignore[attr-defined]
    app = build(service, make_text(), GatewaySettings(), Metrics(), Extras(book=book))
    asyncio.run(ask(app, "/v1/chat/completions", body, headers=headers))
    return list(exporter.get_finished_spans())


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_has_a_span_and_each_of_its_stays_one_inside(stream: bool) -> None:
    *stays, whole = spans_of(chat(stream=stream), {"traceparent": PARENT, "x-request-id": "mine"})
    assert f"{whole.context.trace_id:032x}" == PARENT.split("-")[1]
    assert whole.parent is not None and f"{whole.parent.span_id:016x}" == PARENT.split("-")[2]
    assert [stay.name for stay in stays] == ["queue", "prefill", "decode", "queue", "prefill", "decode"]
    assert all(stay.parent is not None and stay.parent.span_id == whole.context.span_id for stay in stays)
    about = dict(whole.attributes or {})
    assert whole.name == "chat rote" and about["gen_ai.operation.name"] == "chat"
    assert about["gen_ai.request.model"] == "rote" and about["gen_ai.usage.output_tokens"] == 4
    assert about["gen_ai.response.finish_reasons"] == ("length",) and about["http.response.status_code"] == 200
    assert about["headrace.request_id"] == "mine" and about["headrace.preemptions"] == 1
    assert [event.name for event in stays[2].events] == ["preempted"]
    for one, following in pairwise(stays):
        assert one.end_time is not None and one.end_time == following.start_time
        assert abs((one.end_time - (one.start_time or 0)) / 1e9 - 0.1) < 1e-3
    assert "hello" not in "".join(span.to_json() for span in [*stays, whole]), "a prompt is in a span"


def test_without_a_traceparent_or_with_a_bad_one_it_is_a_root() -> None:
    for headers in ({}, {"traceparent": "00-nonsense"}):
        assert spans_of(chat(), headers)[-1].parent is None


def test_a_failure_is_one_in_its_span() -> None:
    (whole,) = spans_of(chat(), {}, RoteService(refuse=RuntimeError("secret")))
    assert whole.status.status_code is StatusCode.ERROR and "secret" not in whole.to_json()


def test_nothing_of_opentelemetry_is_imported_unless_it_is_asked_for() -> None:
    script = "import sys, headrace.cli.serve, headrace.gateway.app; print('opentelemetry' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert shown.stdout.strip() == "False"
