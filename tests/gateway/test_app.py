"""The application without a socket: routes, pages, errors, bounds, and what the log says."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from gateway_rig import ANSWER, RoteService, ask, chat, events_of, make_text
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from headrace.core import clock
from headrace.core.config import Bytes, GatewaySettings
from headrace.core.events import Admitted, Arrived, Drew, Finished
from headrace.core.metrics import Metrics
from headrace.core.types import FinishReason, Overloaded, Usage
from headrace.gateway import bounds, openai
from headrace.gateway.app import build

T = TypeVar("T")
CHAT = "/v1/chat/completions"
TEXT = make_text()


def run(main: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(main)


def app_of(service: RoteService | None = None, metrics: Metrics | None = None, **options: Any):
    return build(service or RoteService(), TEXT, GatewaySettings(**options), metrics or Metrics())


APP = app_of()


def error_of(body: bytes) -> dict[str, Any]:
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and error["type"]
    return error


def test_every_route_takes_its_methods_and_refuses_the_others() -> None:
    routes = {re.sub(r"\{\w+(:path)?\}", "rote", route.path): route.methods for route in APP.routes}
    assert len(routes) == len(APP.routes) >= 30
    for path, allowed in routes.items():
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"):
            status, headers, body = run(ask(APP, path, chat(prompt="x"), method))
            if method in allowed:
                assert status in (200, 400, 404, 415, 503), (method, path, body)
                continue
            assert status == 405 and "error" in json.loads(body), (method, path)
            assert set(headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/v1", "/v1/chat", "/nothing", "/v1/models/", "//", "/health", "/../etc/passwd"])
def test_unknown_paths_are_404_in_json(path: str) -> None:
    status, _, body = run(ask(APP, path, method="GET"))
    assert status == 404 and error_of(body)["code"] in ("not_found", "model_not_found")


def test_health_follows_the_service() -> None:
    service = RoteService()
    app = app_of(service)
    states = {"ready": (200, 200), "restarting": (200, 503), "draining": (200, 503)}
    states |= dict.fromkeys(("stalled", "failed"), (503, 503))
    for state, (live, ready) in states.items():
        service.state = state
        assert run(ask(app, "/health/live", method="GET"))[0] == live
        status, _, body = run(ask(app, "/health/ready", method="GET"))
        assert status == ready and json.loads(body)["status"] == state


def test_metrics_carry_the_common_names() -> None:
    metrics = Metrics()
    metrics.observe(Arrived(0.0, "a", 10, 5))
    metrics.observe(Admitted(1.0, "a", 4, 1.0, again=False))
    metrics.observe(Drew(2.0, ("a",), (1,), first=("a",)))
    metrics.observe(Drew(2.5, ("a",), (1,), first=()))
    metrics.observe(Finished(2.5, "a", FinishReason.STOP, Usage(10, 2, 4), 0.0, 1.0, 2.0, 5))
    _, headers, body = run(ask(app_of(metrics=metrics, metrics_prefix="vllm:"), "/metrics", method="GET"))
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(body.decode()))
    samples = {(one.name, one.labels.get("finished_reason")): one for family in families for one in family.samples}
    expected = {
        "num_requests_running": 0, "num_requests_waiting": 0, "kv_cache_usage_perc": 0.25, "num_preemptions_total": 0,
        "prompt_tokens_total": 10, "generation_tokens_total": 2, "prefix_cache_queries_total": 10,
        "prefix_cache_hits_total": 4, "time_to_first_token_seconds_sum": 2, "inter_token_latency_seconds_sum": 0.5,
        "e2e_request_latency_seconds_count": 1, "request_queue_time_seconds_sum": 1,
        "request_prefill_time_seconds_sum": 1, "request_decode_time_seconds_sum": 0.5,
        "request_inference_time_seconds_sum": 1.5, "request_prompt_tokens_sum": 10,
        "request_generation_tokens_sum": 2, "request_max_num_generation_tokens_sum": 5,
        "request_num_preemptions_count": 1, "iteration_tokens_total_count": 0,
    }  # fmt: skip
    for name, value in expected.items():
        assert samples["vllm:" + name, None].value == value, name
        assert samples["vllm:" + name, None].labels["model_name"] == "rote"
    assert samples["vllm:request_success_total", "stop"].value == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:9", 200), ("[::1]:80", 200), ("evil.example", 403),
     ("localhost.evil.example", 403), ("127.0.0.1.evil.example:8000", 403), ("", 403)],
)  # fmt: skip
def test_a_loopback_server_answers_to_its_own_names(host: str, status: int) -> None:
    assert run(ask(APP, "/v1/models", method="GET", headers={"host": host}))[0] == status
    assert run(ask(app_of(host="0.0.0.0", insecure=True), "/v1/models", method="GET", headers={"host": host}))[0] == 200


def test_request_ids_are_echoed_when_they_are_harmless() -> None:
    assert run(ask(APP, "/", method="GET", headers={"x-request-id": "abc-1.2_3"}))[1]["x-request-id"] == "abc-1.2_3"
    for bad in ("a b", "a\tb", "x" * 129, "é"):
        made = run(ask(APP, "/nothing", method="GET", headers={"x-request-id": bad}))[1]["x-request-id"]
        assert re.fullmatch(r"req-[0-9a-f]{24}", made)


def test_one_log_line_per_call_and_no_prompt_in_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    body = chat(messages=[{"role": "user", "content": "a secret prompt"}], max_tokens=6)
    run(ask(APP, CHAT, body, headers={"x-request-id": "mine"}))
    lines = [record.getMessage() for record in caplog.records if record.name == "headrace.gateway"]
    assert len(lines) == 1 and "secret" not in caplog.text and ANSWER[:10] not in caplog.text
    pattern = r"chatcmpl-\w+ request=mine prompt=\d+ cached=3 output=6 ttft=\d\.\d+s total=\d\.\d+s finish=length"
    assert re.fullmatch(pattern, lines[0])


def test_one_line_for_whoever_is_refused_before_there_is_a_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace.gateway")
    asked = [(CHAT, b"{", 400), ("/nothing", b"", 404), ("/v1/models", b"", 405), (CHAT, chat(model="gone"), 404)]
    for path, body, status in asked:
        caplog.clear()
        got, headers, _ = run(ask(APP, path + "?key=sk-secret", body, headers={"x-request-id": "mine"}))
        (line,) = [record.getMessage() for record in caplog.records]
        assert got == status and re.fullmatch(
            rf"mine POST {path} status={status} total=.* finish=refused-{status}.*", line
        )
        assert "total;dur=" in headers["server-timing"] and "sk-secret" not in line
    caplog.clear()
    run(ask(APP, "/health/live", method="GET"))
    assert not caplog.records, "probes ask every few seconds"


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_call_has_one_line_too(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace.gateway")
    app = app_of(RoteService(refuse=Overloaded("the queue is full", 3.0)))
    status, headers, _ = run(ask(app, CHAT, chat(stream=stream)))
    (line,) = [record.getMessage() for record in caplog.records]
    assert status == 429 and "finish=Overloaded" in line and headers["retry-after"] == "3"
    status, _, body = run(ask(app, f"/v1/requests/{headers['x-request-id']}/explain?format=text", method="GET"))
    assert status == 200 and b"It was refused before it was queued: Overloaded: the queue is full." in body


def test_an_unexpected_error_leaves_its_stack_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(RoteService(refuse=ZeroDivisionError("at 0x7f00 in /root/secret.py")))
    status, _, body = run(ask(app, CHAT, chat()))
    error = error_of(body)
    error_id = re.search(r"[0-9a-f]{12}", error["message"])
    assert status == 500 and error_id and error_id[0] in caplog.text and "ZeroDivisionError" in caplog.text
    assert "0x" not in error["message"] and "secret" not in error["message"]


def test_streams_are_framed_and_typed() -> None:
    status, headers, body = run(ask(APP, CHAT, chat(stream=True, stream_options={"include_usage": True})))
    events = events_of(body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert [len(event["choices"]) for event in events] == [1] * (len(events) - 1) + [0]
    assert all(event["usage"] is None for event in events[:-1]) and events[-1]["usage"]["completion_tokens"] == 4


def test_a_broken_stream_ends_with_an_error_event() -> None:
    _, _, body = run(ask(app_of(RoteService(break_after=2)), CHAT, chat(stream=True)))
    *chunks, last = events_of(body)
    assert chunks and last["error"]["code"] == "internal" and b"deadbeef" not in body


@pytest.mark.parametrize(
    ("body", "headers", "status", "code"),
    [
        (b"", {}, 400, "invalid_json"),
        (b"{", {}, 400, "invalid_json"),
        (b"[]", {}, 400, "invalid_value"),
        (b'"x"', {}, 400, "invalid_value"),
        (b'{"messages": "\xff\xfe"}', {}, 400, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400, "invalid_json"),
        (b'{"temperature": NaN}', {}, 400, "invalid_json"),
        (b'{"temperature": 1e999}', {}, 400, "invalid_value"),
        (b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", {}, 400, "invalid_json"),
        (b'{"messages": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, {}, 400, "invalid_json"),
        (chat(), {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (chat(), {"content-type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (chat(), {"content-type": ""}, 415, "unsupported_media_type"),
        (chat(), {"content-type": "application/json; charset=utf-8"}, 200, None),
        (chat(), {"content-length": "99999999999"}, 413, "body_too_large"),
        (chat(), {"content-length": "-1"}, 400, "invalid_length"),
        (chat(), {"content-length": "9" * 5000}, 400, "invalid_length"),
        (chat(user="x" * 2000), {}, 413, "body_too_large"),
        (chat(), {"x": "y" * (40 << 10)}, 431, "headers_too_large"),
    ],
)
def test_bad_bodies(body: bytes, headers: dict[str, str], status: int, code: str | None) -> None:
    app = app_of(max_body=Bytes(1000 if status == 413 else 1 << 20))
    got, _, answer = run(ask(app, CHAT, body, headers=headers))
    assert (got, None if got == 200 else error_of(answer)["code"]) == (status, code)


def test_a_slow_body_times_out() -> None:
    """In virtual time: a client that sends one byte a second for ever."""

    async def main() -> tuple[int, float]:
        statuses: list[int] = []

        async def receive() -> dict[str, Any]:
            await clock.sleep(1.0)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await APP(scope, receive, send)
        return statuses[0], clock.now()

    assert clock.run(main(), virtual=True) == (408, bounds.BODY_TIMEOUT_S)


PATHS = {dialect.operation.path for dialect in openai.DIALECTS}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.sampled_from([0, -1, 1, 2, 2.5, 1e308, -1e308, 2**31, 2**63, -(2**63) - 1, 10**30, "1", True])
SERVED = {*openai.ChatRequest.__struct_fields__, *openai.CompletionRequest.__struct_fields__}
SHORT = RoteService(context_tokens=200)
SHORT_APP = app_of(SHORT)
FIELDS = sorted(SERVED | bounds.IGNORED | set(bounds.REFUSED) | {"unheard_of"})


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(PATHS)), st.dictionaries(st.sampled_from(FIELDS), JSON | NUMBERS, max_size=4))
def test_no_value_of_any_field_is_a_server_error(path: str, fields: dict[str, Any]) -> None:
    base: dict[str, Any] = {"max_tokens": 2}
    base["messages" if path == CHAT else "prompt"] = [{"role": "user", "content": "x"}] if path == CHAT else "x"
    status, headers, body = run(ask(SHORT_APP, path, json.dumps(base | fields).encode("utf-8", "replace")))
    assert status in (200, 400, 404), (status, body)
    if status == 200 and headers["content-type"] == "application/json":
        assert json.loads(body)["choices"]
    elif status != 200:
        error_of(body)
        assert not re.search(rb"0x[0-9a-f]{6,}|Traceback|\.py", body)
    assert not SHORT.open


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(PATHS)), st.binary(max_size=200))
def test_no_bytes_are_a_server_error(path: str, body: bytes) -> None:
    assert run(ask(APP, path, body))[0] == 400


def test_every_field_is_served_ignored_or_refused() -> None:
    assert not SERVED & bounds.IGNORED and not SERVED & set(bounds.REFUSED) and not bounds.IGNORED & set(bounds.REFUSED)
    for name in bounds.IGNORED:
        assert run(ask(APP, CHAT, chat(**{name: {"any": ["thing"]}})))[0] == 200
    for name in bounds.REFUSED:
        _, _, body = run(ask(APP, CHAT, chat(**{name: {"any": ["thing"]}})))
        assert (error_of(body)["code"], error_of(body)["param"]) == ("unsupported_field", name)
        assert run(ask(APP, CHAT, chat(**{name: None})))[0] == 200
