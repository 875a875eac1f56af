"""Five times more requests than the server can compute, whether anybody is refused or not: what is still finished, how
long the queue gets, how fast it says no, and how soon all is as before."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from reliability.check import Found, Setting, ms, percentile, s
from reliability.running import Answer, ask, client, prompts, serving

RUNNING, QUEUE = 8, 16
TIMES = 5  # as many as the server can take
_SAME = 1.5  # a lone request takes at most so much longer than before: the server has recovered


@dataclass(slots=True)
class Crowd:
    """What became of everybody in one stretch of time."""

    begin_s: float
    end_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)  # in the queue, looked at again and again

    @property
    def refused(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == 429]

    @property
    def tokens_per_s(self) -> float:
        """Of answers that came whole, while the time ran."""
        whole = [answer for answer in self.answers if answer.complete]
        tokens = sum(self.begin_s <= at_s <= self.end_s for answer in whole for at_s in answer.token_s)
        return tokens / (self.end_s - self.begin_s)

    def wrong(self) -> list[str]:
        """Of those who were neither answered nor refused as they should be."""
        wrong = [
            f"a request got {answer.error or answer.status}"
            for answer in self.answers
            if not answer.complete and answer.status != 429
        ]
        return wrong + ["a refusal without Retry-After" for answer in self.refused if not answer.retry_after]


async def overloaded(setting: Setting) -> Found:
    """overload at 5x capacity: goodput >= 90 % of the peak, the queue within its limit, refusals in 50 ms (p99),
    recovered in 30 s"""
    seconds, tokens = (5.0, 300) if setting.short else (120.0, 32)
    bounds = ("--max-running", str(RUNNING), "--max-queue-requests", str(QUEUE))
    async with serving(setting.model, setting.folder, *bounds, *setting.flags) as server, client() as http:
        alone_s = percentile([(await ask(http, server.url, one, tokens)).seconds for one in prompts(5)], 50)
        peak = await saturated(http, server.url, min(seconds, 30.0), tokens)
        per_s = TIMES * peak.tokens_per_s / tokens
        flood = await flooded(http, server.url, seconds, tokens, per_s)
        recovered_s = await recovered(http, server.url, tokens, alone_s)
    return judged(peak, flood, recovered_s, per_s)


def judged(peak: Crowd, flood: Crowd, recovered_s: float, per_s: float) -> Found:
    ratio = flood.tokens_per_s / peak.tokens_per_s
    slowest = percentile([answer.seconds for answer in flood.refused], 99) if flood.refused else 9.0
    wrong, longest = [*peak.wrong(), *flood.wrong()], max(flood.waiting, default=QUEUE + 1)
    told = [
        f"{len(flood.answers)} requests in {flood.end_s - flood.begin_s:.0f} s, {per_s:.1f} each second",
        f"goodput {100 * ratio:.0f} % of {peak.tokens_per_s:.0f} tokens/s",
        f"queue at most {longest} of {QUEUE}",
        f"{len(flood.refused)} refused, p99 {ms(slowest)}",
        f"recovered in {s(recovered_s)}",
        *wrong[:2],
    ]
    held = ratio >= 0.9 and longest <= QUEUE and slowest <= 0.05 and recovered_s <= 30 and not wrong
    return Found("; ".join(told), held)


async def saturated(http: httpx.AsyncClient, url: str, seconds: float, tokens: int) -> Crowd:
    """The most that the server computes: everybody asks again as soon as there is an answer, and some always wait."""
    stop, crowd = asyncio.Event(), Crowd(0.0)

    async def again(prompt: str) -> None:
        while not stop.is_set():
            crowd.answers.append(await ask(http, url, prompt, tokens))

    running = [asyncio.create_task(again(one)) for one in prompts(RUNNING + QUEUE // 2)]
    async with looking(url, crowd.waiting):
        await asyncio.sleep(1)
        crowd.begin_s = time.monotonic()
        await asyncio.sleep(seconds)
        crowd.end_s = time.monotonic()
    stop.set()
    await asyncio.gather(*running)
    return crowd


async def flooded(http: httpx.AsyncClient, url: str, seconds: float, tokens: int, per_s: float) -> Crowd:
    """Requests come as in a Poisson process, whatever became of those before."""
    rng, known, asking = random.Random(0), prompts(64), list[asyncio.Task[Answer]]()
    crowd = Crowd(time.monotonic())
    async with looking(url, crowd.waiting):
        next_s = crowd.begin_s
        while (next_s := next_s + rng.expovariate(per_s)) < crowd.begin_s + seconds:
            await asyncio.sleep(next_s - time.monotonic())
            asking.append(asyncio.create_task(ask(http, url, known[len(asking) % len(known)], tokens)))
        crowd.end_s = time.monotonic()
        crowd.answers = await asyncio.gather(*asking)
    return crowd


@asynccontextmanager
async def looking(url: str, waiting: list[int]) -> AsyncIterator[None]:
    """At the length of the queue, as the server tells it, again and again. It takes time of the same cores, so it goes
    on in every stretch that is compared."""

    async def look() -> None:
        async with client() as http:
            while True:
                page = (await http.get(url + "/metrics")).text
                lengths = re.findall(r"^\w+:num_requests_waiting\S* (\S+)$", page, re.M)
                waiting.extend(int(float(length)) for length in lengths)
                await asyncio.sleep(0.2)

    task = asyncio.create_task(look())
    yield
    task.cancel()
    await asyncio.wait((task,))
    assert task.cancelled(), "nobody looked at the queue"


async def recovered(http: httpx.AsyncClient, url: str, tokens: int, alone_s: float) -> float:
    """Seconds until a lone request takes as long as one did before; an hour if it does not happen within one minute."""
    begin = time.monotonic()
    while time.monotonic() - begin < 60:
        answer = await ask(http, url, prompts(1)[0], tokens)
        if answer.complete and answer.seconds <= _SAME * alone_s:
            return time.monotonic() - begin
    return 3600.0
