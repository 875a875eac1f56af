"""Scenarios of litellm, through its openai, anthropic and ollama providers."""

from __future__ import annotations

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or it asks the network for prices

import litellm
from common import EMBEDDING, HELLO, MODEL, WEATHER, play, raises, url

OPENAI = {"model": f"openai/{MODEL}", "api_base": f"{url()}/v1", "api_key": "none", "num_retries": 0}
OPTIONS = {"messages": HELLO, "max_tokens": 16, "temperature": 0}


def chat() -> None:
    assert "Paris" in litellm.completion(**OPENAI, **OPTIONS).choices[0].message.content


def stream() -> None:
    chunks = litellm.completion(**OPENAI, **OPTIONS, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == litellm.completion(**OPENAI, **OPTIONS).choices[0].message.content


def anthropic() -> None:
    answer = litellm.completion(model=f"anthropic/{MODEL}", api_base=url(), api_key="none", **OPTIONS)
    assert answer.choices[0].message.content


def ollama() -> None:
    answer = litellm.completion(model=f"ollama_chat/{MODEL}", api_base=url(), **OPTIONS)
    assert answer.choices[0].message.content


def embeddings() -> None:
    options = {**OPENAI, "model": f"openai/{EMBEDDING}"}
    assert len(litellm.embedding(input=["a mill"], encoding_format="float", **options).data[0]["embedding"]) == 384


def tools() -> None:
    options = {**OPTIONS, "max_tokens": 200}
    tool = [{"type": "function", "function": WEATHER}]
    answer = litellm.completion(**OPENAI, **options, tools=tool, tool_choice="required")
    assert set(json.loads(answer.choices[0].message.tool_calls[0].function.arguments)) == {"city"}


def errors() -> None:
    raises(litellm.NotFoundError, lambda: litellm.completion(**{**OPENAI, "model": "openai/nobody"}, **OPTIONS))


play(chat, stream, anthropic, ollama, embeddings, errors, tools)
