"""Schemas of many kinds over HTTP, some of them bad, beside streams that go on: what was answered to the end follows
its schema, what cannot be held to is refused within seconds, and nobody's stream waits for a compiler."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import tiny_chat

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))
from gateway_rig import BYTE_LEVEL
from schemas import schema

AT_ONCE, REFUSED_WITHIN_S, LONGEST_GAP_S = 8, 5.0, 5.0
BAD: tuple[Any, ...] = (
    {"type": "something"},
    {"$ref": "#"},
    {"$ref": "file:///etc/passwd"},
    {"type": "string", "pattern": "([a"},
    {"not": {"type": "string"}},
    {"enum": list(range(100_001))},
    {"properties": {f"p{at}": {} for at in range(3000)}},
    {"allOf": [{"anyOf": [{"properties": {f"{a}{b}": {}}} for b in range(9)]} for a in range(9)]},
    {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<=x)"}}},
)


@dataclass
class Seen:
    stopped: int = 0
    events: int = 0
    longest_gap_s: float = 0.0
    slowest_refusal_s: float = 0.0
    wrong: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("schemas")
    model = tiny_chat.write(folder / "tiny", BYTE_LEVEL, context_tokens=1024)
    flags = ("--kv-memory", "64MiB", "--embedding-model", "none", "--state-dir", str(folder / "state"))
    with tiny_chat.serving(model, *flags) as found:
        yield found


async def ask(client: httpx.AsyncClient, of: Any, seed: int = 0) -> httpx.Response:
    held = {"type": "json_schema", "json_schema": {"name": "x", "schema": of}}
    body = {
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 500,
        "seed": seed,
        "response_format": held,
    }
    return await client.post("/v1/chat/completions", json=body)


async def good(client: httpx.AsyncClient, number: int, seen: Seen) -> None:
    answer = await ask(client, schema(number), number)
    if answer.status_code != 200:
        seen.wrong.append(f"schema {number}: {answer.status_code} {answer.text[:200]}")
        return
    choice = answer.json()["choices"][0]
    if choice["finish_reason"] == "stop":
        seen.stopped += 1
        try:
            jsonschema.validate(json.loads(choice["message"]["content"]), schema(number))
        except ValueError as error:  # of jsonschema and of json
            seen.wrong.append(f"schema {number}: {str(error)[:200]}")


async def bad(client: httpx.AsyncClient, of: Any, seen: Seen) -> None:
    begin_s = time.perf_counter()
    answer = await ask(client, of)
    seen.slowest_refusal_s = max(seen.slowest_refusal_s, time.perf_counter() - begin_s)
    if answer.status_code != 400:
        seen.wrong.append(f"{json.dumps(of)[:100]}: {answer.status_code}")


async def stream(client: httpx.AsyncClient, seen: Seen) -> None:
    """One after the other, until cancelled."""
    body = {"prompt": "hello", "max_tokens": 900, "stream": True, "ignore_eos": True}
    while True:
        last_s = time.perf_counter()
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    now_s = time.perf_counter()
                    seen.longest_gap_s, last_s = max(seen.longest_gap_s, now_s - last_s), now_s
                    seen.events += 1


async def play(url: str, count: int) -> Seen:
    seen, left = Seen(), list(range(count))

    async def worker(client: httpx.AsyncClient) -> None:
        while left:
            await good(client, left.pop(), seen)

    async def refusals(client: httpx.AsyncClient) -> None:
        for of in BAD:
            await bad(client, of, seen)

    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        streams = [asyncio.create_task(stream(client, seen)) for _ in range(2)]
        await asyncio.gather(refusals(client), *(worker(client) for _ in range(AT_ONCE)))
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return seen


def check(url: str, count: int) -> None:
    seen = asyncio.run(play(url, count))
    print(f"{count} schemas, {len(BAD)} bad ones beside them: {seen}")
    assert not seen.wrong, "\n".join(seen.wrong)
    assert seen.stopped > count / 2 and seen.events > 100
    assert seen.slowest_refusal_s < REFUSED_WITHIN_S and seen.longest_gap_s < LONGEST_GAP_S, seen


def test_schemas_beside_streams(url: str) -> None:
    check(url, 30)


@pytest.mark.slow
def test_three_hundred_schemas_beside_streams(url: str) -> None:
    check(url, 300)
