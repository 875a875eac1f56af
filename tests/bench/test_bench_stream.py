"""Server-sent events at every split, tokens out of events, and why an answer fails."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from fake_server import completion, event
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.client import Exchange, Failure
from headrace.bench.stream import digest, read_answer, sse_events
from headrace.bench.workload import Job

JOB = Job(4, None, (("request/4", 6),), 3)


def pieces(data: bytes, cuts: list[int]) -> list[tuple[float, bytes]]:
    """`data` cut at the given places, piece i arriving at time i."""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [(float(i), data[a:b]) for i, (a, b) in enumerate(pairwise(edges))]


def test_every_event_arrives_with_the_piece_that_completes_it() -> None:
    """Cut the stream in two at every byte: the data are the same, and each event has the right one of two times."""
    data = b": hello\r\nevent: x\r\ndata: one\r\n\r\ndata:two\ndata: lines\n\n"
    data += b"id: 7\rdata: three\r\rretry: 1\n\ndata: four\n\n"
    ends = [data.index(mark) + len(mark) for mark in (b"one\r\n\r", b"lines\n\n", b"three\r\r", b"four\n\n")]
    expected = [b"one", b"two\nlines", b"three", b"four"]
    for cut in range(len(data) + 1):
        seen = list(sse_events([(1.0, data[:cut]), (2.0, data[cut:])]))
        assert [value for _, value in seen] == expected, cut
        assert [at_s for at_s, _ in seen] == [1.0 if end <= cut else 2.0 for end in ends], cut


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), min_size=1), min_size=1, max_size=5),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 200), max_size=20),
    st.booleans(),
)
def test_any_split_of_any_stream(values: list[str], end: str, cuts: list[int], last_blank: bool) -> None:
    text = "".join(f"data: {value}{end}{end}" for value in values)
    data = (text if last_blank else text.removesuffix(end)).encode()
    assert [value.decode() for _, value in sse_events(pieces(data, cuts))] == values


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_garbage_never_raises(data: bytes, cuts: list[int]) -> None:
    read_answer(pieces(data, cuts))
    read_answer(pieces(b"data: " + data + b"\n\n", cuts))


KEYS = ("choices", "usage", "error", "delta", "text", "finish_reason", "completion_tokens", "prompt_tokens_details")
SCALARS = st.sampled_from(
    [None, True, False, 0, 7, -1, 2.5, float("nan"), "", "stop", [], {}, [None], [[]], {"message": 3}]
)
OBJECTS = st.dictionaries(st.sampled_from(KEYS), SCALARS | st.dictionaries(st.sampled_from(KEYS), SCALARS, max_size=2))


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), SCALARS | OBJECTS | st.lists(OBJECTS, max_size=2)))
def test_events_of_any_shape_never_raise(value: dict[str, Any]) -> None:
    exchange = Exchange(0.0, 2.0, 200, chunks=[(1.0, event(value))])
    record = digest(exchange, JOB, 0.0, 0.0, 0.0)
    assert record.ok == (record.failure is None)
    assert record.output_tokens >= 0


def answered(*events: dict[str, Any] | None, failure: Failure | None = None, status: int = 200) -> Exchange:
    """Events that arrive at 11, 12, ... after sending at 10.5."""
    chunks = [(11.0 + i, event(value)) for i, value in enumerate(events)]
    return Exchange(10.5, 30.0, status, chunks=chunks, failure=failure)


def text(content: str | None, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": content, "finish_reason": finish}]}


def delta(finish: str | None = None, **content: Any) -> dict[str, Any]:
    return {"choices": [{"delta": content, "finish_reason": finish}]}


def test_times_count_from_the_start_and_the_due_time() -> None:
    exchange = answered(
        text("a"), text("b"), text("c", "length"), {"choices": [], "usage": {"completion_tokens": 3}}, None
    )
    record = digest(exchange, JOB, 10.0, 10.25, 0.125)
    assert (record.due_s, record.sent_s, record.ended_s, record.lag_s) == (0.25, 0.5, 3.0, 0.125)
    assert record.token_times_s == (1.0, 2.0, 3.0)
    assert (record.ttft_s, record.tpot_s, record.e2e_s) == (0.75, 1.0, 2.75)
    assert (record.index, record.asked_tokens, record.prompt_tokens, record.finish) == (4, 3, 6, "length")


def test_usage_is_the_truth_and_events_the_fallback() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 4}}
    record = digest(answered(text("ab"), text("cd", "stop"), {"usage": usage}, None), JOB, 0.0, 0.0, 0.0)
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (9, 8, 4)
    record = digest(answered(text("ab"), text("cd", "stop"), None), JOB, 0.0, 0.0, 0.0)
    assert (record.prompt_tokens, record.output_tokens, record.cached_tokens) == (6, 2, None)


@pytest.mark.parametrize(
    ("events", "times"),
    [
        ([text("a"), text(""), text("b"), text("", "stop")], 3),  # held back characters; the end carries no token
        ([text("", "stop")], 1),  # an answer of one token without text
        ([delta(role="assistant", content=""), delta(content="a"), delta("stop")], 1),  # the role is not a token
        ([delta(reasoning_content="hm"), delta(content="a"), delta(tool_calls=[{"x": 1}]), delta("stop")], 3),
        ([{"choices": []}, {"choices": None}, text("a", "length")], 1),
    ],
)
def test_which_events_carry_a_token(events: list[dict[str, Any]], times: int) -> None:
    record = digest(answered(*events, None), JOB, 0.0, 0.0, 0.0)
    assert record.ok
    assert len(record.token_times_s) == times


@pytest.mark.parametrize(
    ("exchange", "kind", "message"),
    [
        (answered(text("a"), {"error": {"message": "out of memory"}}), "server error", "out of memory"),
        (answered(text("a"), text("b")), "closed early", "finish_reason"),
        (answered(None), "no tokens", ""),
        (answered(text("a"), failure=Failure("timeout", "no complete answer")), "timeout", "no complete"),
        (answered(failure=Failure("connect", "refused")), "connect", "refused"),
        (Exchange(0, 1, 429, chunks=[(0.5, b'{"error": {"message": "full"}}')]), "http 429", "full"),
        (Exchange(0, 1, 400, chunks=[(0.5, b'{"detail": "bad field"}')]), "http 400", "bad field"),
        (Exchange(0, 1, 502, chunks=[(0.5, b"<html>bad gateway")]), "http 502", "bad gateway"),
        (Exchange(0, 1, 500), "http 500", "nothing"),
        (Exchange(0, 1, 200, chunks=[(0.5, b"data: {oops\n\n")]), "bad event", "oops"),
        (Exchange(0, 1, 200, chunks=[(0.5, b"data: [1]\n\n")]), "bad event", "[1]"),
        (Exchange(0, 1, 200, chunks=[(0.5, b'{"choices": [{"text": "whole"}]}')]), "no stream", "whole"),
    ],
)
def test_failures_have_a_kind_and_a_message(exchange: Exchange, kind: str, message: str) -> None:
    failure = digest(exchange, JOB, 0.0, 0.0, 0.0).failure
    assert failure is not None
    assert failure.kind == kind
    assert message in failure.message


def test_a_connection_that_breaks_after_the_end_mark_does_no_harm() -> None:
    exchange = answered(text("a", "stop"), None, failure=Failure("closed early", "EOF"))
    assert digest(exchange, JOB, 0.0, 0.0, 0.0).ok


def test_the_fake_servers_answer_reads_as_meant() -> None:
    answer = read_answer([(1.0, b"".join(completion(5)))])
    assert (len(answer.token_times_s), answer.done, answer.usage["completion_tokens"]) == (5, True, 5)
    assert json.dumps(answer.usage)
