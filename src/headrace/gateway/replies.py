"""The OpenAI dialect, what is answered: events to JSON and server-sent events.

The parts of a streamed chunk that do not change are encoded once per call; see `shapes` for the types. Owns the reply
of one call at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
from msgspec import UNSET

from headrace.core import clock
from headrace.core.types import FinishReason, TokenLogprob, Usage
from headrace.gateway.chain import Began, Call, Chat, Ended, Event, Piece, Prompt, ToolPiece
from headrace.gateway.errors import Refused
from headrace.gateway.shapes import (
    ChatChoice,
    ChatLogprobs,
    ChatMessage,
    CompletionChoice,
    CompletionLogprobs,
    FinishText,
    FunctionCall,
    FunctionDelta,
    OutputDetails,
    PromptDetails,
    Spent,
    TokenLogprobs,
    ToolCall,
    ToolCallDelta,
    TopToken,
)
from headrace.gateway.text import Text

DONE = b"data: [DONE]\n\n"
_json = msgspec.json.Encoder().encode


def error_body(error: Refused) -> bytes:
    kind = {429: "rate_limit_error", 401: "authentication_error"}.get(error.status)
    kind = kind or ("server_error" if error.status >= 500 else "invalid_request_error")
    return _json({"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}})


class Frame:
    """What every body and chunk of one call have in common."""

    def __init__(self, call: Call, kind: str, model: str, stream: bool, wants_usage: bool) -> None:
        self.stream = stream
        self.wants_usage = wants_usage
        self.wants_logprobs = call.sampling.logprobs is not None
        self.choices = call.choices * (1 if isinstance(call.asked, Chat) else len(call.asked))
        chunk = ".chunk" if self.stream and kind == "chat.completion" else ""
        self.head = {"id": call.id, "object": kind + chunk, "created": int(clock.wall()), "model": model}
        opening = _json(self.head)[:-1]
        self._opening = b"data: " + opening + b',"choices":[{"index":'
        self._usage_opening = b"data: " + opening + b',"choices":[],"usage":'
        self._closing = b'],"usage":null}\n\n' if self.wants_usage else b"]}\n\n"

    def chunk(self, choice: int, rest: bytes) -> bytes:
        """One event; `rest` continues the choice's object after its index."""
        return b"%b%d,%b}%b" % (self._opening, choice, rest, self._closing)

    def end(self, ended: Ended) -> bytes:
        """The last events of a stream."""
        return (self._usage_opening + _json(spent(ended)) + b"}\n\n" if self.wants_usage else b"") + DONE

    def whole(self, choices: Sequence[ChatChoice] | Sequence[CompletionChoice], ended: Ended) -> bytes:
        return _json({**self.head, "choices": choices, "usage": spent(ended)})


def spent(ended: Ended) -> Spent:
    usage = ended.usage
    return Spent(
        usage.prompt_tokens,
        usage.output_tokens,
        usage.prompt_tokens + usage.output_tokens,
        PromptDetails(usage.cached_tokens),
        OutputDetails(ended.reasoning_tokens),
    )


def failure(error: Refused) -> bytes:
    """The end of a stream that broke off."""
    return b"data: " + error_body(error) + b"\n\n" + DONE


_NOTHING = Ended(Usage(0, 0, 0))
_FINISH: Mapping[FinishReason | None, Literal["stop", "length"] | None]
_FINISH = {None: None, FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


def _finish(piece: Piece) -> FinishText | None:
    return "tool_calls" if piece.called else _FINISH[piece.finish]


@dataclass(slots=True)
class _ChatSoFar:
    """What a whole (not streamed) chat choice has gathered."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    arguments: list[list[str]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishText = "stop"

    def add_call(self, piece: ToolPiece) -> None:
        if piece.index == len(self.calls):
            self.calls.append(ToolCall(piece.id, FunctionCall(piece.name, "")))
            self.arguments.append([])
        self.arguments[piece.index].append(piece.arguments)

    def message(self) -> ChatMessage:
        for call, arguments in zip(self.calls, self.arguments, strict=True):
            call.function.arguments = "".join(arguments)
        text = "".join(self.texts)
        return ChatMessage(
            content=None if self.calls and not text else text,
            reasoning_content="".join(self.reasoning) if self.reasoning else UNSET,
            tool_calls=self.calls or UNSET,
        )


class ChatReply:
    """Events of one chat call as bytes."""

    def __init__(self, frame: Frame, text: Text) -> None:
        self.stream = frame.stream
        self._frame = frame
        self._text = text
        self._whole = [] if self.stream else [_ChatSoFar() for _ in range(frame.choices)]
        self._ended = _NOTHING

    def feed(self, event: Event) -> bytes:
        match event:
            case Piece():
                return self._piece(event) if self.stream else self._gather(event)
            case Began() if self.stream:
                return b"".join(self._frame.chunk(at, _ROLE) for at in range(self._frame.choices))
            case Ended():
                self._ended = event
        return b""

    def _piece(self, piece: Piece) -> bytes:
        """Reasoning, text and calls are chunks of their own; logprobs travel with the first of them."""
        deltas = [b'{"reasoning_content":%b}' % _json(piece.reasoning)] if piece.reasoning else []
        if piece.text or (piece.logprobs and not deltas and not piece.calls):
            deltas.append(b'{"content":%b}' % _json(piece.text))
        deltas += [_json({"tool_calls": [_call_delta(call)]}) for call in piece.calls]
        chunks, logprobs = b"", self._logprobs(piece.logprobs)
        for delta in deltas:
            rest = b'"delta":%b,"logprobs":%b,"finish_reason":null' % (delta, logprobs)
            chunks += self._frame.chunk(piece.choice, rest)
            logprobs = b"null"
        if piece.finish is not None:
            rest = b'"delta":{},"logprobs":null,"finish_reason":' + _json(_finish(piece))
            chunks += self._frame.chunk(piece.choice, rest)
        return chunks

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> bytes:
        if not self._frame.wants_logprobs:
            return b"null"
        return _json(ChatLogprobs([_chat_logprob(self._text, item) for item in logprobs]))

    def _gather(self, piece: Piece) -> bytes:
        choice = self._whole[piece.choice]
        choice.texts.append(piece.text)
        if piece.reasoning:
            choice.reasoning.append(piece.reasoning)
        for call in piece.calls:
            choice.add_call(call)
        choice.logprobs.extend(_chat_logprob(self._text, item) for item in piece.logprobs)
        choice.finish = _finish(piece) or choice.finish
        return b""

    def end(self) -> bytes:
        return self._frame.end(self._ended)

    def failed(self, error: Refused) -> bytes:
        return failure(error)

    def body(self) -> bytes:
        logged = self._frame.wants_logprobs
        choices = [
            ChatChoice(at, choice.message(), ChatLogprobs(choice.logprobs) if logged else None, choice.finish)
            for at, choice in enumerate(self._whole)
        ]
        return self._frame.whole(choices, self._ended)


_ROLE = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'


def _call_delta(piece: ToolPiece) -> ToolCallDelta:
    """Id, type and name are said once, with the first delta of a call."""
    if piece.id:
        return ToolCallDelta(piece.index, FunctionDelta(piece.name, piece.arguments), piece.id, "function")
    return ToolCallDelta(piece.index, FunctionDelta(arguments=piece.arguments))


def _chat_logprob(text: Text, item: TokenLogprob) -> TokenLogprobs:
    top = [TopToken(*_token(text, token_id, logprob)) for token_id, logprob in item.top]
    return TokenLogprobs(*_token(text, item.token_id, item.logprob), top)


def _token(text: Text, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    name = text.token_bytes(token_id)
    return name.decode(errors="replace"), _finite(logprob), list(name)


def _finite(logprob: float) -> float:
    """JSON has no infinity: a token that cannot be drawn has OpenAI's value for it."""
    return max(logprob, -9999.0)


class _Logged:
    """The logprobs object of one completion choice: parallel lists, with offsets into the choice's text."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._walk = text.transcript(())
        self._offset = 0
        self._taken = _no_logprobs()

    def add(self, token_id: int, item: TokenLogprob | None) -> None:
        """`item` is None for the first token of a prompt, which nothing predicts."""
        row = self._taken
        row.tokens.append(_completion_token(self._text, token_id))
        row.token_logprobs.append(None if item is None else _finite(item.logprob))
        row.text_offset.append(self._offset)
        row.top_logprobs.append(None if item is None else self._top(item))
        self._offset += len(self._walk.push((token_id,)))

    def answer_begins(self) -> None:
        """The prompt's text is complete; the answer is decoded on its own."""
        self._offset += len(self._walk.end())
        self._walk = self._text.transcript(())

    def take(self) -> CompletionLogprobs:
        taken, self._taken = self._taken, _no_logprobs()
        return taken

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        return {_completion_token(self._text, token_id): _finite(logprob) for token_id, logprob in item.top}


def _no_logprobs() -> CompletionLogprobs:
    return CompletionLogprobs([], [], [], [])


class CompletionReply:
    """Events of one completion call as bytes. With echo, a choice's prompt precedes its first text."""

    def __init__(self, frame: Frame, text: Text, prompts: Sequence[Prompt], echo: bool, silent: bool) -> None:
        self.stream = frame.stream
        self._frame = frame
        self._text = text
        self._asked = prompts
        self._silent = silent  # max_tokens was 0: the answer is the echo alone
        self._echo_due = [echo] * frame.choices
        self._prompt_logprobs: list[list[TokenLogprob]] = [[] for _ in range(frame.choices)]
        self._prompts: Sequence[Sequence[int]] = ()
        self._logged = [_Logged(text) for _ in range(frame.choices)] if frame.wants_logprobs else []
        self._texts: list[list[str]] = [[] for _ in range(frame.choices)]
        self._finish: list[Literal["stop", "length"] | None] = [None] * frame.choices
        self._ended = _NOTHING

    def feed(self, event: Event) -> bytes:
        match event:
            case Began():
                self._prompts = event.prompts
            case Piece():
                return self._piece(event)
            case Ended():
                self._ended = Ended(replace(event.usage, output_tokens=0)) if self._silent else event
        return b""

    def _piece(self, piece: Piece) -> bytes:
        at = piece.choice
        self._prompt_logprobs[at].extend(piece.prompt_logprobs)
        if not (piece.text or piece.logprobs or piece.finish):
            return b""
        text = self._echo(at)
        if not self._silent:
            text += piece.text
            for item in piece.logprobs:
                self._logged[at].add(item.token_id, item)
        finish = "length" if piece.finish and self._silent else _FINISH[piece.finish]
        if self.stream:
            logprobs = _json(self._logged[at].take()) if self._logged else b"null"
            rest = b'"text":%b,"logprobs":%b,"finish_reason":%b' % (_json(text), logprobs, _json(finish))
            return self._frame.chunk(at, rest)
        self._texts[at].append(text)
        self._finish[at] = finish
        return b""

    def _echo(self, at: int) -> str:
        """The prompt's text, once."""
        if not self._echo_due[at]:
            return ""
        self._echo_due[at] = False
        which = at * len(self._asked) // self._frame.choices
        asked, ids = self._asked[which], self._prompts[which]
        if self._logged:
            for token_id, item in zip(ids, (None, *self._prompt_logprobs[at]), strict=False):
                self._logged[at].add(token_id, item)
            self._logged[at].answer_begins()
        if isinstance(asked, str):
            return asked
        walk = self._text.transcript(())
        return walk.push(ids) + walk.end()

    def end(self) -> bytes:
        return self._frame.end(self._ended)

    def failed(self, error: Refused) -> bytes:
        return failure(error)

    def body(self) -> bytes:
        choices = [
            CompletionChoice(at, "".join(texts), self._logged[at].take() if self._logged else None, finish)
            for at, (texts, finish) in enumerate(zip(self._texts, self._finish, strict=True))
        ]
        return self._frame.whole(choices, self._ended)


def _completion_token(text: Text, token_id: int) -> str:
    """A token's text, or its bytes spelled out where they are no text, so that different tokens stay different."""
    name = text.token_bytes(token_id)
    try:
        return name.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in name)
