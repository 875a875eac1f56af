"""Clients that hang up: at once, before the first token, in the middle, with FIN and with RST."""

from __future__ import annotations

import asyncio
import random
import time

from reliability.check import Found, Setting, ms, percentile
from reliability.raw import Broken, connect, hang_up, idle, metrics, stream
from reliability.running import prompts, serving

AT_ONCE = 32
_PROMPTS = prompts(40, 60)


async def left(setting: Setting) -> Found:
    """FIN or RST of a client ends its request and frees its KV in 200 ms (p99); after 10,000 random hang-ups nothing is
    left of them"""
    trials, clients = (6, 200) if setting.short else (60, 10_000)
    flags = (*setting.flags, "--kv-memory", "128MiB", "--max-context", "2048")
    async with serving(setting.model, setting.folder, *flags) as server:
        await stream(server.url, body(0, 2))
        freed = [await one(server.url, trial) for trial in range(trials)]
        hung_up, broken = await storm(server.url, clients)
        after = await idle(server.url, 10)
        started = trials + 1 + clients
    told = f"freed in {ms(percentile(freed, 50))} (p50), {ms(percentile(freed, 99))} (p99)"
    told += f"; {hung_up:,} of {clients:,} hung up: "
    if after is None:
        return Found(f"{told}requests or KV blocks were left", False)
    ended = int(after["request_success_total"])
    told += f"nothing left; {ended:,} requests of at most {started:,} ended once"
    held = percentile(freed, 99) <= 0.2 and not broken and ended <= started and hung_up > clients / 3
    return Found("; ".join([told, *broken[:2]]), held)


def body(at: int, tokens: int) -> dict[str, object]:
    return {"prompt": _PROMPTS[at % len(_PROMPTS)], "max_tokens": tokens, "temperature": 0, "ignore_eos": True}


async def one(url: str, trial: int) -> float:
    """Seconds from hanging up until nothing of the request is left. Every third leaves before its first token."""
    reader, writer = await connect(url, "POST", "/v1/completions", body(trial, 1500) | {"stream": True})
    if trial % 3:
        await reader.readuntil(b"data: ")
    else:
        await metrics(url)  # by its answer the request has arrived, and is computed or about to be
    begin = time.monotonic()
    hang_up(writer, rst=trial % 2 == 0)
    if await idle(url, 10, every_s=0.005) is None:
        return 10.0
    return time.monotonic() - begin


async def storm(url: str, clients: int) -> tuple[int, list[str]]:
    """(how many hung up, what went wrong for those who stayed)."""
    at_once, broken = asyncio.Semaphore(AT_ONCE), list[str]()

    async def client(seed: int) -> bool:
        rng = random.Random(seed)
        after = rng.choice([0, 1, rng.randrange(40), None])
        async with at_once:
            try:
                got = await stream(url, body(seed, rng.randrange(1, 40)), after, rst=rng.random() < 0.5)
            except Broken as error:
                broken.append(str(error))
                return False
            return got.hung_up

    return sum(await asyncio.gather(*map(client, range(clients)))), broken
