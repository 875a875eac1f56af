"""Scenarios of langchain-openai."""

from __future__ import annotations

from common import EMBEDDING, MODEL, PERSON, WEATHER, play, raises, url
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

MODEL_OPTIONS = {"model": MODEL, "base_url": f"{url()}/v1", "api_key": "none", "max_retries": 0, "temperature": 0}
chat_model = ChatOpenAI(**MODEL_OPTIONS, max_tokens=16)
long_model = ChatOpenAI(**MODEL_OPTIONS, max_tokens=200)
QUESTION = "What is the capital of France?"


def chat() -> None:
    answer = chat_model.invoke(QUESTION)
    assert "Paris" in answer.content and answer.usage_metadata["output_tokens"]


def stream() -> None:
    assert "".join(part.content for part in chat_model.stream(QUESTION)) == chat_model.invoke(QUESTION).content


def batch() -> None:
    assert [answer.content for answer in chat_model.batch([QUESTION] * 3)] == [chat_model.invoke(QUESTION).content] * 3


def responses() -> None:
    model = ChatOpenAI(**MODEL_OPTIONS, max_tokens=16, use_responses_api=True)
    assert model.invoke(QUESTION).text


def embeddings() -> None:
    options = {"base_url": f"{url()}/v1", "api_key": "none", "check_embedding_ctx_length": False}
    model = OpenAIEmbeddings(model=EMBEDDING, **options)
    assert len(model.embed_query("a mill")) == 384 and len(model.embed_documents(["a", "b"])) == 2


def tools() -> None:
    bound = long_model.bind_tools([{"type": "function", "function": WEATHER}], tool_choice="required")
    assert set(bound.invoke("Weather in Rome?").tool_calls[0]["args"]) == {"city"}


def structured() -> None:
    schema = {"title": "person", **PERSON}
    for method in ("json_schema", "function_calling"):
        answer = long_model.with_structured_output(schema, method=method).invoke("Ada, 36 years old")
        assert set(answer) == {"name", "age"}, method


def errors() -> None:
    raises(Exception, lambda: ChatOpenAI(**{**MODEL_OPTIONS, "model": "nobody"}).invoke("a"))


play(chat, stream, batch, responses, embeddings, errors, tools, structured)
