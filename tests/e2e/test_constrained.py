"""What a client demands of an answer, over a real socket with the official client: a model of noise obeys, so that only
the masks can be right. The vocabulary is SmolLM2's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
import tiny_chat

from headrace.cli.assemble import Phases, open_model, text_of
from headrace.gateway.text import Text

HELLO = [{"role": "user", "content": "Weather in Rome?"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NONE: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": CITY}},
    {"type": "function", "function": {"name": "now", "parameters": NONE}},
]
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["river", "canal"]},
        "widths": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 9}, "maxItems": 3},
        "mill": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"wheel": {"type": "boolean"}},
                                              "required": ["wheel"], "additionalProperties": False}]},
    },
    "required": ["kind", "widths", "mill"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def text() -> Text:
    return text_of(open_model("smollm2", Phases()))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("model")
    tiny_chat.write(folder / "tiny", open_model("smollm2", Phases()).tokenizer_json)
    flags = ("--embedding-model", "none", "--state-dir", str(folder / "state"), "--kv-memory", "32MiB")
    with (
        tiny_chat.serving(folder / "tiny", *flags) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made,
    ):
        yield made


def chat(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 200} | options)


def calls_of(chunks: list[Any]) -> list[list[Any]]:
    """The deltas of each call of a stream, in the order of their index."""
    found: list[list[Any]] = []
    for chunk in chunks:
        for delta in chunk.choices[0].delta.tool_calls or ():
            if delta.index == len(found):
                found.append([])
            found[delta.index].append(delta)
    return found


def check_call(call: Any) -> None:
    jsonschema.validate(json.loads(call.function.arguments), CITY if call.function.name == "weather" else NONE)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("parallel", [True, False])
def test_required_calls_are_made_and_follow_their_schemas(client: openai.OpenAI, seed: int, parallel: bool) -> None:
    options = {"tools": TOOLS, "tool_choice": "required", "seed": seed, "parallel_tool_calls": parallel}
    choice = chat(client, **options, max_tokens=400).choices[0]
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    calls = choice.message.tool_calls
    assert 1 <= len(calls) <= (8 if parallel else 1) and len({call.id for call in calls}) == len(calls)
    for call in calls:
        check_call(call)


def test_a_named_tool_is_called(client: openai.OpenAI) -> None:
    for name in ("now", "weather"):
        named = {"type": "function", "function": {"name": name}}
        choice = chat(client, tools=TOOLS, tool_choice=named).choices[0]
        (call,) = choice.message.tool_calls
        assert call.function.name == name and choice.finish_reason == "tool_calls"
        check_call(call)


def test_streamed_calls_say_id_type_and_name_once_and_arguments_in_pieces(client: openai.OpenAI) -> None:
    options = {"tools": TOOLS, "tool_choice": "required", "temperature": 0, "max_tokens": 400}
    whole = chat(client, **options).choices[0].message.tool_calls
    chunks = list(chat(client, **options, stream=True))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert not any(chunk.choices[0].delta.content for chunk in chunks)
    streamed = calls_of(chunks)
    assert len(streamed) == len(whole)
    for (first, *rest), call in zip(streamed, whole, strict=True):
        assert first.id and first.type == "function" and first.function.name == call.function.name
        assert not any(delta.id or delta.type or delta.function.name for delta in rest)
        assert "".join(delta.function.arguments or "" for delta in (first, *rest)) == call.function.arguments


def test_n_choices_are_held_each_for_itself(client: openai.OpenAI) -> None:
    answer = chat(client, tools=TOOLS, tool_choice="required", n=3, seed=1, max_tokens=400)
    assert len({choice.message.tool_calls[0].function.arguments for choice in answer.choices}) > 1
    for choice in answer.choices:
        for call in choice.message.tool_calls:
            check_call(call)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_is_followed_and_the_answer_ends(client: openai.OpenAI, stream: bool) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "water", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=wanted, max_tokens=400, seed=2, stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1].choices[0]
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0]
    assert reason.finish_reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMA)


def test_an_object_is_an_object(client: openai.OpenAI, text: Text) -> None:
    # noise does not find the end of what may go on for ever, so it is drawn towards whatever closes something
    closing = {str(token): 100 for mark in ('"', '"}', "}", "]", "]}") for token in text.plain_ids(mark)}
    answer = chat(client, response_format={"type": "json_object"}, logit_bias=closing, max_tokens=400)
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


REGEX = r"[0-9]{4}-(0[1-9]|1[0-2])"
LARK = 'start: "mill" ("-" /[a-c]/){2}'


@pytest.mark.parametrize(
    ("body", "pattern"),
    [
        ({"response_format": {"type": "regex", "regex": REGEX}}, REGEX),
        ({"guided_regex": REGEX}, REGEX),
        ({"structured_outputs": {"regex": REGEX}}, REGEX),
        ({"response_format": {"type": "choice", "choice": ["Yes.", "no", "ja"]}}, r"Yes\.|no|ja"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"response_format": {"type": "grammar", "grammar": LARK}}, "mill(-[a-c]){2}"),
        ({"guided_json": {"type": "integer", "minimum": 10, "maximum": 19}}, "1[0-9]"),
    ],
)
def test_regex_choice_and_grammar_in_chats_and_completions(client: openai.OpenAI, body: Any, pattern: str) -> None:
    for seed in (1, 2):
        text = chat(client, extra_body=body, seed=seed).choices[0].message.content
        assert re.fullmatch(pattern, text)
        answer = client.completions.create(model="tiny", prompt="The ", max_tokens=40, extra_body=body, seed=seed)
        assert re.fullmatch(pattern, answer.choices[0].text) and answer.choices[0].finish_reason == "stop"


def test_what_is_held_has_logprobs_too(client: openai.OpenAI) -> None:
    choice = chat(client, extra_body={"guided_choice": ["left", "right"]}, logprobs=True, top_logprobs=2).choices[0]
    assert b"".join(bytes(one.bytes) for one in choice.logprobs.content).decode().startswith(choice.message.content)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [0, 5])
def test_thinking_and_answer_have_budgets_of_their_own(
    client: openai.OpenAI, text: Text, budget: int, stream: bool
) -> None:
    body = {"thinking_budget": budget, "answer_budget": 7, "chat_template_kwargs": {"enable_thinking": True}}
    options = {"extra_body": body, "temperature": 0, "logit_bias": dict.fromkeys(map(str, text.eos_token_ids), -100)}
    whole = chat(client, **options)
    message, usage = whole.choices[0].message, whole.usage
    reasoning, said = message.reasoning_content if budget else "", message.content
    closing = len(text.plain_ids("\n</think>\n\n"))  # is written for the model, and counts as reasoning
    assert usage.completion_tokens_details.reasoning_tokens == budget + closing
    assert usage.completion_tokens == budget + closing + 7
    assert whole.choices[0].finish_reason == "length" and said and bool(reasoning) == bool(budget)
    assert "think>" not in said + reasoning
    if stream:
        deltas = [chunk.choices[0].delta for chunk in chat(client, **options, stream=True)]
        assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == reasoning
        assert "".join(delta.content or "" for delta in deltas) == said


def test_reasoning_comes_before_the_calls_and_the_schema(client: openai.OpenAI) -> None:
    body = {"thinking_budget": 6, "chat_template_kwargs": {"enable_thinking": True}}
    message = chat(client, tools=TOOLS, tool_choice="required", extra_body=body, max_tokens=400).choices[0].message
    assert message.reasoning_content and message.tool_calls
    for call in message.tool_calls:
        check_call(call)
    wanted = {"type": "json_schema", "json_schema": {"name": "water", "schema": SCHEMA}}
    message = chat(client, response_format=wanted, extra_body=body, max_tokens=400).choices[0].message
    jsonschema.validate(json.loads(message.content), SCHEMA)
    assert message.reasoning_content
