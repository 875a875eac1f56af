"""A stream while somebody else's very long prompt is computed: how long it stands still."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

from reliability.check import Found, Setting, ms, percentile, s
from reliability.running import Answer, ask, client, prompts, serving

INTER_TOKEN_MS = 250  # what the server is asked for, and its default
PROMPT_TOKENS = 8000
_LONGEST_S = 300.0


async def unbroken(setting: Setting) -> Found:
    """a stream beside a prompt of 8,000 tokens: no gap longer than twice --inter-token-ms (250)"""
    repeats, flags = 1 if setting.short else 3, ("--inter-token-ms", str(INTER_TOKEN_MS), *setting.flags)
    gaps, firsts = list[float](), list[float]()
    async with serving(setting.model, setting.folder, *flags) as server:
        for at in range(repeats):
            beside, first_s = await beside_a_long_one(server.url, at)
            gaps += beside
            firsts.append(first_s)
    told = f"{len(gaps)} gaps: p50 {ms(percentile(gaps, 50))}, longest {ms(max(gaps))}"
    held = max(gaps) <= 2 * INTER_TOKEN_MS / 1000 * setting.slack
    return Found(f"{told}; the long prompt's first token after {s(percentile(firsts, 50))}", held)


async def beside_a_long_one(url: str, number: int) -> tuple[list[float], float]:
    """(gaps of the stream that overlap the long prompt, seconds until that one's first token)."""
    stream, long = Answer(), Answer()
    prompt = [20 + (at * (number + 3)) % 50 for at in range(PROMPT_TOKENS)]  # of each repetition another one
    async with client() as http:
        streaming = asyncio.create_task(ask(http, url, prompts(1)[0], 3000, answer=stream))
        try:
            await pieces(stream, 5)
            begin = time.monotonic()
            asking = asyncio.create_task(ask(http, url, prompt, 4, answer=long))
            await asyncio.wait({asking}, timeout=_LONGEST_S)
            assert long.complete and long.token_s, f"the long prompt got {long.error or long.status}"
            await pieces(stream, 1 + sum(at <= long.token_s[0] for at in stream.token_s))
        finally:
            streaming.cancel()
            await asyncio.gather(streaming, return_exceptions=True)
    times = stream.token_s
    gaps = [b - a for a, b in pairwise(times) if b >= begin and a <= long.token_s[0]]
    return gaps, long.token_s[0] - begin


async def pieces(answer: Answer, count: int) -> None:
    """Until so many have come; raises TimeoutError."""
    begin = time.monotonic()
    while answer.tokens < count:
        if answer.done or answer.error or time.monotonic() - begin > _LONGEST_S:
            raise TimeoutError(f"the stream has ended, or stands still: {answer.error or answer.tokens}")
        await asyncio.sleep(0.01)
