"""Reads a recorded answer: server-sent events out of timed pieces of bytes, tokens out of events.

Runs after the measurement. An event arrived when the piece that completes it arrived.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from headrace.bench.client import Exchange, Failure
from headrace.bench.metrics import Record
from headrace.bench.workload import Job

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"
_TEXT_KEYS = ("content", "reasoning_content", "reasoning", "tool_calls", "refusal")


def sse_lines(chunks: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Lines with the arrival time of their end. CR, LF and CRLF end a line, also when CR and LF come apart."""
    held: list[bytes] = []
    after_cr = False
    at_s = 0.0
    for at_s, piece in chunks:
        chunk = piece[1:] if after_cr and piece.startswith(b"\n") else piece
        after_cr = chunk.endswith(b"\r") if chunk else after_cr and not piece
        *ended, rest = _LINE_END.split(chunk)
        for line in ended:
            yield at_s, b"".join(held) + line
            held.clear()
        held.append(rest)
    if tail := b"".join(held):
        yield at_s, tail


def sse_events(chunks: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of every event (HTML Living Standard, 9.2.6). A last event without its blank line counts, too."""
    data: list[bytes] = []
    at_s = 0.0
    for at_s, line in sse_lines(chunks):
        name, _, value = line.partition(b":")
        if name.removeprefix(_BOM) == b"data":
            data.append(value.removeprefix(b" "))
        elif not line and data:
            yield at_s, b"\n".join(data)
            data.clear()
    if data:
        yield at_s, b"\n".join(data)


@dataclass(slots=True)
class Answer:
    """What the events of one answer said."""

    token_times_s: list[float] = field(default_factory=list)
    usage: Mapping[str, Any] = field(default_factory=dict)
    last_s: float | None = None  # of the last event with a choice
    finish: str | None = None
    done: bool = False
    failure: Failure | None = None


def read_answer(chunks: Iterable[tuple[float, bytes]]) -> Answer:
    """Fold events until `[DONE]`, an error or the end."""
    answer = Answer()
    for at_s, data in sse_events(chunks):
        if data.strip() == b"[DONE]":
            answer.done = True
            break
        try:
            event = json.loads(data)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict):
            answer.failure = Failure("bad event", f"an event is not a JSON object: {_excerpt(data)}")
            break
        if event.get("error"):
            answer.failure = Failure("server error", error_message(event))
            break
        _fold(answer, at_s, event)
    return answer


def _fold(answer: Answer, at_s: float, event: Mapping[str, Any]) -> None:
    if isinstance(usage := event.get("usage"), dict):
        answer.usage = usage
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        finish = choice.get("finish_reason")
        if _carries_token(choice, finish) or (finish and not answer.token_times_s):
            # an answer whose only event is its end (one token without text, say) has that as its first token
            answer.token_times_s.append(at_s)
        answer.finish = str(finish) if finish else answer.finish
        answer.last_s = at_s


def _carries_token(choice: Mapping[str, Any], finish: Any) -> bool:
    """Empty text that does not end the answer is a token whose characters the server still holds back."""
    if (text := choice.get("text")) is not None:
        return bool(text) or not finish
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(delta.get(key) for key in _TEXT_KEYS)


def error_message(body: Any) -> str:
    """The sentence in an error body of any of the usual shapes."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error.get("detail", error)) if isinstance(error, dict) else error
    return str(message)[:300]


def digest(exchange: Exchange, job: Job, start_s: float, due_s: float, lag_s: float) -> Record:
    """Turn a raw exchange into a record with times since `start_s`; `due_s` is on the same clock as the exchange."""
    answer = read_answer(exchange.chunks) if exchange.status == 200 else Answer()
    failure = _failure(exchange, answer)
    since_start = partial(_since, start_s)
    times = tuple(map(since_start, answer.token_times_s))
    details = answer.usage.get("prompt_tokens_details")
    output = _count(answer.usage.get("completion_tokens"))
    prompt = _count(answer.usage.get("prompt_tokens"))
    return Record(
        index=job.index,
        due_s=since_start(due_s),
        sent_s=since_start(exchange.sent_s),
        ended_s=since_start(exchange.ended_s if failure or answer.last_s is None else answer.last_s),
        lag_s=round(lag_s, 6),
        prompt_tokens=job.prompt_tokens if prompt is None else prompt,
        output_tokens=len(times) if output is None else output,
        asked_tokens=job.output_tokens,
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
        token_times_s=times,
        finish=answer.finish,
        failure=failure,
    )


def _since(start_s: float, at_s: float) -> float:
    """Whole microseconds, so that a saved run reads back as the same numbers."""
    return round(at_s - start_s, 6)


def _failure(exchange: Exchange, answer: Answer) -> Failure | None:
    if exchange.status not in (0, 200):
        return Failure(f"http {exchange.status}", _body_message(exchange.body))
    if answer.failure and not exchange.failure:
        return answer.failure
    if answer.done or (exchange.failure is None and answer.finish and answer.token_times_s):
        return None if answer.token_times_s else Failure("no tokens", "the answer ended without a token")
    if exchange.failure:
        return exchange.failure
    if answer.last_s is None:
        return Failure("no stream", f"the answer is not a stream of events: {_excerpt(exchange.body)}")
    return Failure("closed early", "the answer ended without finish_reason and without [DONE]")


def _body_message(body: bytes) -> str:
    try:
        return error_message(json.loads(body))
    except (ValueError, RecursionError):
        return _excerpt(body)


def _excerpt(data: bytes) -> str:
    return data[:200].decode("utf-8", "replace").strip() or "(nothing)"


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None
