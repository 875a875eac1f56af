"""Thousands of real requests to a server that is killed again and again, some of them given up by their clients: is
each of the others answered, whole, as if nothing had happened, and once?"""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter, deque
from dataclasses import dataclass, field

from reliability.check import Found, Setting
from reliability.raw import Broken, Got, idle, stream
from reliability.running import Server, prompts, serving

CLIENTS = 32
GIVE_UP = 0.2
_PROMPTS = prompts(25, 12)


@dataclass
class Tally:
    expected: dict[int, Got]
    left: deque[int]  # requests that nobody has answered yet
    whole: Counter[int] = field(default_factory=Counter)  # answers by request
    given_up: int = 0
    told: int = 0  # breaks that a client saw, and asked again
    wrong: list[str] = field(default_factory=list)

    @property
    def done(self) -> int:
        return self.whole.total() + self.given_up


async def answered(setting: Setting) -> Found:
    """10,000 requests, a fifth given up by their clients, ten SIGKILLs of the server or its worker: none of the others
    lost, doubled, or cut short without an error"""
    count, kills = (240, 2) if setting.short else (10_000, 10)
    flags = (*setting.flags, "--kv-memory", "64MiB", "--max-context", "512")
    tally, leftover = Tally({}, deque(range(count))), 0
    for life in range(kills + 1):
        async with serving(setting.model, setting.folder, *flags) as server:
            if not tally.expected:
                tally.expected = {at: await stream(server.url, body(at)) for at in range(len(_PROMPTS))}
            await one_life(server, tally, None if life == kills else count * (life + 1) // (kills + 1), life)
            leftover += life == kills and await idle(server.url, 10) is None
    lost = count - tally.given_up - len(tally.whole)
    doubled = tally.whole.total() - len(tally.whole)
    told = f"{count:,} requests, {kills} kills: {len(tally.whole):,} whole and as undisturbed, {tally.given_up:,} "
    told += f"given up, {lost} lost, {doubled} doubled; {tally.told} breaks, each with an error, asked again"
    held = not (lost or doubled or tally.wrong or leftover or tally.left) and tally.told > 0
    return Found("; ".join([told, *tally.wrong[:2], *(["something was left at the end"] if leftover else [])]), held)


def body(at: int) -> dict[str, object]:
    prompt = _PROMPTS[at % len(_PROMPTS)]
    tokens = 4 + at % len(_PROMPTS)
    return {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": at % len(_PROMPTS), "ignore_eos": True}


async def one_life(server: Server, tally: Tally, until: int | None, life: int) -> None:
    """Answer requests until so many are done, then kill; None: all of them, and let live."""
    gone = asyncio.Event()

    async def client(name: int) -> None:
        rng = random.Random(1000 * life + name)
        while tally.left and not gone.is_set():
            await one_request(server, tally, tally.left.popleft(), rng)
            if until is not None and tally.done >= until and not gone.is_set():
                gone.set()
                await asyncio.sleep(rng.random() * 0.02)
                kill(server, life)

    await asyncio.gather(*map(client, range(CLIENTS)))


def kill(server: Server, life: int) -> None:
    """Every other time only the worker, where there is one."""
    if life % 2:
        try:
            server.worker.send_signal(signal.SIGKILL)
            return
        except LookupError:
            pass
    server.signal(signal.SIGKILL)


async def one_request(server: Server, tally: Tally, number: int, rng: random.Random) -> None:
    expected = tally.expected[number % len(_PROMPTS)]
    gives_up = rng.randrange(expected.events) if rng.random() < GIVE_UP else None
    try:
        got = await stream(server.url, body(number), gives_up, rst=rng.random() < 0.5)
    except Broken:
        tally.told += 1
        tally.left.append(number)
        return
    if got.hung_up:
        tally.given_up += 1
        if not expected.text.startswith(got.text):
            tally.wrong.append(f"request {number} began with {got.text!r:.80}")
        return
    tally.whole[number] += 1
    if (got.text, got.finish, got.done) != (expected.text, expected.finish, 1):
        tally.wrong.append(f"request {number} got {got.text!r:.80} instead of {expected.text!r:.80}")
