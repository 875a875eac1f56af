"""Further dialects without a socket: shapes of answers, order of events, errors in each dialect's own form."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gateway_rig import ANSWER, EOS, RoteService, ask, ids_of, make_text
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.ports import Encoding
from headrace.gateway.app import build
from headrace.gateway.embedding import Words
from headrace.gateway.endpoints import Extras
from headrace.gateway.state.database import Database

TEXT = make_text()
HELLO = [{"role": "user", "content": "hello"}]


def words_json() -> str:
    tokenizer = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3, "?": 4}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    return str(tokenizer.to_str())


class Counting:
    """An embedder whose vectors say which ids it saw: their sum, their number, 0, 1."""

    encoding = Encoding("counter", 4, 6, 10, "bert")

    async def embed(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        return [struct.pack("<4f", sum(ids), len(ids), 0, 1) for ids in sequences]


def server(service: RoteService | None = None, database: Database | None = None):
    extras = Extras(Counting(), Words(words_json()), database)
    return build(service or RoteService(), TEXT, GatewaySettings(), Metrics(), extras)


APP = server()


def post(path: str, app: Any = None, headers: dict[str, str] | None = None, **fields: Any) -> tuple[int, bytes]:
    status, _, body = asyncio.run(ask(app or APP, path, json.dumps(fields).encode(), headers=headers))
    return status, body


def good(path: str, app: Any = None, **fields: Any) -> Any:
    status, body = post(path, app, **fields)
    assert status == 200, body
    return json.loads(body)


def named_events(body: bytes) -> list[tuple[str, Any]]:
    events = []
    for event in body.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


# -- Anthropic ---------------------------------------------------------------------------------------------------------


def messages(**fields: Any) -> dict[str, Any]:
    return {"model": "rote", "max_tokens": 8, "messages": HELLO} | fields


def test_a_message_has_blocks_a_reason_and_usage() -> None:
    answer = good("/v1/messages", **messages())
    assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert ANSWER.startswith(answer["content"][0]["text"]) and answer["usage"]["cache_read_input_tokens"] == 3


def test_a_stop_sequence_is_named() -> None:
    answer = good("/v1/messages", **messages(stop_sequences=["never", "wheel"], max_tokens=100))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "wheel")
    ended = good("/v1/messages", server(RoteService(answer=(*ids_of("hi"), EOS))), **messages())
    assert (ended["stop_reason"], ended["stop_sequence"], ended["content"][0]["text"]) == ("end_turn", None, "hi")


def test_the_events_of_a_message_build_it() -> None:
    _, body = post("/v1/messages", **messages(stream=True))
    events = named_events(body)
    assert all(name == data["type"] for name, data in events)
    kinds = [name for name, _ in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    assert text == good("/v1/messages", **messages())["content"][0]["text"]
    assert events[-2][1]["delta"]["stop_reason"] == "max_tokens"


def test_tokens_are_counted_as_they_are_used() -> None:
    usage = good("/v1/messages", **messages())["usage"]
    counted = good("/v1/messages/count_tokens", model="rote", messages=HELLO)["input_tokens"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]


@pytest.mark.parametrize(
    "fields,status",
    [
        ({"model": "nobody"}, 404),
        ({"max_tokens": 0}, 400),
        ({"temperature": 1.5}, 400),
        ({"what": 1}, 400),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {"url": "http://[::1]/"}}]}]}, 400),
        ({"messages": [*HELLO, {"role": "assistant", "content": "so"}]}, 400),
        ({"tool_choice": {"type": "any"}}, 400),
        ({"mcp_servers": [{"url": "http://169.254.169.254/"}]}, 400),
    ],
)
def test_messages_refuses_in_its_own_form(fields: dict[str, Any], status: int) -> None:
    got, body = post("/v1/messages", **messages(**fields))
    error = json.loads(body)
    assert got == status and error["type"] == "error"
    assert error["error"]["type"] == {400: "invalid_request_error", 404: "not_found_error"}[status]


# -- Ollama ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_streamed_in_lines_and_the_last_has_the_numbers() -> None:
    status, headers, body = asyncio.run(
        ask(
            APP,
            "/api/chat",
            json.dumps({"model": "rote:latest", "messages": HELLO, "options": {"num_predict": 5}}).encode(),
        )
    )
    lines = [json.loads(line) for line in body.splitlines()]
    assert status == 200 and headers["content-type"] == "application/x-ndjson"
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert ANSWER.startswith("".join(line["message"]["content"] for line in lines))
    assert (lines[-1]["eval_count"], lines[-1]["done_reason"]) == (5, "length")
    parts = lines[-1]["prompt_eval_duration"] + lines[-1]["eval_duration"]
    assert 0 < parts <= lines[-1]["total_duration"]


def test_generate_whole_and_without_a_prompt() -> None:
    answer = good("/api/generate", model="rote", prompt="hello", stream=False, options={"num_predict": 4})
    assert answer["done"] and ANSWER.startswith(answer["response"]) and answer["response"]
    assert good("/api/generate", model="rote", stream=False, keep_alive="5m")["done_reason"] == "load"
    assert good("/api/generate", model="rote", stream=False, keep_alive=0)["done_reason"] == "unload"


def test_pages_tell_of_models() -> None:
    for path in ("/api/tags", "/api/ps", "/api/version"):
        assert asyncio.run(ask(APP, path, method="GET"))[0] == 200
    assert good("/api/show", model="rote")["capabilities"] == ["completion", "tools"]
    assert post("/api/show", model="../../etc/passwd")[0] == 404


def test_ollama_s_clients_need_no_content_type_but_browsers_do() -> None:
    fields = {"model": "rote", "prompt": "a", "stream": False, "options": {"num_predict": 1}}
    plain = {"content-type": "text/plain"}
    assert post("/api/generate", headers=plain, **fields)[0] == 200
    assert post("/api/generate", headers={**plain, "origin": "http://evil.example"}, **fields)[0] == 415
    assert post("/v1/messages", headers=plain, **messages())[0] == 415


@pytest.mark.parametrize(
    "fields,status",
    [
        ({"model": "nobody"}, 404),
        ({"options": {"temperature": 9}}, 400),
        ({"options": {"mirostat": 1}}, 400),
        ({"template": "{{ x }}"}, 400),
        ({"images": ["aGk="]}, 400),
        ({"context": [1, 2]}, 400),
    ],
)
def test_ollama_refuses_in_its_own_form(fields: dict[str, Any], status: int) -> None:
    got, body = post("/api/generate", **({"model": "rote", "prompt": "a"} | fields))
    assert got == status and set(json.loads(body)) == {"error"}


# -- embeddings and tokens ---------------------------------------------------------------------------------------------


def test_embeddings_in_both_encodings_and_all_forms_of_input() -> None:
    plain = good("/v1/embeddings", input=["a", "a b"], model="counter")
    assert [one["embedding"] for one in plain["data"]] == [[3, 3, 0, 1], [6, 4, 0, 1]]
    assert plain["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    packed = good("/v1/embeddings", input="a", encoding_format="base64")["data"][0]["embedding"]
    assert struct.unpack("<4f", base64.b64decode(packed)) == (3, 3, 0, 1)
    for ids in ([2], [[2]], [0, 2, 1]):  # marks are added unless they are there
        assert good("/v1/embeddings", input=ids)["data"][0]["embedding"] == [3, 3, 0, 1]


def test_fewer_dimensions_are_the_first_ones_normalised() -> None:
    vector = good("/v1/embeddings", input="a", dimensions=2)["data"][0]["embedding"]
    assert vector == pytest.approx([2**-0.5, 2**-0.5])


def test_long_texts_are_refused_or_cut() -> None:
    status, body = post("/v1/embeddings", input="a " * 9)
    assert status == 400 and json.loads(body)["error"]["code"] == "context_length_exceeded"
    assert good("/v1/embeddings", input="a " * 9, truncate=True)["data"][0]["embedding"] == [9, 6, 0, 1]
    assert good("/api/embed", model="counter", input="a " * 9)["embeddings"] == [[9, 6, 0, 1]]
    assert post("/api/embed", model="counter", input="a " * 9, truncate=False)[0] == 400


@pytest.mark.parametrize(
    "given", ["", [], [""], [[]], [99], [[99]], ["a", 1], [-1], ["a"] * 2049, None, {"a": 1}, [1.5], [[["a"]]]]
)
def test_inputs_that_are_none_are_refused(given: Any) -> None:
    assert post("/v1/embeddings", input=given)[0] == 400


def test_tensors_of_clients_are_unknown() -> None:
    for name in ("prompt_embeds", "input_embeds", "tensor"):
        assert post("/v1/embeddings", input="a", **{name: "gASV"})[0] == 400


def test_tokens_and_back() -> None:
    tokens = good("/tokenize", prompt="hello world", return_token_strs=True)
    assert tokens["count"] == len(tokens["tokens"]) and "".join(tokens["token_strs"]) == "hello world"
    assert good("/detokenize", tokens=tokens["tokens"])["prompt"] == "hello world"
    assert good("/tokenize", messages=HELLO)["count"] > good("/tokenize", prompt="hello")["count"]
    assert post("/detokenize", tokens=[10**6])[0] == 400 and post("/tokenize")[0] == 400


# -- responses ---------------------------------------------------------------------------------------------------------


def test_a_response_is_remembered_continued_and_forgotten(tmp_path: Path) -> None:
    service = RoteService()
    app = server(service, Database(tmp_path))
    first = good("/v1/responses", app, input="hello", instructions="be terse", max_output_tokens=4)
    assert (first["status"], first["store"]) == ("incomplete", True)
    alone = service.started[-1].prompt_tokens
    second = good("/v1/responses", app, input="and?", previous_response_id=first["id"], max_output_tokens=4)
    assert service.started[-1].prompt_tokens > alone - len(ids_of("be terse"))
    stored = f"/v1/responses/{first['id']}"
    _, _, body = asyncio.run(ask(app, stored, method="GET"))
    assert json.loads(body) == first
    _, _, items = asyncio.run(ask(app, f"/v1/responses/{second['id']}/input_items", method="GET"))
    assert [item["content"][0]["text"] for item in json.loads(items)["data"]] == ["and?"]
    assert asyncio.run(ask(app, stored, method="DELETE"))[0] == 200
    assert asyncio.run(ask(app, stored, method="GET"))[0] == 404
    status, error = post("/v1/responses", app, input="more", previous_response_id=second["id"])
    assert status == 400 and json.loads(error)["error"]["code"] == "previous_response_not_found"


def test_the_events_of_a_response_are_numbered_and_build_it() -> None:
    _, body = post("/v1/responses", input="hello", stream=True, max_output_tokens=6)
    events = named_events(body)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    kinds = [name for name, data in events if name == data["type"]]
    begin = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[:5] == [f"response.{kind}" for kind in begin] and kinds[-4:] == [f"response.{kind}" for kind in end]
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    assert events[-1][1]["response"]["output"][0]["content"][0]["text"] == text


def test_without_a_database_nothing_is_stored_and_nobody_is_told_otherwise() -> None:
    assert good("/v1/responses", input="hello", max_output_tokens=2)["store"] is False
    assert post("/v1/responses", input="hello", store=True)[0] == 400
    assert asyncio.run(ask(APP, "/v1/files", method="GET"))[0] == 503


def test_a_failure_in_the_middle_leaks_nothing_in_any_dialect() -> None:
    app = server(RoteService(break_after=2))
    for path, fields in (
        ("/v1/messages", messages(stream=True)),
        ("/api/chat", {"model": "rote", "messages": HELLO}),
        ("/v1/responses", {"input": "hello", "stream": True}),
    ):
        status, body = post(path, app, **fields)
        assert status == 200 and b"error" in body
        assert not any(leak in body for leak in (b"0xdeadbeef", b"/usr/lib", b"Traceback", b"secret"))
