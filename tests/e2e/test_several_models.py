"""Several models in one server, over a socket: three in turn where two fit, each in a process of its own and all in a
thread, with what the memory is and whether a prefix is found again; and what becomes of a load that fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import tiny_chat
import tiny_model

from headrace.cli.assemble import Phases, asked
from headrace.cli.house import WORKER
from headrace.cli.housing import look
from headrace.core.config import DeviceSettings, EngineSettings
from headrace.device.child import Launch
from headrace.device.nursery import Nursery

NAMES = ("alder", "birch", "cedar")
PROMPT = "a prefix that is longer than a few blocks, so that it is worth to keep " * 3


@dataclass
class Server:
    url: str
    folder: Path
    budget: int
    engine: str
    others: frozenset[int]  # processes that the tests had started before

    def ask(self, model: str, prompt: str = PROMPT, **fields: Any) -> dict[str, Any]:
        body = {"model": model, "prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | fields
        response = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        return {"status": response.status_code} | response.json()

    def models(self) -> dict[str, dict[str, Any]]:
        return {one["id"]: one for one in httpx.get(f"{self.url}/v1/models", timeout=60).json()["data"]}

    def computing_bytes(self) -> int:
        """What the processes that compute have to themselves."""
        return sum(child.memory_full_info().uss for child in children() if child.pid not in self.others)

    def ready(self) -> list[str]:
        return [name for name, one in self.models().items() if one["state"] == "ready"]


def cached(answer: dict[str, Any]) -> int:
    assert answer["status"] == 200, answer
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest.fixture(scope="module", params=["process", "thread"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    for at, name in enumerate(NAMES):
        tiny_model.write(folder / name, seed=at)
    apart = request.param == "process"
    load = asked(str(folder / NAMES[0]), EngineSettings(), DeviceSettings())
    nursery = Nursery((*WORKER, "nursery")) if apart else None
    expected = look([load], [(None, "one")], Launch(WORKER, load, nursery) if apart else None, Phases())[0].expected
    if nursery is not None:
        nursery.close()
    one = expected.weights + expected.activations + expected.process + expected.kv_least
    budget = expected.shared + int(2.6 * one)
    flags = ("--memory", str(budget), "--engine", request.param, "--embedding-model", "none")
    models = [f"{name}={folder / name}" for name in NAMES]
    others = frozenset(child.pid for child in children())
    with tiny_chat.serving(models, *flags, "--state-dir", str(folder / "state"), "--threads", "1") as url:
        yield Server(url, folder, budget, request.param, others)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_three_models_in_turn_where_two_fit(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "headrace")
    answers: dict[str, list[str]] = {name: [] for name in NAMES}
    hits: dict[str, list[int]] = {name: [] for name in NAMES}
    waited: dict[bool, list[float]] = {True: [], False: []}  # whether the explanation says for what
    for _ in range(2):
        for name in NAMES:
            answer = server.ask(name)
            hits[name].append(cached(answer))
            answers[name].append(answer["choices"][0]["text"])
            explained = httpx.get(f"{server.url}/v1/requests/{answer['id']}/explain").json()
            waited[explained["words"][0].endswith("for its model to be loaded.")].append(explained["before_ms"])
            models = server.models()
            assert models[name]["state"] == "ready" and len(server.ready()) <= 2
            assert sum(one["memory_bytes"] or 0 for one in models.values()) <= server.budget
            if server.engine == "process":
                assert server.computing_bytes() <= server.budget
    assert len(server.ready()) == 2
    assert all(first == second for first, second in answers.values()), "a model that came back says something else"
    assert len({first for first, _ in answers.values()}) == 3, "one model answered for another"
    assert all(second > first == 0 for first, second in hits.values()), hits
    told = [record.getMessage() for record in caplog.records]
    swaps = [float(found[1]) for line in told if (found := re.search(r"ready after ([0-9.]+) s", line))]
    assert len(swaps) >= 4 and all(0 <= swap < 60 for swap in swaps), told  # a tiny one takes 0.00 s
    assert len(waited[True]) == len(swaps) and min(waited[True]) > max(waited[False], default=0), waited


def test_requests_for_all_models_at_once_are_all_answered(server: Server) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda at: server.ask(NAMES[at % 3], f"{at} {PROMPT}"), range(12)))
    assert [answer["status"] for answer in answers] == [200] * 12, answers
    assert [answer["model"] for answer in answers] == [NAMES[at % 3] for at in range(12)]


def test_keep_alive_says_when_a_model_goes(server: Server) -> None:
    server.ask("alder")
    shown = httpx.get(f"{server.url}/api/ps", timeout=60).json()["models"]
    assert "alder" in {one["name"].removesuffix(":latest") for one in shown}
    gone = httpx.post(
        f"{server.url}/api/generate", json={"model": "alder", "keep_alive": 0, "stream": False}, timeout=60
    )
    assert gone.json()["done_reason"] == "unload"
    assert server.models()["alder"]["state"] in ("unloading", "cold")
    there = httpx.post(f"{server.url}/api/generate", json={"model": "alder", "stream": False}, timeout=60)
    assert there.json()["done_reason"] == "load" and "alder" in server.ready()


def test_a_load_that_fails_is_told_to_who_asked_and_to_nobody_else(server: Server) -> None:
    out = next(name for name in NAMES if server.models()[name]["state"] == "cold")
    others = [name for name in NAMES if name != out]
    weights, away = server.folder / out / "model.safetensors", server.folder / "away"
    weights.rename(away)
    try:
        with ThreadPoolExecutor(5) as pool:
            asked = [pool.submit(server.ask, name) for name in (out, *others, out, others[0])]
            failed, *well = [asked[at].result() for at in (0, 1, 2, 4)]
        assert failed["status"] == 503, failed
        assert "its file is not there any more" in failed["error"]["message"]
        assert str(server.folder) not in failed["error"]["message"]
        assert [answer["status"] for answer in well] == [200, 200, 200]
        assert "not there" in server.models()[out]["error"]
    finally:
        away.rename(weights)
    assert server.ask(out)["status"] == 200 and server.models()[out]["error"] is None


def test_health_shows_every_model(server: Server) -> None:
    health = httpx.get(f"{server.url}/health/ready", timeout=60).json()
    assert health["status"] == "ready" and {one["model"] for one in health["models"]} == set(NAMES)
    assert {one["state"] for one in health["models"]} <= {"ready", "cold", "unloading"}
