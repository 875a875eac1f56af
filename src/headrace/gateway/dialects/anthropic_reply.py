"""Anthropic's dialect, what is answered: events to a message, whole or as the stream of events that builds it.

    message_start  [ content_block_start  content_block_delta ...  content_block_stop ] ...  message_delta  message_stop

Owns the reply of one call at a time: which block is open, and what the blocks have gathered.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct

from headrace.core.types import FinishReason, Usage
from headrace.gateway import chain
from headrace.gateway.chain import Began, Ended, Piece
from headrace.gateway.dialects.shared import json
from headrace.gateway.errors import Refused


class ErrorDetail(Struct):
    type: str
    message: str


class Error(Struct, tag_field="type", tag="error"):
    error: ErrorDetail
    request_id: str | None = None


class Count(Struct):
    input_tokens: int


class TextBlock(Struct, tag_field="type", tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(Struct, tag_field="type", tag="thinking"):
    thinking: str
    signature: str = ""  # nothing to verify: what comes back is text like any other


class ToolUseBlock(Struct, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class Spent(Struct, kw_only=True):
    """`input_tokens` are those that were computed; the others are `cache_read_input_tokens`."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class Message(Struct, tag_field="type", tag="message", kw_only=True):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[TextBlock | ThinkingBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: Spent


class Event(Struct):
    """One server-sent event's data; the other fields depend on its type."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def error_body(error: Refused) -> bytes:
    kind = _KINDS.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return json(Error(ErrorDetail(kind, str(error))))


def _event(kind: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), json({"type": kind, **fields}))


class Reply:
    """Events of one call as bytes."""

    def __init__(self, id: str, model: str, stream: bool) -> None:
        self.stream = stream
        self._message = Message(
            id=id, model=model, content=[], stop_reason=None, stop_sequence=None, usage=_spent(Usage(0, 0, 0))
        )
        self._open = ""  # what the last block is while it grows: "text", "thinking" or "tool_use"
        self._gathered: list[str] = []  # text of the open block

    def feed(self, event: chain.Event) -> bytes:
        match event:
            case Began():
                self._message.usage.input_tokens = len(event.prompts[0])
                return _event("message_start", message=self._message)
            case Piece():
                return self._piece(event)
            case Ended():
                self._message.usage = _spent(event.usage)
        return b""

    def _piece(self, piece: Piece) -> bytes:
        out = b""
        if piece.reasoning:
            out += self._grow("thinking", "thinking_delta", "thinking", piece.reasoning)
        if piece.text:
            out += self._grow("text", "text_delta", "text", piece.text)
        for call in piece.calls:
            if call.id:
                out += self._close() + self._begin(ToolUseBlock(call.id, call.name, {}), "tool_use")
            if call.arguments:
                out += self._grow("tool_use", "input_json_delta", "partial_json", call.arguments)
        if piece.finish is not None:
            self._message.stop_reason = _reason(piece)
            self._message.stop_sequence = piece.stop_string
            out += self._close()
        return out

    def _grow(self, kind: Literal["text", "thinking", "tool_use"], delta: str, key: str, more: str) -> bytes:
        out = b""
        if self._open != kind:
            out = self._close() + self._begin(TextBlock("") if kind == "text" else ThinkingBlock(""), kind)
        self._gathered.append(more)
        at = len(self._message.content) - 1
        return out + _event("content_block_delta", index=at, delta={"type": delta, key: more})

    def _begin(self, block: TextBlock | ThinkingBlock | ToolUseBlock, kind: str) -> bytes:
        self._open = kind
        begun = _event("content_block_start", index=len(self._message.content), content_block=block)
        self._message.content.append(block)
        return begun

    def _close(self) -> bytes:
        """End the open block, if there is one, and give it what it has gathered."""
        if not self._open:
            return b""
        block, gathered = self._message.content[-1], "".join(self._gathered)
        match block:
            case TextBlock():
                block.text = gathered
            case ThinkingBlock():
                block.thinking = gathered
            case ToolUseBlock():
                block.input = _arguments(gathered)
        self._open, self._gathered = "", []
        return _event("content_block_stop", index=len(self._message.content) - 1)

    def end(self) -> bytes:
        message = self._message
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        return _event("message_delta", delta=delta, usage=message.usage) + _event("message_stop")

    def failed(self, error: Refused) -> bytes:
        return b"event: error\ndata: " + error_body(error) + b"\n\n"

    def body(self) -> bytes:
        return json(self._message)


def _arguments(text: str) -> dict[str, Any]:
    """Arguments that the length cut off are no JSON, and a whole message has no place for them."""
    try:
        value = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _reason(piece: Piece) -> Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]:
    if piece.finish is FinishReason.LENGTH:
        return "max_tokens"
    if piece.called:
        return "tool_use"
    return "end_turn" if piece.stop_string is None else "stop_sequence"


def _spent(usage: Usage) -> Spent:
    return Spent(
        input_tokens=max(0, usage.prompt_tokens - usage.cached_tokens),
        output_tokens=usage.output_tokens,
        cache_read_input_tokens=usage.cached_tokens,
    )
