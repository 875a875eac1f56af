"""OpenAI's /v1/responses, what is asked: bodies to `Turn`, a call that continues an earlier one; see `responses_reply`
for what is answered. Decides how a feature looks on the wire and nothing about how it works.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from headrace.core.types import Grammar
from headrace.gateway import bounds, shapes
from headrace.gateway.bounds import Body
from headrace.gateway.chain import Call, Chat, Tool, Tools
from headrace.gateway.dialects import responses_reply as reply
from headrace.gateway.dialects.shared import ANY_OBJECT, sampling, schema_grammar
from headrace.gateway.edge import Context, Dialect
from headrace.gateway.errors import bad
from headrace.gateway.openapi import Answer, Operation
from headrace.gateway.replies import error_body
from headrace.gateway.turns import Turn

IGNORED = frozenset(
    "user service_tier safety_identifier prompt_cache_key prompt_cache_retention stream_options".split()
)
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "conversation": (),
    "context_management": ([],),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "include": ([],),
}

Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class Part(Struct, forbid_unknown_fields=True):
    """A piece of a message. What is given back may hold what was answered."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str = ""
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None


Parts = Annotated[list[Part], Meta(max_length=bounds.Parts)]


class Item(Struct, forbid_unknown_fields=True):
    """A message, a call of a tool, its result, or reasoning; which, `type` says."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | Parts | None = None
    call_id: bounds.CallId | None = None
    name: bounds.ToolName | None = None
    arguments: bounds.Arguments | None = None
    output: str | Parts | None = None
    summary: Parts | None = None
    encrypted_content: None = None
    id: str | None = None
    status: Any = None
    phase: Any = None
    namespace: None = None


class InputTool(Struct, forbid_unknown_fields=True):
    name: bounds.ToolName
    type: Literal["function"] = "function"
    description: bounds.ToolText | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    name: bounds.ToolName


class Format(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: bounds.SchemaName | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(Struct, forbid_unknown_fields=True):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Struct, forbid_unknown_fields=True):
    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto"] | None = None
    generate_summary: None = None


class ResponseRequest(Struct, kw_only=True):
    model: bounds.Name | None = None
    input: str | Annotated[list[Item], Meta(min_length=1, max_length=bounds.Messages)]
    instructions: str | None = None
    previous_response_id: Annotated[str, Meta(max_length=128)] | None = None
    store: bool | None = None
    stream: bool | None = None
    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    max_output_tokens: Annotated[int, Meta(ge=1, le=bounds.MAX_TOKEN_ID)] | None = None
    tools: Annotated[list[InputTool], Meta(max_length=bounds.Tools)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    metadata: Metadata | None = None


BODY = Body(ResponseRequest, IGNORED, REFUSED)


def parse(body: bytes, context: Context) -> tuple[Turn, reply.Reply]:
    """Raises Refused."""
    asked = BODY.decode(body)
    context = context.of(asked.model)
    tools = _tools(asked)
    said = tuple(_messages(asked.input))
    head = ({"role": "system", "content": asked.instructions},) if asked.instructions else ()
    effort = asked.reasoning.effort if asked.reasoning else None
    options = {} if effort is None else {"enable_thinking": effort != "none"}
    call = Call(
        id=f"resp_{secrets.token_hex(24)}",
        asked=Chat((*head, *said), options, tools),
        sampling=sampling(temperature=asked.temperature, top_p=asked.top_p),
        max_new_tokens=asked.max_output_tokens,
        grammar=_grammar(asked.text.format if asked.text else None),
        model=context.model,
        tenant=context.tenant,
        client_id=context.client_id,
    )
    store = asked.store is not False and context.stores
    if asked.store and not store:
        raise bad("store: this server has no state directory to keep responses in.", "store")
    answer = reply.Reply(_opening(asked, call, context, store), bool(asked.stream))
    return Turn(call, said, asked.previous_response_id, answer if store else None), answer


def _opening(asked: ResponseRequest, call: Call, context: Context, store: bool) -> reply.Response:
    """The response before anything is answered: what was asked, repeated."""
    chosen: Any = asked.tool_choice or "auto"
    text = asked.text or TextOptions()
    return reply.Response(
        id=call.id,
        model=context.model,
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata or {},
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        previous_response_id=asked.previous_response_id,
        reasoning=reply.ReasoningShown(asked.reasoning.effort if asked.reasoning else None),
        store=store,
        temperature=call.sampling.temperature,
        text=reply.TextShown(_shown(text.format or Format())),
        tool_choice=chosen if isinstance(chosen, str) else msgspec.to_builtins(chosen),
        tools=[reply.ToolShown(one.name, one.parameters, one.strict, one.description) for one in asked.tools or ()],
        top_p=call.sampling.top_p,
    )


def _shown(format: Format) -> dict[str, Any]:
    return {key: value for key, value in msgspec.to_builtins(format).items() if value is not None}


def _grammar(format: Format | None) -> Grammar | None:
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return ANY_OBJECT
    if format.schema is None:
        raise bad("text.format: a json_schema needs a schema.", "text")
    return schema_grammar(format.schema, "text")


def _tools(asked: ResponseRequest) -> Tools:
    choice = asked.tool_choice or "auto"
    named = choice.name if isinstance(choice, NamedTool) else None
    must = named is not None or choice == "required"
    if must and named not in {None, *(tool.name for tool in asked.tools or ())}:
        raise bad("tool_choice names a tool that is not among tools.", "tool_choice")
    if must and not asked.tools:
        raise bad("tool_choice asks for a tool, and tools names none.", "tool_choice")
    for tool in asked.tools or ():
        bounds.check_free(tool.parameters, "tools")
    offered = tuple(
        Tool(one.name, one.description or "", one.parameters or {}, bool(one.strict)) for one in asked.tools or ()
    )
    return Tools() if choice == "none" else Tools(offered, must, named, asked.parallel_tool_calls is not False)


def _messages(given: str | Sequence[Item]) -> Iterable[Mapping[str, Any]]:
    """Items as messages: calls and reasoning that follow each other belong to one message of the assistant."""
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    open_: dict[str, Any] | None = None  # of the assistant, and more of it may follow
    for item in given:
        if item.type in ("function_call", "reasoning") or (item.type == "message" and item.role == "assistant"):
            if open_ is None or (item.type == "message" and "tool_calls" in open_):
                if open_:
                    yield open_
                open_ = {"role": "assistant", "content": ""}
            _add(open_, item)
            continue
        if open_:
            yield open_
            open_ = None
        yield _other(item)
    if open_:
        yield open_


def _add(message: dict[str, Any], item: Item) -> None:
    if item.type == "message":
        message["content"] += _text(item.content)
    elif item.type == "reasoning":
        message["reasoning_content"] = message.get("reasoning_content", "") + _text(item.content or item.summary)
    else:
        if item.call_id is None or item.name is None:
            raise bad("input: a function_call has a call_id, a name and arguments.", "input")
        function = {"name": item.name, "arguments": _arguments(item.arguments or "{}")}
        message.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _other(item: Item) -> Mapping[str, Any]:
    if item.type == "function_call_output":
        if item.call_id is None:
            raise bad("input: a function_call_output has a call_id.", "input")
        return {"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}
    if item.role is None:
        raise bad("input: a message has a role.", "input")
    return {"role": "system" if item.role == "developer" else item.role, "content": _text(item.content)}


def _text(content: str | Sequence[Part] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.refusal or part.text for part in content)


def _arguments(text: str) -> Any:
    """As a mapping, or as they are where they are no JSON object."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return text
    bounds.check_free(value, "input")
    return value if isinstance(value, dict) else text


DIALECT = Dialect(
    Operation(
        "/v1/responses",
        "POST",
        "Answer a conversation that the server may remember",
        {200: Answer(reply.Response)},
        shapes.Error,
        BODY,
        reply.Event,
    ),
    parse,
    error_body,
)
