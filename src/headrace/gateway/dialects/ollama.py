"""Ollama's /api/chat, /api/generate and /api/embed, what is asked: bodies to `Call` and `Embed`.

See `ollama_reply` for what is answered and `ollama_pages` for what it tells about models. Decides how a feature looks
on the wire and nothing about how it works. Defaults are Ollama's: temperature 0.8, top_k 40, top_p 0.9.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from headrace.core.types import Grammar, Sampling
from headrace.gateway import bounds
from headrace.gateway.bounds import Body
from headrace.gateway.chain import Call, Chat, Tool, Tools
from headrace.gateway.dialects import ollama_reply as reply
from headrace.gateway.dialects.shared import ANY_OBJECT, One, check_model, sampling, schema_grammar
from headrace.gateway.edge import Context, Dialect
from headrace.gateway.embedding import Embed, Embedded
from headrace.gateway.errors import bad
from headrace.gateway.openapi import Answer, Operation

NDJSON = b"application/x-ndjson"
IGNORED = frozenset({"keep_alive"})  # where no model is loaded for the answer
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "template": ("",),
    "suffix": ("",),
    "images": ([],),
    "context": ([],),
    "truncate": (False,),
    "shift": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
}

Off = Annotated[Any, Meta(description="accepted, without effect")]


class Options(Struct, forbid_unknown_fields=True):
    """Fields below the line concern Ollama's own memory and processors: accepted, without effect."""

    temperature: Annotated[float, Meta(ge=0, le=2)] = 0.8
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] = 40
    top_p: bounds.TopP = 0.9
    min_p: bounds.MinP = 0.0
    repeat_penalty: bounds.Repetition = 1.0
    presence_penalty: bounds.Penalty = 0.0
    frequency_penalty: bounds.Penalty = 0.0
    seed: bounds.Seed | None = None
    stop: bounds.StopString | bounds.StopStrings | None = None
    num_predict: Annotated[int, Meta(ge=-2, le=bounds.MAX_TOKEN_ID, description="0 and less: no limit")] = -1
    repeat_last_n: Annotated[int, Meta(ge=-1, le=-1, description="-1 only: penalties look at the whole text")] = -1
    # ------
    num_ctx: Off = None
    num_keep: Off = None
    num_batch: Off = None
    num_gpu: Off = None
    main_gpu: Off = None
    num_thread: Off = None
    low_vram: Off = None
    use_mmap: Off = None
    use_mlock: Off = None
    numa: Off = None
    penalize_newline: Off = None


class Function(Struct, forbid_unknown_fields=True):
    name: bounds.ToolName
    description: bounds.ToolText | None = None
    parameters: dict[str, Any] = {}


class InputTool(Struct, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"] = "function"


class Called(Struct, forbid_unknown_fields=True):
    name: bounds.ToolName
    arguments: dict[str, Any] = {}
    index: int | None = None


class ToolCall(Struct, forbid_unknown_fields=True):
    function: Called
    id: str | None = None
    type: Literal["function"] | None = None


class Message(Struct, forbid_unknown_fields=True):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    tool_calls: Annotated[list[ToolCall], Meta(max_length=bounds.Calls)] | None = None
    tool_name: bounds.Name | None = None
    tool_call_id: bounds.CallId | None = None
    images: Annotated[list[str], Meta(max_length=0)] | None = None


Format = Literal["", "json"] | dict[str, Any] | None
Think = bool | Literal["low", "medium", "high"] | None


class ChatRequest(Struct, kw_only=True):
    model: bounds.Name
    messages: Annotated[list[Message], Meta(max_length=bounds.Messages)] = []
    tools: Annotated[list[InputTool], Meta(max_length=bounds.Tools)] | None = None
    format: Format = None
    options: Options | None = None
    stream: bool | None = None
    think: Think = None
    keep_alive: bounds.KeepAlive | None = None


class GenerateRequest(Struct, kw_only=True):
    model: bounds.Name
    prompt: str = ""
    system: str = ""
    raw: bool | None = None
    format: Format = None
    options: Options | None = None
    stream: bool | None = None
    think: Think = None
    keep_alive: bounds.KeepAlive | None = None


class EmbedRequest(Struct, kw_only=True):
    model: bounds.Name
    input: str | Annotated[list[str], Meta(max_length=2048)] = []
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1, le=1 << 16)] | None = None
    options: Options | None = None


class OldEmbedRequest(Struct, kw_only=True):
    model: bounds.Name
    prompt: str
    options: Options | None = None


CHAT = Body(ChatRequest, frozenset(), REFUSED)
GENERATE = Body(GenerateRequest, frozenset(), REFUSED)
EMBED = Body(EmbedRequest, IGNORED, {})
OLD_EMBED = Body(OldEmbedRequest, IGNORED, {})


def parse_chat(body: bytes, context: Context) -> tuple[Call, reply.Reply]:
    """Raises Refused."""
    asked = CHAT.decode(body)
    context = context.of(asked.model)
    chat = Chat(tuple(_messages(asked.messages)), _thinking(asked.think), _tools(asked.tools or ()))
    call = _call(asked, context, chat if asked.messages else ())
    return call, reply.Reply(named(context.model), asked.stream is not False, reply.chat, _kind(call))


def parse_generate(body: bytes, context: Context) -> tuple[Call, reply.Reply]:
    """Raises Refused."""
    asked = GENERATE.decode(body)
    context = context.of(asked.model)
    said = {"system": asked.system, "user": asked.prompt}
    chat = Chat(tuple({"role": role, "content": text} for role, text in said.items() if text), _thinking(asked.think))
    prompt: Chat | tuple[str, ...] = (asked.prompt,) if asked.raw else chat
    call = _call(asked, context, prompt if asked.prompt else ())
    return call, reply.Reply(named(context.model), asked.stream is not False, reply.generate, _kind(call))


def parse_embed(body: bytes, context: Context) -> tuple[Embed, One[Embedded]]:
    """Raises Refused. Texts that are too long are cut, unless `truncate` is false."""
    asked = EMBED.decode(body)
    _check(asked.model, context.embedding_model)
    context.caller.check_model(context.embedding_model or "")
    inputs = (asked.input,) if isinstance(asked.input, str) else tuple(asked.input)
    shape = reply.embedded(asked.model)
    return Embed(inputs, asked.truncate is not False, asked.dimensions), One(shape)


def parse_old_embed(body: bytes, context: Context) -> tuple[Embed, One[Embedded]]:
    """Raises Refused."""
    asked = OLD_EMBED.decode(body)
    _check(asked.model, context.embedding_model)
    context.caller.check_model(context.embedding_model or "")
    return Embed((asked.prompt,), truncate=True), One(lambda event: reply.OldEmbeddings(list(event.vectors[0])))


def named(model: str) -> str:
    """A model's name as Ollama writes it, with a tag."""
    return model if ":" in model else f"{model}:latest"


def _check(asked: str, served: str | None) -> None:
    check_model(asked.removesuffix(":latest"), served, served and served.removesuffix(":latest"))


def _call(asked: ChatRequest | GenerateRequest, context: Context, what: Chat | tuple[str, ...]) -> Call:
    options = asked.options or Options()
    stop = options.stop or []
    return Call(
        id=f"ollama-{secrets.token_hex(12)}",
        asked=what,
        sampling=_sampling(options),
        max_new_tokens=options.num_predict if options.num_predict > 0 else None,
        grammar=_grammar(asked.format),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        model=context.model,
        tenant=context.tenant,
        client_id=context.client_id,
        keep_alive_s=bounds.keep_alive_s(asked.keep_alive),
    )


def _kind(call: Call) -> reply.Kind:
    if call.asked:
        return "answer"
    return "unload" if call.keep_alive_s == 0 else "load"


def _sampling(options: Options) -> Sampling:
    return sampling(
        options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
    )


def _grammar(format: Format) -> Grammar | None:
    if isinstance(format, dict):
        return schema_grammar(format, "format")
    return ANY_OBJECT if format == "json" else None


def _thinking(think: Think) -> Mapping[str, bool]:
    return {} if think is None else {"enable_thinking": bool(think)}


def _tools(tools: Sequence[InputTool]) -> Tools:
    functions = [tool.function for tool in tools]
    for function in functions:
        bounds.check_free(function.parameters, "tools")
    return Tools(tuple(Tool(one.name, one.description or "", one.parameters) for one in functions))


def _messages(messages: Sequence[Message]) -> Iterable[Mapping[str, Any]]:
    """Ollama's calls have no ids and are answered in order: they get numbers."""
    calls, answers = 0, 0
    for message in messages:
        said: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.thinking:
            said["reasoning_content"] = message.thinking
        if message.tool_calls:
            if message.role != "assistant":
                raise bad("messages: only an assistant calls tools.", "messages")
            said["tool_calls"] = [_called(call, calls + at) for at, call in enumerate(message.tool_calls)]
            calls += len(message.tool_calls)
        if message.role == "tool":
            said["tool_call_id"] = message.tool_call_id or f"call_{answers}"
            answers += 1
        yield said


def _called(call: ToolCall, number: int) -> Mapping[str, Any]:
    bounds.check_free(call.function.arguments, "messages")
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id or f"call_{number}", "type": "function", "function": function}


def _operation(path: str, summary: str, body: Body[Any], answer: Any) -> Operation:
    return Operation(path, "POST", summary, {200: Answer(answer)}, reply.Error, body)


def _streaming(path: str, summary: str, body: Body[Any], answer: Any) -> Operation:
    """Whose answer is either one object, or a stream of them."""
    return replace(_operation(path, summary, body, answer), events=answer, stream_media=NDJSON.decode())


GENERATION = (
    Dialect(
        _streaming("/api/chat", "Answer a conversation (Ollama's shape)", CHAT, reply.ChatAnswer),
        parse_chat,
        reply.error_body,
        NDJSON,
        any_type=True,
    ),
    Dialect(
        _streaming("/api/generate", "Answer a prompt (Ollama's shape)", GENERATE, reply.GenerateAnswer),
        parse_generate,
        reply.error_body,
        NDJSON,
        any_type=True,
    ),
)
EMBEDDING = (
    Dialect(
        _operation("/api/embed", "Vectors of texts (Ollama's shape)", EMBED, reply.Embeddings),
        parse_embed,
        reply.error_body,
        any_type=True,
    ),
    Dialect(
        _operation("/api/embeddings", "The vector of a text (Ollama's older shape)", OLD_EMBED, reply.OldEmbeddings),
        parse_old_embed,
        reply.error_body,
        any_type=True,
    ),
)
