"""Ollama's dialect, what is answered: events to one JSON object, or to one per line with the numbers on the last.

Durations are nanoseconds: `prompt_eval_duration` until the first token, `eval_duration` from there to the last. Owns
the reply of one call at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from headrace.core import clock
from headrace.core.types import FinishReason, Usage
from headrace.gateway.chain import Began, Ended, Event, Piece, ToolPiece
from headrace.gateway.dialects.shared import json
from headrace.gateway.embedding import Embedded
from headrace.gateway.errors import Refused


class Error(Struct):
    error: str


class Called(Struct):
    name: str
    arguments: dict[str, Any]


class ToolCall(Struct):
    function: Called
    id: str | UnsetType = UNSET


class Message(Struct):
    content: str = ""
    role: Literal["assistant"] = "assistant"
    thinking: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class Numbers(Struct, kw_only=True, omit_defaults=True):
    """On the last line."""

    done_reason: Literal["stop", "length", "load", "unload"] | UnsetType = UNSET
    total_duration: int | UnsetType = UNSET
    load_duration: int | UnsetType = UNSET
    prompt_eval_count: int | UnsetType = UNSET
    prompt_eval_duration: int | UnsetType = UNSET
    eval_count: int | UnsetType = UNSET
    eval_duration: int | UnsetType = UNSET


class ChatAnswer(Numbers, kw_only=True):
    """Whole, or a line of a stream."""

    model: str
    created_at: str
    message: Message
    done: bool


class GenerateAnswer(Numbers, kw_only=True):
    """Whole, or a line of a stream."""

    model: str
    created_at: str
    response: str
    thinking: str | UnsetType = UNSET
    done: bool


class Embeddings(Struct):
    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OldEmbeddings(Struct):
    embedding: list[float]


Kind = Literal["answer", "load", "unload"]  # the last two only ask for the model to be there, or to go
Shape = Callable[..., ChatAnswer | GenerateAnswer]  # (model, created_at, text, thinking, calls, done, numbers)


def chat(text: str, thinking: str, calls: list[ToolCall], **rest: Any) -> ChatAnswer:
    return ChatAnswer(message=Message(text, thinking=thinking or UNSET, tool_calls=calls or UNSET), **rest)


def generate(text: str, thinking: str, calls: list[ToolCall], **rest: Any) -> GenerateAnswer:
    return GenerateAnswer(response=text, thinking=thinking or UNSET, **rest)


def embedded(model: str) -> Callable[[Embedded], Embeddings]:
    start_s = clock.now()

    def shape(event: Embedded) -> Embeddings:
        vectors = [list(vector) for vector in event.vectors]
        return Embeddings(model, vectors, _ns(clock.now() - start_s), 0, event.prompt_tokens)

    return shape


def error_body(error: Refused) -> bytes:
    return json(Error(str(error)))


def rfc3339(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).isoformat().replace("+00:00", "Z")


class Reply:
    """Events of one call as bytes."""

    def __init__(self, model: str, stream: bool, shape: Shape, kind: Kind) -> None:
        self.stream = stream
        self._model = model
        self._shape = shape
        self._kind = kind
        self._start_s = self._first_s = self._end_s = clock.now()
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._calls: list[ToolPiece] = []
        self._finish: FinishReason | None = None
        self._usage = Usage(0, 0, 0)

    def feed(self, event: Event) -> bytes:
        match event:
            case Began():
                self._first_s = clock.now()
            case Piece():
                return self._piece(event)
            case Ended():
                self._usage, self._end_s = event.usage, clock.now()
        return b""

    def _piece(self, piece: Piece) -> bytes:
        self._finish = piece.finish
        self._calls += piece.calls
        calls = _calls(self._calls) if piece.finish else []  # a call is shown when it is complete
        if not self.stream:
            self._text.append(piece.text)
            self._thinking.append(piece.reasoning)
            return b""
        if not (piece.text or piece.reasoning or calls):
            return b""
        return self._line(self._shape(piece.text, piece.reasoning, calls, done=False, **self._head()))

    def end(self) -> bytes:
        return self._line(self._shape("", "", [], done=True, **self._head(), **self._numbers()))

    def failed(self, error: Refused) -> bytes:
        return error_body(error) + b"\n"

    def body(self) -> bytes:
        text, thinking, calls = "".join(self._text), "".join(self._thinking), _calls(self._calls)
        return json(self._shape(text, thinking, calls, done=True, **self._head(), **self._numbers()))

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": rfc3339(clock.wall())}

    def _numbers(self) -> dict[str, Any]:
        if self._kind != "answer":
            return {"done_reason": self._kind}
        return {
            "done_reason": "length" if self._finish is FinishReason.LENGTH else "stop",
            "total_duration": _ns(self._end_s - self._start_s),
            "load_duration": 0,
            "prompt_eval_count": self._usage.prompt_tokens,
            "prompt_eval_duration": _ns(self._first_s - self._start_s),
            "eval_count": self._usage.output_tokens,
            "eval_duration": _ns(self._end_s - self._first_s),
        }

    @staticmethod
    def _line(answer: Any) -> bytes:
        return json(answer) + b"\n"


def _ns(seconds: float) -> int:
    return max(0, round(seconds * 1e9))


def _calls(pieces: list[ToolPiece]) -> list[ToolCall]:
    """Calls from their pieces. Arguments that the length cut off are no JSON, and no call."""
    names = {piece.index: piece for piece in pieces if piece.id}
    found = []
    for index, first in names.items():
        text = "".join(piece.arguments for piece in pieces if piece.index == index)
        try:
            arguments = msgspec.json.decode(text or "{}", type=dict[str, Any])
        except msgspec.MsgspecError:
            continue
        found.append(ToolCall(Called(first.name, arguments), first.id))
    return found
