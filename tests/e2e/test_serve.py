"""`headrace serve` as a user starts it, with a real model, judged by the official client over a real socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from server import HEADRACE, serving

FLAGS = ("smollm2", "--kv-memory", "400MiB", "--max-context", "2048", "--drain-timeout-s", "20", "--dtype", "fp32")
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(*FLAGS) as (base, _):
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def gauges(url: str) -> dict[str, float]:
    lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line and line[0] != "#"]
    return {line.split("{")[0].split(":")[-1]: float(line.rsplit(" ", 1)[1]) for line in lines}


def settled(url: str) -> dict[str, float]:
    """The gauges once nothing runs."""
    for _ in range(200):
        if not (now := gauges(url))["num_requests_running"] and not now["num_requests_waiting"]:
            return now
        time.sleep(0.05)
    raise AssertionError("requests keep running")


def test_a_chat_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=FRANCE, max_tokens=20, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_is_the_same_text_with_usage(client: openai.OpenAI) -> None:
    options = {"model": "smollm2", "messages": FRANCE, "max_tokens": 20, "temperature": 0}
    whole = client.chat.completions.create(**options)
    events = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == whole.choices[0].message.content
    assert events[-1].usage == client.chat.completions.create(**options).usage


def test_the_same_prompt_hits_the_cache(client: openai.OpenAI) -> None:
    prompt = "The river runs through the old town and past the mill. " * 8
    usages = [client.completions.create(model="smollm2", prompt=prompt, max_tokens=2).usage for _ in range(2)]
    first, second = (usage.prompt_tokens_details.cached_tokens for usage in usages)
    assert first == 0
    assert second >= usages[1].prompt_tokens - 17


def test_seeds_and_choices(client: openai.OpenAI) -> None:
    def ask(seed: int) -> list[str]:
        answer = client.completions.create(model="smollm2", prompt="Once", max_tokens=8, temperature=1, seed=seed, n=3)
        return [choice.text for choice in sorted(answer.choices, key=lambda choice: choice.index)]

    assert ask(1) == ask(1) != ask(2)
    assert len(set(ask(1))) == 3


def test_a_stop_string_ends_the_text_and_counts_as_stop(client: openai.OpenAI, url: str) -> None:
    before = gauges(url)
    answer = client.completions.create(
        model="smollm2", prompt="1, 2, 3, 4, 5, 6,", max_tokens=60, temperature=0, stop=[", 9"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].text == " 7, 8"
    assert settled(url)["kv_cache_usage_perc"] == 0
    assert before["kv_cache_usage_perc"] == 0
    assert 'finished_reason="abort"' not in httpx.get(f"{url}/metrics").text


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="The capital of France is Paris", max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("The capital of France is Paris")
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.token_logprobs[5] > -4  # " Paris" is no surprise


@pytest.mark.parametrize(
    "fields,error",
    [
        ({"model": "nobody"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"max_tokens": 10**6}, openai.BadRequestError),
        ({"n": 4000}, openai.BadRequestError),
        ({"prompt": [7] * 3000}, openai.BadRequestError),
        ({"prompt": [49152]}, openai.BadRequestError),
        ({"logit_bias": {"x": 1}}, openai.BadRequestError),
        ({"extra_body": {"frobnicate": 1}}, openai.BadRequestError),
    ],
)
def test_bad_requests_are_refused_and_leave_nothing(
    client: openai.OpenAI, url: str, fields: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        client.completions.create(**({"model": "smollm2", "prompt": "x", "max_tokens": 4} | fields))
    assert settled(url)["kv_cache_usage_perc"] == 0


def test_a_deadline_ends_a_request(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(
            model="smollm2", prompt="Once", max_tokens=1500, extra_body={"ignore_eos": True, "deadline_s": 0.4}
        )
    assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")
    assert settled(url)["kv_cache_usage_perc"] == 0


def test_a_client_that_goes_away_stops_its_request(client: openai.OpenAI, url: str) -> None:
    before = settled(url)["generation_tokens_total"]
    with client.completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        for _ in zip(range(3), stream, strict=False):
            pass
    after = settled(url)
    assert after["generation_tokens_total"] - before < 30
    assert after["kv_cache_usage_perc"] == 0


def test_the_control_plane_answers_while_the_engine_computes(client: openai.OpenAI, url: str) -> None:
    with client.completions.create(
        model="smollm2", prompt=[5] * 1500, max_tokens=40, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        waits = []
        with httpx.Client() as probe:
            for _ in range(20):
                begin = time.perf_counter()
                assert probe.get(f"{url}/health/ready").status_code == 200
                waits.append(time.perf_counter() - begin)
        del stream
    assert sorted(waits)[10] < 0.25  # milliseconds on an idle machine; a busy one shares two cores with the engine


def test_sigterm_finishes_what_runs_and_refuses_the_rest() -> None:
    process = subprocess.Popen(
        [*HEADRACE, "serve", "--port", "0", *FLAGS], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    try:
        assert process.stderr is not None
        base = next(line.split()[2] for line in process.stderr if line.startswith("Listening on"))
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=60) as client:
            stream = client.completions.create(
                model="smollm2", prompt="Once", max_tokens=12, stream=True, extra_body={"ignore_eos": True}
            )
            next(stream)
            process.send_signal(signal.SIGTERM)
            events = list(stream)
        assert events[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.stderr.close()  # type: ignore[union-attr]
