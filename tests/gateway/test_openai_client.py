"""The official client as the judge: every answer parses into its types, every error into its exceptions."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest
from gateway_rig import ANSWER, EOS, IM_START, RoteService, Running, ids_of, running

from headrace.core.types import InvalidRequest, Overloaded, Unavailable

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def module_server() -> Iterator[Running]:
    with running(RoteService()) as server:
        yield server


@pytest.fixture
def server(module_server: Running) -> Iterator[Running]:
    module_server.service.__init__()  # type: ignore[misc]
    yield module_server
    assert not module_server.service.open


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def chat(client: openai.OpenAI, **options):
    return client.chat.completions.create(**({"model": "rote", "messages": HELLO, "max_tokens": 20} | options))


def test_a_chat_answer_has_text_usage_and_reason(client):
    answer = chat(client)
    assert answer.choices[0].message.role == "assistant"
    assert (ANSWER * 2).startswith(answer.choices[0].message.content) and answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (20, 3)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20


def test_a_stop_token_ends_the_text_and_is_not_in_it(client, server):
    server.service.answer = (*ids_of("hi"), EOS)
    answer = chat(client)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hi", "stop")
    assert answer.usage.completion_tokens == len(ids_of("hi")) + 1


def test_ignore_eos_goes_on(client, server):
    server.service.answer = (*ids_of("hi"), EOS)
    answer = chat(client, max_tokens=6, extra_body={"ignore_eos": True})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hihi", "length")


def test_stop_token_ids_of_the_client(client, server):
    server.service.answer = (*ids_of("hi"), *ids_of("!"))
    answer = chat(client, extra_body={"stop_token_ids": list(ids_of("!"))})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hi", "stop")


def test_a_stop_string_cuts_and_stops_the_engine(client, server):
    answer = chat(client, stop=["wheel: ág", "never"], max_tokens=1000)
    assert answer.choices[0].message.content == "The headrace feeds the "
    assert answer.choices[0].finish_reason == "stop"
    assert server.service.aborted == [answer.id]
    assert answer.usage.completion_tokens == len(ids_of("The headrace feeds the wheel: água"))
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_streaming_gives_the_same_text_in_pieces(client):
    chunks = list(chat(client, stream=True, max_tokens=200, stream_options={"include_usage": True}))
    whole = chat(client, max_tokens=200)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and "\ufffd" not in text[:-1]
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_without_include_usage_no_chunk_has_usage(client):
    chunks = list(chat(client, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_n_choices_interleave_and_share_block_keys(client, server):
    chunks = list(chat(client, stream=True, n=3, max_tokens=10, seed=5, messages=[HELLO[0] | {"content": "a" * 90}]))
    order = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.content]
    assert sorted(set(order)) == [0, 1, 2] and order != sorted(order)
    assert sum(chunk.choices[0].finish_reason == "length" for chunk in chunks) == 3
    first, second, third = server.service.started
    assert first.block_keys == second.block_keys == third.block_keys and first.block_keys
    assert first.sampling.seed == 5 and len({request.sampling.seed for request in (first, second, third)}) == 3


def test_usage_of_n_choices_counts_the_prompt_once(client):
    one, three = chat(client, max_tokens=7).usage, chat(client, max_tokens=7, n=3).usage
    assert three.prompt_tokens == one.prompt_tokens and three.completion_tokens == 21


def test_chat_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=2, max_tokens=30)
    items = answer.choices[0].logprobs.content
    assert len(items) == 30 and all(len(item.top_logprobs) == 2 for item in items)
    assert b"".join(bytes(item.bytes) for item in items).startswith("The headrace feeds the wheel: água".encode())
    assert items[0].logprob == items[0].top_logprobs[0].logprob == -ids_of(ANSWER)[0] / 100


def test_streamed_logprobs_are_those_of_the_shown_text(client):
    chunks = list(chat(client, stream=True, logprobs=True, stop="wheel", max_tokens=50))
    shown = [item for chunk in chunks if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert b"".join(bytes(item.bytes) for item in shown).decode().startswith(text) and "wheel" not in text


def test_sampling_reaches_the_engine_unchanged(client, server):
    extra = {"top_k": 7, "min_p": 0.25, "repetition_penalty": 1.5, "cache_salt": "mine"}
    chat(client, temperature=0.5, top_p=0.9, presence_penalty=0.1, frequency_penalty=-0.2, seed=-3, extra_body=extra,
         logit_bias={"5": -100, "6": 1.5}, user="u", metadata={"a": "b"}, store=False)  # fmt: skip
    sampling = server.service.started[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.25)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, 0.1, -0.2)
    assert dict(sampling.logit_bias) == {5: -100, 6: 1.5} and sampling.seed == (1 << 63) - 3


def test_different_salts_share_nothing(client, server):
    for salt in ("a", "b", "a"):
        chat(client, messages=[HELLO[0] | {"content": "x" * 100}], extra_body={"cache_salt": salt})
    first, second, third = (set(request.block_keys) for request in server.service.started)
    assert first == third and not first & second


def test_text_parts_and_developer_messages(client, server):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    chat(client, messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    chat(client, messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}])
    assert server.service.started[0].prompt == server.service.started[1].prompt


def test_an_answer_can_be_sent_back(client):
    said = chat(client).choices[0].message
    assert chat(client, messages=[*HELLO, said.model_dump(), *HELLO]).choices


def test_max_completion_tokens_wins_and_the_default_is_the_rest_of_the_context(client, server):
    assert chat(client, max_tokens=9, max_completion_tokens=2).usage.completion_tokens == 2
    server.service.context_tokens = 60
    answer = client.chat.completions.create(model="rote", messages=HELLO)
    assert answer.usage.total_tokens == 60


@pytest.mark.parametrize("prompt", ["hello", ["hello"], list(ids_of("hello")), [list(ids_of("hello"))]])
def test_a_completion_takes_text_or_tokens(client, server, prompt):
    answer = client.completions.create(model="rote", prompt=prompt, max_tokens=3)
    assert server.service.started[0].prompt_ids() == ids_of("hello")
    assert ANSWER.startswith(answer.choices[0].text) and answer.choices[0].finish_reason == "length"


def test_special_tokens_of_a_raw_prompt_are_recognised(client, server):
    client.completions.create(model="rote", prompt="<|im_start|>a", max_tokens=1)
    assert server.service.started[0].prompt_ids()[0] == IM_START


def test_several_prompts_are_numbered_prompt_by_prompt(client, server):
    answer = client.completions.create(model="rote", prompt=["a", "bb"], n=2, max_tokens=1, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in answer.choices] == ["a", "a", "b", "b"]


def test_echo_with_logprobs_begins_with_the_prompt(client):
    answer = client.completions.create(model="rote", prompt="hello água 水", echo=True, logprobs=1, max_tokens=2)
    choice, prompt = answer.choices[0], ids_of("hello água 水")
    logs = choice.logprobs
    assert choice.text.startswith("hello água 水") and logs.token_logprobs[0] is None and logs.top_logprobs[0] is None
    assert logs.token_logprobs[1 : len(prompt)] == [-token / 100 for token in prompt[1:]]
    assert len(logs.tokens) == len(logs.text_offset) == len(logs.top_logprobs) == len(prompt) + 2
    for token, at in zip(logs.tokens, logs.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text[at:].startswith(token)


def test_echo_alone_answers_nothing(client):
    answer = client.completions.create(model="rote", prompt=list(ids_of("hello")), echo=True, logprobs=0, max_tokens=0)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == ("hello", 0)
    assert len(answer.choices[0].logprobs.tokens) == len(ids_of("hello"))


def test_streamed_echo_equals_the_whole_one(client):
    options = {"model": "rote", "prompt": "hello", "echo": True, "logprobs": 2, "max_tokens": 40, "stop": "more"}
    whole = client.completions.create(**options).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [token for chunk in chunks for token in chunk.logprobs.tokens] == whole.logprobs.tokens
    assert [at for chunk in chunks for at in chunk.logprobs.text_offset] == whole.logprobs.text_offset


def test_models(client):
    assert [model.id for model in client.models.list()] == ["rote"]
    assert client.models.retrieve("rote").owned_by == "headrace"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("other/model")
    assert raised.value.code == "model_not_found"


BAD = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 10**30}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stop": [""]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logit_bias": {"foo": 0}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5000": 1}}, None),
    ({"seed": 2**70}, "seed"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}]},
        "messages",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f!"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"extra_body": {"min_p": 1.5}}, "min_p"),
    ({"extra_body": {"best_off": 1}}, "best_off"),
    ({"extra_body": {"stop_token_ids": [-1]}}, "stop_token_ids"),
    ({"extra_body": {"chat_template_kwargs": {"tokenize": True}}}, "chat_template_kwargs"),
    ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
]


@pytest.mark.parametrize(("options", "param"), BAD, ids=lambda value: str(value)[:40])
def test_bad_fields_are_named(client, server, options, param):
    with pytest.raises(openai.BadRequestError) as raised:
        chat(client, **options)
    assert raised.value.param == param and raised.value.type == "invalid_request_error"
    assert not server.service.started


@pytest.mark.parametrize("off", [{"tools": []}, {"response_format": {"type": "text"}}, {"tool_choice": "none"}])
def test_asking_for_nothing_is_allowed(client, off):
    assert chat(client, **off).choices


def test_a_long_prompt_says_the_numbers(client, server):
    server.service.context_tokens = 50
    for content in ("x y " * 100, "x y " * 100_000):  # the second is refused before it is encoded
        with pytest.raises(openai.BadRequestError, match="50 tokens") as raised:
            chat(client, messages=[{"role": "user", "content": content}])
        assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="context"):
        chat(client, max_tokens=49)


def test_tokens_beyond_the_vocabulary(client):
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="rote", prompt=[5, 1000])


def test_an_unknown_model(client):
    with pytest.raises(openai.NotFoundError) as raised:
        chat(client, model="gpt-4o")
    assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("refusal", "kind", "status"),
    [
        (Overloaded("queue is full", 2.5), openai.RateLimitError, 429),
        (Unavailable("starting"), openai.InternalServerError, 503),
        (InvalidRequest("never fits", "prompt"), openai.BadRequestError, 400),
        (RuntimeError("secret at 0xabcdef12 in /root/x.py"), openai.InternalServerError, 500),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_refusals_become_the_clients_exceptions(client, server, refusal, kind, status, stream, n):
    server.service.refuse = refusal
    with pytest.raises(kind) as raised:
        chat(client, stream=stream, n=n)
    assert raised.value.status_code == status and "0x" not in str(raised.value) and "/root" not in str(raised.value)
    if status in (429, 503):
        assert int(raised.value.response.headers["retry-after"]) == (3 if status == 429 else 5)


@pytest.mark.parametrize("n", [1, 2])
def test_a_failure_in_mid_stream_is_an_error_event(client, server, n):
    server.service.break_after = 3
    got = []
    with pytest.raises(openai.APIError, match="failed on this request") as raised:
        got.extend(chat(client, stream=True, n=n))
    assert "0x" not in str(raised.value) and "/usr" not in str(raised.value)
    server.service.break_after = 3
    with pytest.raises(openai.InternalServerError):
        chat(client)


def test_the_async_client_streams_many_at_once(server):
    async def one(client, number):
        stream = await client.chat.completions.create(
            model="rote", messages=HELLO, max_tokens=10 + number, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream][-1].usage.completion_tokens

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, number) for number in range(16)))

    assert asyncio.run(main()) == [10 + number for number in range(16)]


def test_closing_a_stream_aborts_it(client, server):
    server.service.stall_after = 5
    stream = chat(client, stream=True, max_tokens=1000)
    for _ in range(4):
        next(stream)
    stream.close()
    server.on_loop(lambda: None)
    asyncio.run(_until(lambda: bool(server.service.aborted)))
    assert server.service.aborted == [request.id for request in server.service.started]


async def _until(true) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.002)
