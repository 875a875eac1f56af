"""SIGTERM under load: who is here is served to the end, who comes is told to go elsewhere, and the process ends."""

from __future__ import annotations

import asyncio
import signal
import time

import httpx

from reliability.check import Found, Setting, ms, percentile, s
from reliability.running import Answer, Server, ask, client, prompts, serving, under_way

CLIENTS = 4


async def drained(setting: Setting) -> Found:
    """SIGTERM under load: all that were accepted finish, new ones get 503 and Retry-After in 50 ms, exit 0; a second
    SIGTERM ends it in 1 s"""
    repeats = 1 if setting.short else 10
    refusals, wrong = list[Answer](), list[str]()
    for _ in range(repeats):
        async with serving(setting.model, setting.folder, *setting.flags, "--drain-timeout-s", "60") as server:
            problems, refused = await once(server, 1000 if setting.short else 60)
            wrong += problems
            refusals += refused
    aborted = []
    for _ in range(max(1, repeats // 2)):
        async with serving(setting.model, setting.folder, *setting.flags, "--drain-timeout-s", "60") as server:
            seconds, status = await twice(server)
            aborted.append(seconds)
            wrong += [] if status == 0 else [f"exit status {status} after the second signal"]
    slowest = percentile([one.seconds for one in refusals], 99) if refusals else 9.0
    told = f"{repeats} drains: {len(refusals)} refused with 503, p99 {ms(slowest)}; second signal {s(max(aborted))}"
    held = not wrong and bool(refusals) and slowest <= 0.05 * setting.slack and max(aborted) <= 1.0 * setting.slack
    return Found("; ".join([told, *wrong[:2]]), held)


async def once(server: Server, tokens: int) -> tuple[list[str], list[Answer]]:
    """What went wrong, and who was refused."""
    wrong, refused = list[str](), list[Answer]()
    async with client() as http:
        running = await accepted(http, server, tokens)
        server.signal(signal.SIGTERM)
        await asyncio.sleep(0.01)
        while not all(task.done() for task in running):
            late = await ask(http, server.url, "too late", 4)
            if late.status:  # 0: it was gone already
                refused.append(late)
            await asyncio.sleep(0.02)
        for answer in await asyncio.gather(*running):
            if not answer.complete:
                wrong.append(f"an accepted request got {answer.error or answer.status}")
    for late in refused:
        if late.status != 503 or late.retry_after is None:
            wrong.append(f"a late request got {late.status}, Retry-After {late.retry_after}")
    if status := await server.ended(30):
        wrong.append(f"exit status {status}")
    return wrong, refused


async def accepted(http: httpx.AsyncClient, server: Server, tokens: int) -> list[asyncio.Task[Answer]]:
    """One request of each client, all of which have a token."""
    answers = [Answer() for _ in range(CLIENTS)]
    running = [
        asyncio.create_task(ask(http, server.url, prompt, tokens, answer=answer))
        for prompt, answer in zip(prompts(CLIENTS), answers, strict=True)
    ]
    await under_way(answers, CLIENTS)
    return running


async def twice(server: Server) -> tuple[float, int]:
    """Seconds from the second signal to the end, and the exit status."""
    async with client() as http:
        running = await accepted(http, server, 4000)
        server.signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        server.signal(signal.SIGTERM)
        status = await server.ended(30)
        seconds = time.monotonic() - begin
        await asyncio.gather(*running)
    return seconds, status
