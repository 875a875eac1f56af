"""Tools that a model may call and reasoning that it may show, as the official client reads them off a socket. The
service answers by rote, so every letter is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
from gateway_rig import EOS, TEMPLATE, RoteService, Running, ids_of, make_text, running

THINKING = TEMPLATE + "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}{# </think> #}"
HELLO = [{"role": "user", "content": "hello"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": CITY}} for name in ("weather", "news")]
ROME = '{"city": "Rome \\u2600 água"}'


def written(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>' for name, arguments in calls
    )


@dataclass
class Up:
    server: Running
    client: openai.OpenAI

    def says(self, text: str) -> None:
        self.server.service.answer = (*ids_of(text), EOS)

    def chat(self, **options: Any) -> Any:
        self.server.service.started.clear()
        return self.client.chat.completions.create(model="rote", messages=HELLO, max_tokens=400, **options)


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with (
        running(RoteService(), make_text(THINKING)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Up(server, client)


def test_text_and_calls_of_one_answer(up: Up) -> None:
    up.says("Let me see.\n" + written(("weather", ROME), ("news", ROME)))
    choice = up.chat(tools=TOOLS).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    assert [(call.function.name, call.function.arguments) for call in choice.message.tool_calls] == [
        ("weather", ROME),
        ("news", ROME),
    ]
    assert len({call.id for call in choice.message.tool_calls}) == 2


def test_streamed_calls_are_framed_as_openai_frames_them(up: Up) -> None:
    up.says("Let me see.\n" + written(("weather", ROME), ("news", ROME)))
    chunks = list(up.chat(tools=TOOLS, tool_choice="auto", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Let me see."
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)
    for index, name in enumerate(("weather", "news")):
        first, *rest = [delta for delta in deltas if delta.index == index]
        assert (bool(first.id), first.type, first.function.name) == (True, "function", name)
        assert rest and not any(delta.id or delta.type or delta.function.name for delta in rest)
        assert "".join(delta.function.arguments or "" for delta in (first, *rest)) == ROME
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["tool_calls"]
    assert chunks[-1].choices[0].finish_reason


def test_the_stream_helper_of_the_client_puts_calls_together(up: Up) -> None:
    up.says(written(("weather", ROME)))
    with up.client.chat.completions.stream(model="rote", messages=HELLO, max_tokens=400, tools=TOOLS) as events:
        kinds = [event.type for event in events]
        message = events.get_final_completion().choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == json.loads(ROME)
    assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds


def test_without_parallel_calls_the_answer_ends_with_the_first(up: Up) -> None:
    up.says(written(("weather", ROME), ("news", ROME)))
    choice = up.chat(tools=TOOLS, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]
    assert choice.finish_reason == "tool_calls" and up.server.service.aborted[-1] == up.server.service.started[0].id


def test_with_none_the_same_words_are_text(up: Up) -> None:
    said = written(("weather", ROME))
    up.says(said)
    choice = up.chat(tools=TOOLS, tool_choice="none").choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (said, "stop", None)


def test_what_is_no_tool_of_ours_is_text(up: Up) -> None:
    up.says(said := written(("rm", ROME)))
    choice = up.chat(tools=TOOLS).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (said, "stop", None)


def test_a_call_that_is_cut_says_length(up: Up) -> None:
    up.says(written(("weather", ROME)))
    up.server.service.answer = up.server.service.answer[:-8]  # and over again, to the limit
    choice = up.chat(tools=TOOLS, stop="no such text").choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls


def test_calls_and_results_go_back_into_the_conversation(up: Up) -> None:
    up.says(written(("weather", ROME)))
    message = up.chat(tools=TOOLS).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    said = [*HELLO, message.model_dump(exclude_none=True), result]
    up.says("It is sunny.")
    answer = up.client.chat.completions.create(model="rote", messages=said, tools=TOOLS, max_tokens=400)
    assert answer.choices[0].message.content == "It is sunny."
    assert up.server.service.started[-1].prompt_tokens > up.server.service.started[0].prompt_tokens


@pytest.mark.parametrize("begun", [False, True])
def test_reasoning_is_a_field_of_its_own(up: Up, begun: bool) -> None:
    up.says(("" if begun else "<think>\n") + "the wheel turns\n</think>\n\nYes.")
    options = {"extra_body": {"chat_template_kwargs": {"enable_thinking": begun}}}
    answer = up.chat(**options)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("the wheel turns", "Yes.")
    deltas = [chunk.choices[0].delta for chunk in up.chat(**options, stream=True)]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "the wheel turns"
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < answer.usage.completion_tokens


def test_calls_inside_the_reasoning_are_thoughts(up: Up) -> None:
    call = written(("weather", ROME))
    up.says(f"<think>{call}</think>{call}")
    message = up.chat(tools=TOOLS).choices[0].message
    assert message.reasoning_content == call and len(message.tool_calls) == 1
