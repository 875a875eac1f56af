"""The OpenAI dialect, what is asked: bodies of /v1/chat/completions and /v1/completions to `Call`; see `replies` for
what is answered. Decides how a feature looks on the wire and nothing about how it works. No state.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from headrace.core.types import Grammar, Sampling
from headrace.gateway import bounds, shapes
from headrace.gateway.bounds import Body
from headrace.gateway.chain import Call, Chat, Event, Prompt, Tool, Tools
from headrace.gateway.edge import Context, Dialect, Reply
from headrace.gateway.errors import bad
from headrace.gateway.openapi import Answer, Operation
from headrace.gateway.replies import ChatReply, CompletionReply, Frame, error_body
from headrace.gateway.speech.demand import choice, json_schema


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; not needed for correctness


class TemplateOptions(Struct, forbid_unknown_fields=True):
    """Template variables a client may set. No others: a template's variables are its internals."""

    enable_thinking: bool | None = None


class TextPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    text: str


class RefusalPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    refusal: str


Content = str | Annotated[list[TextPart | RefusalPart], Meta(min_length=1, max_length=bounds.Parts)]


class System(Struct, forbid_unknown_fields=True, tag_field="role", tag="system"):
    content: Content
    name: bounds.Name | None = None


class Developer(System, tag_field="role", tag="developer"):
    pass


class User(System, tag_field="role", tag="user"):
    pass


class CalledFunction(Struct, forbid_unknown_fields=True):
    name: bounds.ToolName
    arguments: bounds.Arguments


class Called(Struct, forbid_unknown_fields=True):
    id: bounds.CallId
    function: CalledFunction
    type: Literal["function"] = "function"
    index: int | None = None  # some clients send back what they were streamed


class Assistant(Struct, forbid_unknown_fields=True, tag_field="role", tag="assistant"):
    """What a client may send back includes what it was given, with the fields we leave null."""

    content: Content | None = None
    name: bounds.Name | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[Called], Meta(max_length=bounds.Calls)] | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolResult(Struct, forbid_unknown_fields=True, tag_field="role", tag="tool"):
    content: Content
    tool_call_id: bounds.CallId
    name: bounds.Name | None = None


Message = System | Developer | User | Assistant | ToolResult


class Function(Struct, forbid_unknown_fields=True):
    name: bounds.ToolName
    description: bounds.ToolText | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema
    strict: bool | None = None


class FunctionTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: Function


class FunctionName(Struct, forbid_unknown_fields=True):
    name: bounds.ToolName


class NamedTool(Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionName


class TextFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    pass


class NamedSchema(Struct, forbid_unknown_fields=True):
    name: bounds.SchemaName
    schema: dict[str, Any] | None = None
    description: bounds.ToolText | None = None
    strict: bool | None = None


class JsonSchemaFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    json_schema: NamedSchema


class RegexFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="regex"):
    regex: bounds.RegexText


class GrammarFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="grammar"):
    grammar: bounds.GrammarText  # in Lark's notation


class ChoiceFormat(Struct, forbid_unknown_fields=True, tag_field="type", tag="choice"):
    choice: bounds.ChoiceTexts


Format = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat | GrammarFormat | ChoiceFormat


class Guided(Struct, forbid_unknown_fields=True):
    """vLLM's names for the same."""

    json: dict[str, Any] | str | None = None
    regex: bounds.RegexText | None = None
    choice: bounds.ChoiceTexts | None = None
    grammar: bounds.GrammarText | None = None


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
    response_format: Format | None = None
    structured_outputs: Guided | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: bounds.RegexText | None = None
    guided_choice: bounds.ChoiceTexts | None = None
    guided_grammar: bounds.GrammarText | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    keep_alive: bounds.KeepAlive | None = None


class ChatRequest(_Common, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=bounds.Messages)]
    max_completion_tokens: bounds.MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: bounds.TopLogprobs | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=bounds.Tools)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    thinking_budget: bounds.ThinkingTokens | None = None
    answer_budget: bounds.AnswerTokens | None = None
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
    context = context.of(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad("top_logprobs needs logprobs to be true.", "top_logprobs")
    max_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if max_tokens == 0:
        raise bad("max_tokens must be at least 1.", "max_tokens")
    options = msgspec.structs.asdict(asked.chat_template_kwargs) if asked.chat_template_kwargs else {}
    if asked.reasoning_effort is not None:
        options = {"enable_thinking": asked.reasoning_effort != "none"} | options
    given = {key: value for key, value in options.items() if value is not None}
    chat = Chat(tuple(map(_message, asked.messages)), given, _tools(asked))
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    call = _call("chatcmpl", asked, context, chat, _sampling(asked, logprobs), max_tokens)
    call = replace(call, thinking_tokens=_thinking_tokens(asked), answer_tokens=asked.answer_budget)
    return call, ChatReply(_frame(call, asked, context, "chat.completion"), context.text)


def parse_completion(body: bytes, context: Context) -> tuple[Call, Reply[Event]]:
    """Raises Refused."""
    asked = COMPLETION.decode(body)
    context = context.of(asked.model)
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
    plain: dict[str, Any] = {"role": _ROLES[type(message)], "content": _text_of(message.content)}
    if message.name:
        plain["name"] = message.name
    if isinstance(message, ToolResult):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, Assistant):
        if message.reasoning_content:
            plain["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            plain["tool_calls"] = [_called(call) for call in message.tool_calls]
        elif message.content is None:
            raise bad("An assistant's message needs content or tool_calls.", "messages")
    return plain


_ROLES = {System: "system", Developer: "system", User: "user", Assistant: "assistant", ToolResult: "tool"}


def _text_of(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def _called(call: Called) -> Mapping[str, Any]:
    """Templates want the arguments as a mapping; what is none stays the text it is."""
    arguments: Any = call.function.arguments
    try:
        parsed = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        parsed = None
    if isinstance(parsed, dict):
        bounds.check_free(parsed, "messages")
        arguments = parsed
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _tools(asked: ChatRequest) -> Tools:
    """What may be called; nothing if the choice is none."""
    choice = asked.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    offered = tuple(_tool(tool.function) for tool in asked.tools or ())
    names = [tool.name for tool in offered]
    if len(set(names)) < len(names):
        raise bad("tools: two of them have the same name.", "tools")
    must = named is not None or choice == "required"
    if must and not offered:
        raise bad("tool_choice asks for a call, but there are no tools.", "tool_choice")
    if named is not None and named not in names:
        raise bad(f"tool_choice names {named!r}, which is not among the tools.", "tool_choice")
    if must and _grammar(asked) is not None:
        raise bad("The answer cannot be a tool call and follow a response_format as well.", "response_format")
    return Tools() if choice == "none" else Tools(offered, must, named, asked.parallel_tool_calls is not False)


def _tool(function: Function) -> Tool:
    parameters = function.parameters or {"type": "object", "properties": {}}
    bounds.check_free(parameters, "tools")
    if parameters.get("type", "object") != "object":
        raise bad(f"tools: the parameters of {function.name!r} are not the schema of an object.", "tools")
    return Tool(function.name, function.description or "", parameters, bool(function.strict))


_EFFORTS = {"minimal": 256, "low": 1024, "medium": 4096, "high": 16_384}  # xhigh is as long as it takes


def _thinking_tokens(asked: ChatRequest) -> int | None:
    return asked.thinking_budget if asked.thinking_budget is not None else _EFFORTS.get(asked.reasoning_effort or "")


def _grammar(asked: _Common) -> Grammar | None:
    """The one grammar of the answer, whatever its name. Raises Refused if there are several."""
    found = list(_grammars(asked))
    if len(found) > 1:
        raise bad("Ask for one response format only.", found[1][0])
    if not found:
        return None
    return found[0][1]


def _grammars(asked: _Common) -> Iterator[tuple[str, Grammar]]:
    match asked.response_format:
        case JsonObjectFormat():
            yield "response_format", json_schema({"type": "object"}, "response_format")
        case JsonSchemaFormat(json_schema=named):
            schema = {"type": "object"} if named.schema is None else named.schema
            yield "response_format", json_schema(schema, "response_format")
        case RegexFormat(regex=regex):
            yield "response_format", Grammar("regex", regex)
        case GrammarFormat(grammar=grammar):
            yield "response_format", Grammar("lark", grammar)
        case ChoiceFormat(choice=texts):
            yield "response_format", choice(texts)
    for name in ("json", "regex", "choice", "grammar"):
        own, shared = getattr(asked, f"guided_{name}"), getattr(asked.structured_outputs, name, None)
        for param, value in ((f"guided_{name}", own), ("structured_outputs", shared)):
            if value is not None:
                yield param, _guided(name, value, param)


def _guided(name: str, value: Any, param: str) -> Grammar:
    match name:
        case "json":
            return json_schema(_decoded(value, param) if isinstance(value, str) else value, param)
        case "regex":
            return Grammar("regex", value)
        case "choice":
            return choice(value)
    return Grammar("lark", value)


def _decoded(text: str, param: str) -> Any:
    try:
        schema = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise bad(f"{param}: expected a JSON schema, as an object or as its text.", param)
    return schema


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
        grammar=_grammar(asked),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_token_ids=frozenset(asked.stop_token_ids or ()),
        ignore_eos=bool(asked.ignore_eos),
        model=context.model,
        tenant=context.tenant,
        cache_salt=asked.cache_salt or "",
        priority=asked.priority or 0,
        deadline_s=asked.deadline_s,
        client_id=context.client_id,
        keep_alive_s=bounds.keep_alive_s(asked.keep_alive),
    )


_TOO_LATE = Answer(shapes.Error, says="`deadline_s` has passed before the answer was complete")
DIALECTS: Sequence[Dialect[Call, Event]] = (
    Dialect(
        Operation(
            "/v1/chat/completions",
            "POST",
            "Answer a conversation",
            {200: Answer(shapes.ChatCompletion), 504: _TOO_LATE},
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
            {200: Answer(shapes.Completion), 504: _TOO_LATE},
            shapes.Error,
            COMPLETION,
            shapes.Completion,
        ),
        parse_completion,
        error_body,
    ),
)
