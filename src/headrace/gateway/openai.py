"""The OpenAI dialect, what is asked: bodies of /v1/chat/completions and /v1/completions to `Call`; see `replies` for
what is answered. Decides how a feature looks on the wire and nothing about how it works. No state.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from headrace.core.types import Sampling
from headrace.gateway import bounds, shapes
from headrace.gateway.bounds import Body
from headrace.gateway.chain import Call, Chat, Event, Prompt
from headrace.gateway.edge import Context, Dialect, Reply
from headrace.gateway.errors import Refused, bad
from headrace.gateway.openapi import Answer, Operation
from headrace.gateway.replies import ChatReply, CompletionReply, Frame, error_body


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


CHAT = Body(ChatRequest)
COMPLETION = Body(CompletionRequest)


def parse_chat(body: bytes, context: Context) -> tuple[Call, Reply[Event]]:
    """Raises Refused."""
    asked = CHAT.decode(body)
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
    return call, ChatReply(_frame(call, asked, context, "chat.completion"), context.text)


def parse_completion(body: bytes, context: Context) -> tuple[Call, Reply[Event]]:
    """Raises Refused."""
    asked = COMPLETION.decode(body)
    prompts = _prompts(asked.prompt)
    if len(prompts) * (asked.n or 1) > context.max_choices:
        raise bad(f"{len(prompts)} prompts are more than the {context.max_choices} choices allowed.", "prompt")
    if asked.max_tokens == 0 and not asked.echo:
        raise bad("max_tokens must be at least 1, or 0 together with echo.", "max_tokens")
    sampling = _sampling(asked, asked.logprobs, asked.logprobs if asked.echo else None)
    # a request draws at least one token; with max_tokens 0 it is not shown
    limit = 1 if asked.max_tokens == 0 else asked.max_tokens
    call = _call("cmpl", asked, context, prompts, sampling, limit)
    frame = _frame(call, asked, context, "text_completion")
    return call, CompletionReply(frame, context.text, prompts, bool(asked.echo), asked.max_tokens == 0)


def _frame(call: Call, asked: _Common, context: Context, kind: str) -> Frame:
    wants_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    return Frame(call, kind, context.model, bool(asked.stream), wants_usage)


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


DIALECTS: Sequence[Dialect[Call, Event]] = (
    Dialect(
        Operation(
            "/v1/chat/completions",
            "POST",
            "Answer a conversation",
            {200: Answer(shapes.ChatCompletion)},
            shapes.Error,
            CHAT,
            shapes.ChatChunk,
        ),
        parse_chat,
        error_body,
    ),
    Dialect(
        Operation(
            "/v1/completions",
            "POST",
            "Continue a text",
            {200: Answer(shapes.Completion)},
            shapes.Error,
            COMPLETION,
            shapes.Completion,
        ),
        parse_completion,
        error_body,
    ),
)
