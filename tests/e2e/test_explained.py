"""The whole server but its socket, on virtual time: tenants with keys, an engine whose steps take what they compute,
and what the API says about who waited for whom. The example of docs/explain.md is made here."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "gateway"))
from gateway_rig import ask, make_text

from headrace.core import clock
from headrace.core.config import EngineSettings, GatewaySettings
from headrace.core.explain.fold import Explanations
from headrace.core.metrics import Metrics
from headrace.core.ports import Capacity
from headrace.core.step import Run, Sampled, StepPlan, StepResult
from headrace.engine.loop import Engine
from headrace.engine.scheduler import Scheduler
from headrace.gateway.app import build
from headrace.gateway.endpoints import Extras
from headrace.gateway.explaining import Book
from headrace.gateway.keys import Guard, Key, Keyring, digest

T = TypeVar("T")
DOC = Path(__file__).parent.parent.parent / "docs" / "explain.md"
SECRETS = {name: f"secret-of-{name}-0123456789" for name in ("alice", "bob", "ops")}
BUDGET, STEP_S, TOKEN_S = 256, 0.010, 0.0004
Ask = Callable[..., Awaitable[tuple[int, dict[str, str], bytes]]]


class Paced:
    """Every step takes as long as its tokens, and everybody draws the same token."""

    capacity = Capacity(blocks=1024, block_tokens=16, max_context_tokens=8192, vocab=400)

    async def run(self, plan: StepPlan) -> StepResult:
        await clock.sleep(STEP_S + TOKEN_S * plan.tokens)
        return StepResult(plan.step, {work.request_id: Sampled((40,)) for work in plan.work if work.sample})

    def interrupt(self) -> Run | None:
        return None

    async def close(self) -> None:
        return


def ring() -> Keyring:
    keys = [Key(name, name, name, digest(secret, b"salt"), admin=name == "ops") for name, secret in SECRETS.items()]
    return Keyring.of(b"salt", keys)


def served(play: Callable[[Ask], Coroutine[Any, Any, T]], virtual: bool = True) -> T:
    """Run `play` against a server; it asks as one of the three."""
    settings, keyring = GatewaySettings(), ring()

    async def main() -> T:
        book = Book(Explanations(50), 50)
        observer = book.explanations.observer("rote")
        scheduler = Scheduler(EngineSettings(), Paced.capacity, token_budget=BUDGET, observer=observer)
        engine = Engine("rote", scheduler, Paced())
        app = build(engine, make_text(), settings, Metrics(), Extras(book=book, guard=Guard(lambda: keyring)))
        serving = asyncio.create_task(engine.run())

        async def asked(who: str, path: str, body: bytes = b"", **more: Any) -> tuple[int, dict[str, str], bytes]:
            headers = {"authorization": f"Bearer {SECRETS[who]}"} | more.pop("headers", {})
            return await ask(app, path, body, "POST" if body else "GET", headers, **more)

        try:
            answer = await play(asked)
            book.check()
            book.explanations.check()
            return answer
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)

    return clock.run(main(), virtual=virtual)


def completion(tokens: int, seed: int, max_tokens: int = 8, **more: Any) -> bytes:
    prompt = [(seed * 7919 + at * 31) % 300 + 50 for at in range(tokens)]
    return json.dumps({"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True} | more).encode()


async def crowd(asked: Ask) -> dict[str, Any]:
    """Alice sends a prompt of 4,000 tokens, and 0.1 s later bob a short one."""
    path = "/v1/completions"
    long = asyncio.create_task(asked("alice", path, completion(4000, 1)))
    await clock.sleep(0.1)
    status, headers, body = await asked("bob", path, completion(40, 2, 24), headers={"x-request-id": "bobs-first"})
    assert status == 200
    alices = json.loads((await long)[2])["id"]
    told: dict[str, Any] = {"id": json.loads(body)["id"], "alices": alices, "timing": headers["server-timing"]}
    for who in ("bob", "ops"):
        why = f"/v1/requests/{told['id']}/explain"
        told[who] = json.loads((await asked(who, why))[2])
        told[who + " text"] = (await asked(who, why + "?format=text"))[2].decode()
    told["by x-request-id"] = json.loads((await asked("bob", "/v1/requests/bobs-first/explain"))[2])
    told["alice asks"] = await asked("alice", f"/v1/requests/{told['id']}/explain")
    told["rows"] = {who: json.loads((await asked(who, "/v1/requests"))[2])["data"] for who in SECRETS}
    told["steps"] = json.loads((await asked("ops", "/v1/steps"))[2])["data"]
    return told


def test_who_waits_for_another_tenants_long_prompt_is_told_so_and_no_more() -> None:
    """Must show 5, in the API."""
    told = served(crowd)
    (choice,) = told["bob"]["choices"]
    queued = choice["phases"][0]
    assert queued["kind"] == "queue" and queued["ms"] > 1000
    assert queued["other_tenants_prompts_ms"] == pytest.approx(queued["ms"], rel=0.01)
    assert "while a prompt of 4,000 tokens of another tenant was computed" in choice["words"][0]
    assert queued["causes"][0]["other"] == {
        "whose": "other",
        "request_id": None,
        "tenant": None,
        "prompt_tokens": 4000,
    }
    assert "alice" not in json.dumps(told["bob"]) and told["alices"] not in json.dumps(told["bob"])
    assert f"of tenant alice ({told['alices']})" in told["ops"]["words"][0]
    assert told["by x-request-id"]["id"] == told["id"]
    assert told["alice asks"][0] == 404


def test_the_example_in_the_documents_is_what_the_server_says() -> None:
    told = served(crowd)
    shown = told["bob text"].replace(told["id"], "cmpl-5f0c8a4be1d9")
    assert shown in DOC.read_text(encoding="utf-8"), shown
    seen = told["ops text"].replace(told["id"], "cmpl-5f0c8a4be1d9").replace(told["alices"], "cmpl-91b22c6de07f")
    assert seen.splitlines()[1] in DOC.read_text(encoding="utf-8"), seen


def test_times_add_up_and_the_header_says_the_same() -> None:
    told = served(crowd)
    (choice,) = told["bob"]["choices"]
    parts = choice["queue_ms"] + choice["prefill_ms"] + choice["decode_ms"]
    assert parts == pytest.approx(choice["total_ms"], abs=0.01) and choice["output_tokens"] == 24
    header = dict(part.split(";dur=") for part in told["timing"].split(", "))
    assert float(header["queue"]) == pytest.approx(choice["queue_ms"], abs=0.1)
    assert float(header["prefill"]) == pytest.approx(choice["prefill_ms"], abs=0.1)
    assert float(header["decode"]) == pytest.approx(choice["decode_ms"], abs=0.1)
    assert float(header["total"]) >= choice["total_ms"]
    assert sum(chunk["tokens"] for chunk in choice["chunks"]) == 40


def test_rows_are_a_tenants_own_and_steps_an_admins() -> None:
    told = served(crowd)
    rows = told["rows"]
    assert [row["id"] for row in rows["bob"]] == [told["id"]] and rows["bob"][0][
        "waits_for"
    ] == "prompts of other tenants"
    assert [row["tenant"] for row in rows["alice"]] == ["alice"]
    assert {row["tenant"] for row in rows["ops"]} == {"alice", "bob"}
    steps = told["steps"]
    assert sum(step["tokens"] for step in steps) == 4000 + 7 + 40 + 23
    assert max(step["waiting"] for step in steps) == 1 and all(step["total_blocks"] == 1024 for step in steps)


def test_a_live_request_is_explained_while_it_waits_and_while_it_decodes() -> None:
    async def play(asked: Ask) -> list[Any]:
        long = asyncio.create_task(asked("alice", "/v1/completions", completion(4000, 1)))
        await clock.sleep(0.1)
        short = asyncio.create_task(
            asked("bob", "/v1/completions", completion(40, 2, 500), headers={"x-request-id": "mine"})
        )
        seen = []
        for pause_s in (0.5, 2.0):
            await clock.sleep(pause_s)
            seen.append(json.loads((await asked("bob", "/v1/requests/mine/explain"))[2]))
        await asyncio.gather(long, short)
        return seen

    waiting, decoding = served(play)
    assert waiting["state"] == "waiting" and waiting["words"][0].startswith("It has waited 500 ms in the queue")
    assert decoding["state"] == "decoding" and decoding["choices"][0]["output_tokens"] > 10
    assert decoding["words"][-1].startswith("So far it has drawn")


def test_all_choices_are_found_under_every_id() -> None:
    async def play(asked: Ask) -> tuple[Any, Any]:
        _, headers, body = await asked("bob", "/v1/completions", completion(20, 3, n=3))
        call = json.loads(body)["id"]
        by_all = [
            json.loads((await asked("bob", f"/v1/requests/{name}/explain"))[2])
            for name in (call, headers["x-request-id"], f"{call}-1")
        ]
        return call, by_all

    call, by_all = served(play)
    assert all(
        one["id"] == call and [choice["id"] for choice in one["choices"]] == [f"{call}-{at}" for at in range(3)]
        for one in by_all
    )


def test_no_prompt_and_no_key_is_ever_logged(caplog: pytest.LogCaptureFixture) -> None:
    """R19, for one run with answers, refusals and a stream, down to DEBUG."""
    caplog.set_level(logging.DEBUG)

    async def play(asked: Ask) -> None:
        chat = {"messages": [{"role": "user", "content": "the secret recipe of the house"}], "max_tokens": 3}
        for more in ({}, {"stream": True}, {"model": "nothing"}, {"max_tokens": -1}, {"unknown": "secret recipe"}):
            await asked("bob", "/v1/chat/completions", json.dumps(chat | more).encode())
        await asked("bob", "/v1/nothing?key=" + SECRETS["alice"], b"{}")
        await asked("bob", "/v1/requests/secret-recipe/explain")

    served(play, virtual=False)  # chat templates run in a thread
    lines = [record.getMessage() for record in caplog.records if record.name == "headrace.gateway"]
    assert len(lines) == 7, lines
    assert "recipe of" not in caplog.text and not any(secret in caplog.text for secret in SECRETS.values())
