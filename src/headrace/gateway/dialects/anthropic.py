"""Anthropic's /v1/messages and /v1/messages/count_tokens, what is asked: bodies to `Call` and to `Chat`.

See `anthropic_reply` for what is answered. Decides how a feature looks on the wire and nothing about how it works.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from headrace.core.types import Grammar
from headrace.gateway import bounds
from headrace.gateway.bounds import Body
from headrace.gateway.chain import Call, Chat, Tool, Tools
from headrace.gateway.dialects import anthropic_reply as reply
from headrace.gateway.dialects.shared import One, sampling, schema_grammar
from headrace.gateway.edge import Context, Dialect
from headrace.gateway.errors import bad
from headrace.gateway.openapi import Answer, Operation
from headrace.gateway.tokenization import Tokenize, Tokenized

# Accepted and without effect: they steer accounting and caching at Anthropic, never the answer.
IGNORED = frozenset("metadata service_tier cache_control inference_geo".split())
REFUSED: Mapping[str, tuple[Any, ...]] = {"mcp_servers": ([],), "container": (), "context_management": ()}


class CacheControl(Struct):
    """Accepted and without effect: prefixes are shared automatically."""

    type: Literal["ephemeral"]


class Text(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str
    cache_control: CacheControl | None = None
    citations: Any = None


class Thinking(Struct, tag_field="type", tag="thinking", forbid_unknown_fields=True):
    thinking: str
    signature: str = ""


class ToolUse(Struct, tag_field="type", tag="tool_use", forbid_unknown_fields=True):
    id: bounds.CallId
    name: bounds.ToolName
    input: dict[str, Any]
    cache_control: CacheControl | None = None
    caller: Any = None


class ToolResult(Struct, tag_field="type", tag="tool_result", forbid_unknown_fields=True):
    tool_use_id: bounds.CallId
    content: str | Annotated[list[Text], Meta(max_length=bounds.Parts)] = ""
    is_error: bool | None = None
    cache_control: CacheControl | None = None


Block = Text | Thinking | ToolUse | ToolResult


class Message(Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], Meta(min_length=1, max_length=bounds.Parts)]


class InputTool(Struct, forbid_unknown_fields=True):
    name: bounds.ToolName
    input_schema: dict[str, Any]
    description: bounds.ToolText = ""
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Struct, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: bounds.ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingChoice(Struct, forbid_unknown_fields=True):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Meta(ge=1, le=bounds.MAX_TOKEN_ID)] | None = None
    display: Any = None


class Format(Struct, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, forbid_unknown_fields=True):
    format: Format | None = None


class CountRequest(Struct, kw_only=True):
    """Fields of both endpoints."""

    model: bounds.Name
    messages: Annotated[list[Message], Meta(min_length=1, max_length=bounds.Messages)]
    system: str | Annotated[list[Text], Meta(max_length=bounds.Parts)] | None = None
    tools: Annotated[list[InputTool], Meta(max_length=bounds.Tools)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingChoice | None = None
    output_config: OutputConfig | None = None


class MessagesRequest(CountRequest, kw_only=True):
    max_tokens: Annotated[int, Meta(ge=1, le=bounds.MAX_TOKEN_ID)]
    stop_sequences: bounds.StopStrings | None = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: bounds.TopP | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None


MESSAGES = Body(MessagesRequest, IGNORED, REFUSED)
COUNT = Body(CountRequest, IGNORED, REFUSED)


def parse(body: bytes, context: Context) -> tuple[Call, reply.Reply]:
    """Raises Refused."""
    asked = MESSAGES.decode(body)
    context = context.of(asked.model)
    thinking = asked.thinking
    call = Call(
        id=f"msg_{secrets.token_hex(12)}",
        asked=_chat(asked),
        sampling=sampling(temperature=asked.temperature, top_p=asked.top_p, top_k=asked.top_k),
        max_new_tokens=asked.max_tokens,
        grammar=_grammar(asked),
        thinking_tokens=thinking.budget_tokens if thinking and thinking.type == "enabled" else None,
        stop=tuple(asked.stop_sequences or ()),
        model=context.model,
        tenant=context.tenant,
        client_id=context.client_id,
    )
    return call, reply.Reply(call.id, context.model, bool(asked.stream))


def parse_count(body: bytes, context: Context) -> tuple[Tokenize, One[Tokenized]]:
    """Raises Refused."""
    asked = COUNT.decode(body)
    context = context.of(asked.model)
    return Tokenize(context.model, _chat(asked)), One(lambda event: reply.Count(len(event.ids)))


def _chat(asked: CountRequest) -> Chat:
    if asked.messages[-1].role == "assistant":
        raise bad("messages: the last one is the assistant's, and continuing it is not supported.", "messages")
    messages: list[Mapping[str, Any]] = []
    if asked.system:
        messages.append({"role": "system", "content": _text(asked.system)})
    for message in asked.messages:
        messages += _user(message) if message.role == "user" else [_assistant(message)]
    options = {} if asked.thinking is None else {"enable_thinking": asked.thinking.type != "disabled"}
    return Chat(tuple(messages), options, _tools(asked))


def _text(content: str | Sequence[Text]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _user(message: Message) -> Iterator[Mapping[str, Any]]:
    """One message of text, after one for each result of a tool."""
    if isinstance(message.content, str):
        yield {"role": "user", "content": message.content}
        return
    texts = []
    for block in message.content:
        match block:
            case ToolResult():
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _text(block.content)}
            case Text():
                texts.append(block.text)
            case _:
                raise bad("messages: a user's message has blocks of text and of tool results only.", "messages")
    if texts:
        yield {"role": "user", "content": "".join(texts)}


def _assistant(message: Message) -> Mapping[str, Any]:
    blocks: Sequence[Block] = [Text(message.content)] if isinstance(message.content, str) else message.content
    said: dict[str, Any] = {"role": "assistant", "content": ""}
    calls = []
    for block in blocks:
        match block:
            case Text():
                said["content"] += block.text
            case Thinking():
                said["reasoning_content"] = said.get("reasoning_content", "") + block.thinking
            case ToolUse():
                bounds.check_free(block.input, "messages")
                function = {"name": block.name, "arguments": block.input}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                raise bad("messages: results of tools belong into a user's message.", "messages")
    return said | ({"tool_calls": calls} if calls else {})


def _tools(asked: CountRequest) -> Tools:
    choice = asked.tool_choice or ToolChoice("auto")
    if choice.type == "none" or not asked.tools:
        if choice.type in ("any", "tool"):
            raise bad("tool_choice asks for a tool, and tools names none.", "tool_choice")
        return Tools()
    for tool in asked.tools:
        bounds.check_free(tool.input_schema, "tools")
    offered = tuple(Tool(one.name, one.description, one.input_schema, bool(one.strict)) for one in asked.tools)
    named = choice.name if choice.type == "tool" else None
    if choice.type == "tool" and named not in {tool.name for tool in offered}:
        raise bad("tool_choice names a tool that is not among tools.", "tool_choice")
    must = choice.type in ("any", "tool")
    return Tools(offered, must, named, parallel=not choice.disable_parallel_tool_use)


def _grammar(asked: CountRequest) -> Grammar | None:
    wanted = asked.output_config.format if asked.output_config else None
    return schema_grammar(wanted.schema, "output_config") if wanted else None


DIALECT = Dialect(
    Operation(
        "/v1/messages",
        "POST",
        "Answer a conversation (Anthropic's shape)",
        {200: Answer(reply.Message)},
        reply.Error,
        MESSAGES,
        reply.Event,
    ),
    parse,
    reply.error_body,
)
COUNT_TOKENS = Dialect(
    Operation(
        "/v1/messages/count_tokens",
        "POST",
        "How many tokens a conversation is",
        {200: Answer(reply.Count)},
        reply.Error,
        COUNT,
    ),
    parse_count,
    reply.error_body,
)
