"""OpenAI's responses, what is answered: events to a response, whole or as the numbered events that build it.

    created in_progress  item ...  completed | incomplete | failed

    item = output_item.added  content_part.added  delta ... done  content_part.done  output_item.done

Owns the reply of one call at a time: which item is open, and what the items have gathered.
"""

from __future__ import annotations

import secrets
from typing import Any, Literal

import msgspec
from msgspec import Struct

from headrace.core import clock
from headrace.core.types import FinishReason, Usage
from headrace.gateway import chain
from headrace.gateway.chain import Began, Ended, Piece, ToolPiece
from headrace.gateway.dialects.shared import json
from headrace.gateway.errors import Refused

Progress = Literal["in_progress", "completed", "incomplete"]


class OutputText(Struct, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class ReasoningText(Struct, tag_field="type", tag="reasoning_text"):
    text: str


class OutputMessage(Struct, tag_field="type", tag="message", kw_only=True):
    id: str
    status: Progress = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class OutputReasoning(Struct, tag_field="type", tag="reasoning", kw_only=True):
    id: str
    status: Progress = "in_progress"
    summary: list[Any] = []
    content: list[ReasoningText] = []


class OutputCall(Struct, tag_field="type", tag="function_call", kw_only=True):
    id: str
    call_id: str
    name: str
    arguments: str = ""
    status: Progress = "in_progress"


Item = OutputMessage | OutputReasoning | OutputCall


class InputDetails(Struct):
    cached_tokens: int
    cache_write_tokens: int = 0  # nobody pays for them here


class OutputDetails(Struct):
    reasoning_tokens: int


class Spent(Struct):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ErrorShown(Struct):
    code: str
    message: str


class Incomplete(Struct):
    reason: Literal["max_output_tokens"]


class ReasoningShown(Struct):
    effort: str | None
    summary: None = None


class TextShown(Struct):
    format: dict[str, Any]


class ToolShown(Struct):
    name: str
    parameters: dict[str, Any] | None
    strict: bool | None
    description: str | None
    type: Literal["function"] = "function"


class Response(Struct, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    created_at: int = msgspec.field(default_factory=lambda: int(clock.wall()))
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
    background: bool = False
    error: ErrorShown | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: ReasoningShown
    store: bool
    temperature: float
    text: TextShown
    tool_choice: str | dict[str, Any]
    tools: list[ToolShown]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: Spent | None = None


class Event(Struct):
    """One server-sent event's data; the other fields depend on its type."""

    type: str
    sequence_number: int


class Reply:
    """Events of one call as bytes."""

    def __init__(self, response: Response, stream: bool) -> None:
        self.stream = stream
        self.response = response
        self._number = 0
        self._open: Item | None = None
        self._gathered: list[str] = []  # text of the open item
        self._finish: FinishReason | None = None

    def feed(self, event: chain.Event) -> bytes:
        match event:
            case Began() if self.stream:
                return self._event("response.created", response=self.response) + self._event(
                    "response.in_progress", response=self.response
                )
            case Piece():
                return self._piece(event)
            case Ended():
                self._ended(event)
        return b""

    @property
    def message(self) -> dict[str, Any]:
        """What was answered, as a message of the conversation that goes on."""
        said: dict[str, Any] = {"role": "assistant", "content": ""}
        for item in self.response.output:
            match item:
                case OutputMessage():
                    said["content"] += "".join(part.text for part in item.content)
                case OutputCall():
                    function = {"name": item.name, "arguments": _arguments(item.arguments)}
                    call = {"id": item.call_id, "type": "function", "function": function}
                    said.setdefault("tool_calls", []).append(call)
        return said

    def _piece(self, piece: Piece) -> bytes:
        out = b""
        if piece.reasoning:
            out += self._grow_text(OutputReasoning, piece.reasoning)
        if piece.text:
            out += self._grow_text(OutputMessage, piece.text)
        for call in piece.calls:
            out += self._grow_call(call)
        if piece.finish is not None:
            self._finish = piece.finish
            out += self._close("incomplete" if piece.finish is FinishReason.LENGTH else "completed")
        return out

    def _grow_text(self, kind: type[OutputMessage] | type[OutputReasoning], more: str) -> bytes:
        out = b""
        if not isinstance(self._open, kind):
            prefix = "msg" if kind is OutputMessage else "rs"
            out = self._close() + self._begin(kind(id=f"{prefix}_{secrets.token_hex(24)}"))
            out += self._part("response.content_part.added", "")
        self._gathered.append(more)
        extra: dict[str, Any] = {"logprobs": []} if kind is OutputMessage else {}
        return out + self._about(self._text_event("delta"), content_index=0, delta=more, **extra)

    def _grow_call(self, call: ToolPiece) -> bytes:
        out = b""
        if call.id:
            item = OutputCall(id=f"fc_{secrets.token_hex(24)}", call_id=call.id, name=call.name)
            out = self._close() + self._begin(item)
        if call.arguments:
            self._gathered.append(call.arguments)
            out += self._about("response.function_call_arguments.delta", delta=call.arguments)
        return out

    def _begin(self, item: Item) -> bytes:
        self._open = item
        self.response.output = [*self.response.output, item]
        return self._item("response.output_item.added", item)

    def _close(self, status: Progress = "completed") -> bytes:
        """End the open item, if there is one, and give it what it has gathered."""
        item, text = self._open, "".join(self._gathered)
        if item is None:
            return b""
        item.status = status
        if isinstance(item, OutputCall):
            item.arguments = text
            out = self._about("response.function_call_arguments.done", arguments=text, name=item.name)
        else:
            extra: dict[str, Any] = {"logprobs": []} if isinstance(item, OutputMessage) else {}
            out = self._about(self._text_event("done"), content_index=0, text=text, **extra)
            out += self._part("response.content_part.done", text)
            if isinstance(item, OutputMessage):
                item.content = [OutputText(text)]
            else:
                item.content = [ReasoningText(text)]
        out += self._item("response.output_item.done", item)
        self._open, self._gathered = None, []
        return out

    def _ended(self, event: Ended) -> None:
        response, usage = self.response, event.usage
        cut = self._finish is FinishReason.LENGTH
        response.status = "incomplete" if cut else "completed"
        response.incomplete_details = Incomplete("max_output_tokens") if cut else None
        response.completed_at = None if cut else int(clock.wall())
        response.usage = _spent(usage, event.reasoning_tokens)

    def end(self) -> bytes:
        return self._event(f"response.{self.response.status}", response=self.response)

    def failed(self, error: Refused) -> bytes:
        self.response.status = "failed"
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.response.error = ErrorShown(code, str(error))
        return self._event("response.failed", response=self.response)

    def body(self) -> bytes:
        return json(self.response)

    def _text_event(self, what: str) -> str:
        kind = "output_text" if isinstance(self._open, OutputMessage) else "reasoning_text"
        return f"response.{kind}.{what}"

    def _part(self, kind: str, text: str) -> bytes:
        part = OutputText(text) if isinstance(self._open, OutputMessage) else ReasoningText(text)
        return self._about(kind, content_index=0, part=part)

    def _about(self, kind: str, **fields: Any) -> bytes:
        """An event about the open item."""
        item_id = "" if self._open is None else self._open.id
        return self._event(kind, item_id=item_id, output_index=len(self.response.output) - 1, **fields)

    def _item(self, kind: str, item: Item) -> bytes:
        return self._event(kind, output_index=len(self.response.output) - 1, item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        if not self.stream:
            return b""
        data = json({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _arguments(text: str) -> Any:
    try:
        value = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text
    return value if isinstance(value, dict) else text


def _spent(usage: Usage, reasoning_tokens: int) -> Spent:
    return Spent(
        usage.prompt_tokens,
        InputDetails(usage.cached_tokens),
        usage.output_tokens,
        OutputDetails(reasoning_tokens),
        usage.prompt_tokens + usage.output_tokens,
    )
