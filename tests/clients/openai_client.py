"""Scenarios of the official openai client, for all its major versions. Answers are validated strictly."""

from __future__ import annotations

import io
import json
import time

import openai
from common import EMBEDDING, HELLO, MODEL, PERSON, WEATHER, play, raises, url

client = openai.OpenAI(
    base_url=f"{url()}/v1", api_key="none", max_retries=0, timeout=300, _strict_response_validation=True
)
lenient = openai.OpenAI(base_url=f"{url()}/v1", api_key="none", max_retries=0, timeout=300)
OPTIONS = {"model": MODEL, "messages": HELLO, "max_tokens": 16, "temperature": 0}
TOOLS = [{"type": "function", "function": WEATHER}]


def models() -> None:
    assert {model.id for model in client.models.list()} == {MODEL, EMBEDDING}
    assert client.models.retrieve(MODEL).id == MODEL


def chat() -> None:
    answer = client.chat.completions.create(**OPTIONS)
    assert "Paris" in answer.choices[0].message.content and answer.usage.total_tokens


def stream() -> None:
    chunks = list(client.chat.completions.create(**OPTIONS, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == client.chat.completions.create(**OPTIONS).choices[0].message.content and chunks[-1].usage


def completion() -> None:
    answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=4, logprobs=2)
    assert answer.choices[0].text and len(answer.choices[0].logprobs.tokens) == 4
    # with echo, nothing predicts the first token: null, as at OpenAI, which the client's strict types do not foresee
    answer = lenient.completions.create(model=MODEL, prompt="Once", max_tokens=4, logprobs=2, echo=True)
    assert answer.choices[0].text.startswith("Once") and answer.choices[0].logprobs.token_logprobs[0] is None


def tools() -> None:
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = client.chat.completions.create(**{**OPTIONS, "max_tokens": 200}, tools=TOOLS, tool_choice=choice)
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.name == "weather" and set(json.loads(call.function.arguments)) == {"city"}
    said = [*HELLO, answer.choices[0].message.model_dump(exclude_none=True)]
    said += [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in answer.choices[0].message.tool_calls
    ]
    assert client.chat.completions.create(**{**OPTIONS, "messages": said}, tools=TOOLS).choices[0].finish_reason


def tools_streamed() -> None:
    chunks = list(
        client.chat.completions.create(
            **{**OPTIONS, "max_tokens": 200}, tools=TOOLS, tool_choice="required", stream=True
        )
    )
    deltas = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
    first = [delta for delta in deltas if delta.index == 0]
    assert first[0].id and first[0].function.name == "weather" and not any(delta.id for delta in first[1:])
    json.loads("".join(delta.function.arguments or "" for delta in first))


def structured() -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(**{**OPTIONS, "max_tokens": 200}, response_format=wanted)
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "age"}


def embeddings() -> None:
    # in base64, which the client decodes only after its strict types have refused it
    whole = lenient.embeddings.create(model=EMBEDDING, input=["a mill", "a wheel"])
    plain = client.embeddings.create(model=EMBEDDING, input=["a mill", "a wheel"], encoding_format="float")
    for one, other in zip(whole.data, plain.data, strict=True):
        assert max(abs(a - b) for a, b in zip(one.embedding, other.embedding, strict=True)) < 1e-6
    assert len(lenient.embeddings.create(model=EMBEDDING, input="a", dimensions=64).data[0].embedding) == 64


def responses() -> None:
    first = client.responses.create(model=MODEL, input="My name is Ada.", max_output_tokens=8)
    second = client.responses.create(
        model=MODEL, input="What is my name?", previous_response_id=first.id, max_output_tokens=8
    )
    assert second.usage.input_tokens > first.usage.input_tokens and second.output_text
    assert client.responses.retrieve(first.id).output_text == first.output_text
    assert [item.role for item in client.responses.input_items.list(second.id)] == ["user"]
    client.responses.delete(first.id)
    raises(openai.NotFoundError, lambda: client.responses.retrieve(first.id))


def responses_streamed() -> None:
    events = list(client.responses.create(model=MODEL, input="Hello", max_output_tokens=8, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.in_progress", "response.output_item.added"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].response.output_text == text


def responses_tools() -> None:
    tool = {"type": "function", "strict": True, **WEATHER}
    answer = client.responses.create(
        model=MODEL, input="Weather in Rome?", tools=[tool], tool_choice="required", max_output_tokens=200
    )
    call = next(item for item in answer.output if item.type == "function_call")
    assert call.name == "weather" and set(json.loads(call.arguments)) == {"city"}


def batches() -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 4}
    lines = [{"custom_id": f"l{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(4)]
    lines.append({**lines[0], "custom_id": "bad", "body": {"messages": []}})
    content = io.BytesIO(b"\n".join(json.dumps(line).encode() for line in lines))
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    assert file.id in {one.id for one in client.files.list()}
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    while batch.status not in ("completed", "failed"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 5, 4, 1)
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert sorted(one["custom_id"] for one in answers) == ["l0", "l1", "l2", "l3"]
    errors = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert [one["response"]["status_code"] for one in errors] == [400]
    assert batch.id in {one.id for one in client.batches.list()} and client.files.delete(file.id).deleted


def errors() -> None:
    raises(openai.NotFoundError, lambda: client.chat.completions.create(**{**OPTIONS, "model": "nobody"}))
    raises(openai.BadRequestError, lambda: client.chat.completions.create(**OPTIONS, extra_body={"what": 1}))
    raises(openai.BadRequestError, lambda: client.embeddings.create(model=EMBEDDING, input=""))
    raises(openai.NotFoundError, lambda: client.files.retrieve("../../etc/passwd"))
    raises(openai.BadRequestError, lambda: client.responses.create(model=MODEL, input="a", previous_response_id="no"))


print(f"openai {openai.__version__}")
ALL = [models, chat, stream, completion, embeddings, responses, responses_streamed, batches, errors]
play(*ALL, tools, tools_streamed, structured, responses_tools)
