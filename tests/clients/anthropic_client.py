"""Scenarios of the official anthropic client. Answers are validated strictly."""

from __future__ import annotations

import anthropic
from common import HELLO, MODEL, WEATHER, play, raises, url

client = anthropic.Anthropic(
    base_url=url(), api_key="none", max_retries=0, timeout=300, _strict_response_validation=True
)
# newer versions of the client know no temperature
OPTIONS = {"model": MODEL, "messages": HELLO, "max_tokens": 16, "extra_body": {"temperature": 0}}
TOOLS = [{"name": "weather", "description": WEATHER["description"], "input_schema": WEATHER["parameters"]}]


def message() -> None:
    answer = client.messages.create(**OPTIONS, system="You are terse.")
    assert answer.content[0].text and answer.stop_reason in ("end_turn", "max_tokens") and answer.usage.output_tokens


def stop_sequence() -> None:
    answer = client.messages.create(**OPTIONS, stop_sequences=["Paris"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "Paris")


def stream() -> None:
    with client.messages.stream(**OPTIONS) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert final.content[0].text == text == client.messages.create(**OPTIONS).content[0].text
    kinds = [event.type for event in client.messages.create(**OPTIONS, stream=True)]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]


def count_tokens() -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens
    usage = client.messages.create(**OPTIONS).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def tools() -> None:
    answer = client.messages.create(**{**OPTIONS, "max_tokens": 200}, tools=TOOLS, tool_choice={"type": "any"})
    call = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use" and call.name == "weather" and set(call.input) == {"city"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    said = [*HELLO, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    assert client.messages.create(**{**OPTIONS, "messages": said}, tools=TOOLS).content


def tools_streamed() -> None:
    with client.messages.stream(**{**OPTIONS, "max_tokens": 200}, tools=TOOLS, tool_choice={"type": "any"}) as events:
        final = events.get_final_message()
    assert set(next(block for block in final.content if block.type == "tool_use").input) == {"city"}


def errors() -> None:
    raises(anthropic.NotFoundError, lambda: client.messages.create(**{**OPTIONS, "model": "nobody"}))
    error = raises(anthropic.BadRequestError, lambda: client.messages.create(**{**OPTIONS, "extra_body": {"what": 1}}))
    assert error.body["error"]["type"] == "invalid_request_error"
    image = [{"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}]
    said = [{"role": "user", "content": image}]
    raises(anthropic.BadRequestError, lambda: client.messages.create(**{**OPTIONS, "messages": said}))


print(f"anthropic {anthropic.__version__}")
play(message, stop_sequence, stream, count_tokens, errors, tools, tools_streamed)
