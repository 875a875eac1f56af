"""Scenarios of the official ollama client."""

from __future__ import annotations

import json

import ollama
from common import EMBEDDING, HELLO, MODEL, PERSON, WEATHER, play, raises, url

client = ollama.Client(host=url(), timeout=300)
OPTIONS = {"num_predict": 16, "temperature": 0}


def chat() -> None:
    answer = client.chat(MODEL, HELLO, options=OPTIONS, keep_alive="5m")
    assert answer.message.content and answer.done and answer.eval_count and answer.total_duration


def stream() -> None:
    parts = list(client.chat(MODEL, HELLO, options=OPTIONS, stream=True))
    whole = client.chat(MODEL, HELLO, options=OPTIONS).message.content
    assert "".join(part.message.content for part in parts) == whole and parts[-1].done_reason


def generate() -> None:
    assert client.generate(MODEL, "Hello", options=OPTIONS).response
    assert "".join(part.response for part in client.generate(MODEL, "Hello", options=OPTIONS, stream=True))
    assert client.generate(MODEL).done_reason == "load"


def models() -> None:
    assert {f"{MODEL}:latest", f"{EMBEDDING}:latest"} == {model.model for model in client.list().models}
    assert client.ps().models and "completion" in client.show(MODEL).capabilities


def embeddings() -> None:
    vectors = client.embed(EMBEDDING, ["a mill", "word " * 1000]).embeddings
    assert [len(vector) for vector in vectors] == [384, 384]
    assert len(client.embeddings(EMBEDDING, "a mill").embedding) == 384
    raises(ollama.ResponseError, lambda: client.embed(EMBEDDING, "word " * 1000, truncate=False))


def structured() -> None:
    answer = client.chat(MODEL, HELLO, format=PERSON, options={**OPTIONS, "num_predict": 200})
    assert set(json.loads(answer.message.content)) == {"name", "age"}


def tools() -> None:
    answer = client.chat(MODEL, HELLO, tools=[{"type": "function", "function": WEATHER}], options=OPTIONS)
    assert answer.done and answer.message.role == "assistant"  # this protocol cannot demand a call


def errors() -> None:
    assert raises(ollama.ResponseError, lambda: client.chat("nobody", HELLO)).status_code == 404
    assert raises(ollama.ResponseError, lambda: client.chat(MODEL, HELLO, options={"top_p": 7})).status_code == 400


print("ollama")
play(chat, stream, generate, models, embeddings, errors, structured, tools)
