"""Pages about the server itself, while it computes as much as it can."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from reliability.check import Found, Setting, ms, percentile
from reliability.running import Answer, Server, ask, client, prompts, serving, under_way

PATHS = ("/health/ready", "/health/live", "/metrics", "/v1/models")
CLIENTS = 16
_APART_S = 0.1  # of two questions about one page


async def answers(setting: Setting) -> Found:
    """/health, /metrics and /v1/models answer in 50 ms (p99) while the engine is saturated"""
    async with serving(setting.model, setting.folder, *setting.flags) as server, saturating(server):
        taken = await probing(server, 3.0 if setting.short else 20.0)
    worst = max(percentile(values, 99) for values in taken.values())
    told = ", ".join(f"{path} {ms(percentile(taken[path], 50))} / {ms(percentile(taken[path], 99))}" for path in PATHS)
    return Found(f"p50 / p99: {told}", worst <= 0.05 * setting.slack)


@asynccontextmanager
async def saturating(server: Server, words: int = 200, tokens: int = 60) -> AsyncIterator[list[Answer]]:
    """One request after the other from each client, all under way when the block begins; the list grows with them."""
    answers = list[Answer]()
    async with client() as http:

        async def one_client(prompt: str) -> None:
            while True:
                answers.append(Answer())
                await ask(http, server.url, prompt, tokens, answer=answers[-1])

        running = [asyncio.create_task(one_client(one)) for one in prompts(CLIENTS, words)]
        try:
            await under_way(answers, CLIENTS)
            yield answers
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def probing(server: Server, seconds: float) -> dict[str, list[float]]:
    """How long each page took, each asked ten times a second."""
    taken: dict[str, list[float]] = {path: [] for path in PATHS}
    async with client() as http:
        begin = time.monotonic()
        while time.monotonic() - begin < seconds:
            for path in PATHS:
                asked = time.monotonic()
                response = await http.get(server.url + path)
                assert response.status_code == 200, f"{path} says {response.status_code}"
                taken[path].append(time.monotonic() - asked)
                await asyncio.sleep(_APART_S / len(PATHS))
    return taken
