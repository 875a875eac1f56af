"""The OpenAI dialect: /v1/chat/completions and /v1/completions to `Call`, events to JSON and server-sent events.

Decides how a feature looks on the wire and nothing about how it works. The parts of a streamed chunk that do not
change are encoded once per call. Owns the reply of one call at a time.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from headrace.core import clock
from headrace.core.types import FinishReason, Sampling, TokenLogprob, Usage
from headrace.gateway import bounds
from headrace.gateway.chain import Began, Call, Chat, Ended, Event, Piece, Prompt
from headrace.gateway.edge import Context, Dialect, Reply
from headrace.gateway.errors import Refused, bad
from headrace.gateway.text import Text

DONE = b"data: [DONE]\n\n"
_json = msgspec.json.Encoder().encode


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; not needed for correctness


class TemplateOptions(Struct, forbid_unknown_fields=True):
    """Template variables a client may set. No others: a template's variables are its internals."""

    enable_thinking: bool | None = None


class Part(Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(Struct, forbid_unknown_fields=True):
    """What a client may send back includes what it was given, with the fields we leave null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Meta(min_length=1, max_length=bounds.Parts)]
    name: bounds.Name | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class _Common(Struct, kw_only=True):
    """Fields of both endpoints."""

    model: bounds.Name | None = None
    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    top_k: bounds.TopK | None = None
    min_p: bounds.MinP | None = None
    repetition_penalty: bounds.Repetition | None = None
    presence_penalty: bounds.Penalty | None = None
    frequency_penalty: bounds.Penalty | None = None
    logit_bias: bounds.LogitBias | None = None
    seed: bounds.Seed | None = None
    stop: bounds.StopString | bounds.StopStrings | None = None
    stop_token_ids: bounds.StopTokens | None = None
    max_tokens: bounds.MaxTokens | None = None
    n: bounds.Choices | None = None
    ignore_eos: bool | None = None
    cache_salt: bounds.Salt | None = None
    priority: bounds.Priority | None = None
    deadline_s: bounds.Deadline | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(_Common, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=bounds.Messages)]
    max_completion_tokens: bounds.MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: bounds.TopLogprobs | None = None
    chat_template_kwargs: TemplateOptions | None = None


class CompletionRequest(_Common, kw_only=True):
    prompt: str | Annotated[list[str | bounds.TokenId | list[bounds.TokenId]], Meta(min_length=1)]
    echo: bool | None = None
    logprobs: bounds.TopLogprobs | None = None


_CHAT = msgspec.json.Decoder(ChatRequest)
_COMPLETION = msgspec.json.Decoder(CompletionRequest)


def parse_chat(body: bytes, context: Context) -> tuple[Call, Reply]:
    """Raises Refused."""
    asked = bounds.decode(_CHAT, body)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad("top_logprobs needs logprobs to be true.", "top_logprobs")
    max_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if max_tokens == 0:
        raise bad("max_tokens must be at least 1.", "max_tokens")
    options = msgspec.structs.asdict(asked.chat_template_kwargs) if asked.chat_template_kwargs else {}
    chat = Chat(
        tuple(map(_message, asked.messages)), {key: value for key, value in options.items() if value is not None}
    )
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    call = _call("chatcmpl", asked, context, chat, _sampling(asked, logprobs), max_tokens)
    return call, _ChatReply(_Frame(call, asked, context, "chat.completion"), context.text)


def parse_completion(body: bytes, context: Context) -> tuple[Call, Reply]:
    """Raises Refused."""
    asked = bounds.decode(_COMPLETION, body)
    prompts = _prompts(asked.prompt)
    if len(prompts) * (asked.n or 1) > context.max_choices:
        raise bad(f"{len(prompts)} prompts are more than the {context.max_choices} choices allowed.", "prompt")
    if asked.max_tokens == 0 and not asked.echo:
        raise bad("max_tokens must be at least 1, or 0 together with echo.", "max_tokens")
    sampling = _sampling(asked, asked.logprobs, asked.logprobs if asked.echo else None)
    # a request draws at least one token; with max_tokens 0 it is not shown
    limit = 1 if asked.max_tokens == 0 else asked.max_tokens
    call = _call("cmpl", asked, context, prompts, sampling, limit)
    frame = _Frame(call, asked, context, "text_completion")
    return call, _CompletionReply(frame, context.text, prompts, bool(asked.echo), asked.max_tokens == 0)


def error_body(error: Refused) -> bytes:
    kind = {429: "rate_limit_error", 401: "authentication_error"}.get(error.status)
    kind = kind or ("server_error" if error.status >= 500 else "invalid_request_error")
    return _json({"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}})


def _message(message: Message) -> Mapping[str, Any]:
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": text} | ({"name": message.name} if message.name else {})


def _prompts(prompt: str | list[Any]) -> tuple[Prompt, ...]:
    """The four forms of a prompt: text, texts, token ids, lists of token ids."""
    if isinstance(prompt, str):
        return (prompt,)
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise bad("prompt: expected texts, token ids or lists of token ids, not a mixture.", "prompt")
    if kinds == {int}:
        return (tuple(prompt),)
    return tuple(item if isinstance(item, str) else tuple(item) for item in prompt)


def _sampling(asked: _Common, logprobs: int | None, prompt_logprobs: int | None = None) -> Sampling:
    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    return Sampling(
        temperature=given(asked.temperature, 1.0),
        top_p=given(asked.top_p, 1.0),
        top_k=max(0, asked.top_k or 0),
        min_p=given(asked.min_p, 0.0),
        repetition_penalty=given(asked.repetition_penalty, 1.0),
        presence_penalty=given(asked.presence_penalty, 0.0),
        frequency_penalty=given(asked.frequency_penalty, 0.0),
        logit_bias=tuple((int(token_id), bias) for token_id, bias in (asked.logit_bias or {}).items()),
        seed=secrets.randbits(63) if asked.seed is None else asked.seed % (1 << 63),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def _call(
    prefix: str,
    asked: _Common,
    context: Context,
    what: Chat | tuple[Prompt, ...],
    sampling: Sampling,
    max_new_tokens: int | None,
) -> Call:
    if asked.model is not None and asked.model != context.model:
        message = f"The model {asked.model!r} does not exist; this server has {context.model!r}."
        raise Refused(404, message, code="model_not_found", param="model")
    if (asked.n or 1) > context.max_choices:
        raise bad(f"n: {asked.n} is more than the {context.max_choices} choices allowed.", "n")
    if asked.stream_options is not None and not asked.stream:
        raise bad("stream_options needs stream to be true.", "stream_options")
    stop = asked.stop or []
    return Call(
        id=f"{prefix}-{secrets.token_hex(12)}",
        asked=what,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        choices=asked.n or 1,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=frozenset(asked.stop_token_ids or ()),
        ignore_eos=bool(asked.ignore_eos),
        model=context.model,
        tenant=context.tenant,
        cache_salt=asked.cache_salt or "",
        priority=asked.priority or 0,
        deadline_s=asked.deadline_s,
        client_id=context.client_id,
    )


@dataclass(slots=True)
class _Choice:
    """What a whole (not streamed) choice has gathered so far."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)
    finish: str | None = None


class _Frame:
    """What every body and chunk of one call have in common."""

    def __init__(self, call: Call, asked: _Common, context: Context, kind: str) -> None:
        self.stream = bool(asked.stream)
        self.wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self.wants_logprobs = call.sampling.logprobs is not None
        self.choices = call.choices * (1 if isinstance(call.asked, Chat) else len(call.asked))
        chunk = ".chunk" if self.stream and kind == "chat.completion" else ""
        self.head = {"id": call.id, "object": kind + chunk, "created": int(clock.wall()), "model": context.model}
        opening = _json(self.head)[:-1]
        self._opening = b"data: " + opening + b',"choices":[{"index":'
        self._usage_opening = b"data: " + opening + b',"choices":[],"usage":'
        self._closing = b'],"usage":null}\n\n' if self.wants_usage else b"]}\n\n"

    def chunk(self, choice: int, rest: bytes) -> bytes:
        """One event; `rest` continues the choice's object after its index."""
        return b"%b%d,%b}%b" % (self._opening, choice, rest, self._closing)

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._usage_opening + _json(_usage(usage)) + b"}\n\n" if self.wants_usage else b""

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Usage) -> bytes:
        return _json({**self.head, "choices": choices, "usage": _usage(usage)})


def _usage(usage: Usage) -> Mapping[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.prompt_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _failure(error: Refused) -> bytes:
    return b"data: " + error_body(error) + b"\n\n" + DONE


_FINISH = {None: b"null", FinishReason.STOP: b'"stop"', FinishReason.LENGTH: b'"length"'}


class _ChatReply:
    """Events of one chat call as bytes."""

    def __init__(self, frame: _Frame, text: Text) -> None:
        self.stream = frame.stream
        self._frame = frame
        self._text = text
        self._whole = [] if self.stream else [_Choice() for _ in range(frame.choices)]
        self._usage = Usage(0, 0, 0)

    def feed(self, event: Event) -> bytes:
        match event:
            case Piece():
                return self._piece(event) if self.stream else self._gather(event)
            case Began() if self.stream:
                return b"".join(self._frame.chunk(at, _ROLE) for at in range(self._frame.choices))
            case Ended():
                self._usage = event.usage
        return b""

    def _piece(self, piece: Piece) -> bytes:
        chunks = b""
        if piece.text or piece.logprobs:
            delta = b'"delta":{"content":%b},"logprobs":%b,"finish_reason":null'
            chunks = self._frame.chunk(piece.choice, delta % (_json(piece.text), self._logprobs(piece.logprobs)))
        if piece.finish is not None:
            rest = b'"delta":{},"logprobs":null,"finish_reason":' + _FINISH[piece.finish]
            chunks += self._frame.chunk(piece.choice, rest)
        return chunks

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> bytes:
        if not self._frame.wants_logprobs:
            return b"null"
        return _json({"content": [_chat_logprob(self._text, item) for item in logprobs], "refusal": None})

    def _gather(self, piece: Piece) -> bytes:
        choice = self._whole[piece.choice]
        choice.texts.append(piece.text)
        choice.logprobs.extend(_chat_logprob(self._text, item) for item in piece.logprobs)
        choice.finish = piece.finish
        return b""

    def end(self) -> bytes:
        return self._frame.usage_chunk(self._usage) + DONE

    def failed(self, error: Refused) -> bytes:
        return _failure(error)

    def body(self) -> bytes:
        choices = [
            {
                "index": at,
                "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                "logprobs": {"content": choice.logprobs, "refusal": None} if self._frame.wants_logprobs else None,
                "finish_reason": choice.finish,
            }
            for at, choice in enumerate(self._whole)
        ]
        return self._frame.whole(choices, self._usage)


_ROLE = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'


def _chat_logprob(text: Text, item: TokenLogprob) -> Mapping[str, Any]:
    top = [_chat_token(text, token_id, logprob) for token_id, logprob in item.top]
    return {**_chat_token(text, item.token_id, item.logprob), "top_logprobs": top}


def _chat_token(text: Text, token_id: int, logprob: float) -> Mapping[str, Any]:
    name = text.token_bytes(token_id)
    return {"token": name.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(name)}


def _finite(logprob: float) -> float:
    """JSON has no infinity: a token that cannot be drawn has OpenAI's value for it."""
    return max(logprob, -9999.0)


class _Logged:
    """The logprobs object of one completion choice: parallel lists, with offsets into the choice's text."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._walk = text.transcript(())
        self._offset = 0
        self._taken: dict[str, list[Any]] = self._empty()

    def add(self, token_id: int, item: TokenLogprob | None) -> None:
        """`item` is None for the first token of a prompt, which nothing predicts."""
        row = self._taken
        row["tokens"].append(_completion_token(self._text, token_id))
        row["token_logprobs"].append(None if item is None else _finite(item.logprob))
        row["text_offset"].append(self._offset)
        row["top_logprobs"].append(None if item is None else self._top(item))
        self._offset += len(self._walk.push((token_id,)))

    def answer_begins(self) -> None:
        """The prompt's text is complete; the answer is decoded on its own."""
        self._offset += len(self._walk.end())
        self._walk = self._text.transcript(())

    def take(self) -> Mapping[str, Any]:
        taken, self._taken = self._taken, self._empty()
        return taken

    def _top(self, item: TokenLogprob) -> Mapping[str, float]:
        return {_completion_token(self._text, token_id): _finite(logprob) for token_id, logprob in item.top}

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class _CompletionReply:
    """Events of one completion call as bytes. With echo, a choice's prompt precedes its first text."""

    def __init__(self, frame: _Frame, text: Text, prompts: Sequence[Prompt], echo: bool, silent: bool) -> None:
        self.stream = frame.stream
        self._frame = frame
        self._text = text
        self._asked = prompts
        self._silent = silent  # max_tokens was 0: the answer is the echo alone
        self._echo_due = [echo] * frame.choices
        self._prompt_logprobs: list[list[TokenLogprob]] = [[] for _ in range(frame.choices)]
        self._prompts: Sequence[Sequence[int]] = ()
        self._logged = [_Logged(text) for _ in range(frame.choices)] if frame.wants_logprobs else []
        self._whole = [] if self.stream else [_Choice() for _ in range(frame.choices)]
        self._usage = Usage(0, 0, 0)

    def feed(self, event: Event) -> bytes:
        match event:
            case Began():
                self._prompts = event.prompts
            case Piece():
                return self._piece(event)
            case Ended():
                self._usage = replace(event.usage, output_tokens=0) if self._silent else event.usage
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
        finish = FinishReason.LENGTH if piece.finish and self._silent else piece.finish
        if self.stream:
            logprobs = _json(self._logged[at].take()) if self._logged else b"null"
            rest = b'"text":%b,"logprobs":%b,"finish_reason":%b' % (_json(text), logprobs, _FINISH[finish])
            return self._frame.chunk(at, rest)
        self._whole[at].texts.append(text)
        self._whole[at].finish = finish
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
        return self._frame.usage_chunk(self._usage) + DONE

    def failed(self, error: Refused) -> bytes:
        return _failure(error)

    def body(self) -> bytes:
        choices = [
            {
                "index": at,
                "text": "".join(choice.texts),
                "logprobs": self._logged[at].take() if self._logged else None,
                "finish_reason": choice.finish,
            }
            for at, choice in enumerate(self._whole)
        ]
        return self._frame.whole(choices, self._usage)


def _completion_token(text: Text, token_id: int) -> str:
    """A token's text, or its bytes spelled out where they are no text, so that different tokens stay different."""
    name = text.token_bytes(token_id)
    try:
        return name.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in name)


DIALECT: Mapping[str, Dialect] = {
    "/v1/chat/completions": Dialect(parse_chat, error_body),
    "/v1/completions": Dialect(parse_completion, error_body),
}
