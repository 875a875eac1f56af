"""The process that computes is killed, stopped, or computes for ever: what the clients of that moment get."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from pathlib import Path

from reliability.check import Found, Setting, s
from reliability.running import Answer, Server, ask, client, prompts, serving, until

CLIENTS = 8
_REPEATS = 4  # kills of one server: it restarts its worker five times in ten minutes
_FAULTY = (sys.executable, str(Path(__file__).parent / "faulty.py"))


async def killed(setting: Setting) -> Found:
    """worker SIGKILL under 8 streams: seen in 2 s, every answer whole and the same as undisturbed, back in 10 s"""
    kills, tokens = (2, 60) if setting.short else (8, 120)
    rng = random.Random(0)
    seen, back, wrong, answers = list[float](), list[float](), list[str](), 0
    for begin in range(0, kills, _REPEATS):
        async with serving(setting.model, setting.folder, *setting.flags) as server, client() as http:
            expected = await everybody(server, tokens)
            for _ in range(begin, min(begin + _REPEATS, kills)):
                asking = asyncio.create_task(everybody(server, tokens))
                await asyncio.sleep(expected[0].seconds * rng.uniform(0.1, 0.7))
                server.worker.send_signal(signal.SIGKILL)
                seen.append(await until(http, server.url, False, 30))
                back.append(seen[-1] + await until(http, server.url, True, 60))
                got = await asking
                answers += len(got)
                wrong += differences(got, expected)
    ours = f"{kills} kills: seen in {s(max(seen))}, back in {s(max(back))}, {answers - len(wrong)} of {answers} whole"
    return Found(
        "; ".join([ours, *wrong[:2]]), not wrong and max(seen) <= 2 * setting.slack and max(back) <= 10 * setting.slack
    )


async def hung(setting: Setting) -> Found:
    """worker SIGSTOP, or a step without end: not ready 5 s after the last progress, back 15 s later, answers whole"""
    tokens = 60 if setting.short else 200
    found = []
    async with serving(setting.model, setting.folder, *setting.flags) as server:
        found.append(await one_hang(server, tokens, lambda: server.worker.send_signal(signal.SIGSTOP)))
    trap = setting.folder / "endless"
    command = (*_FAULTY, str(trap))
    async with serving(setting.model, setting.folder, *setting.flags, command=command) as server:
        found.append(await one_hang(server, tokens, trap.touch))
    wrong = [problem for _, _, problems in found for problem in problems]
    told = [
        f"{what}: seen in {s(seen)}, back in {s(back)}"
        for what, (seen, back, _) in zip(("stopped", "endless"), found, strict=True)
    ]
    held = not wrong and all(seen <= 5 * setting.slack and back <= 15 * setting.slack for seen, back, _ in found)
    return Found("; ".join([*told, *wrong[:2]]), held)


async def one_hang(server: Server, tokens: int, harm: object) -> tuple[float, float, list[str]]:
    """(seconds until it was not ready, until it was again, what was wrong with the answers)."""
    assert callable(harm)
    async with client() as http:
        expected = await everybody(server, tokens)
        asking = asyncio.create_task(everybody(server, tokens))
        await asyncio.sleep(expected[0].seconds * 0.4)
        harm()
        seen = await until(http, server.url, False, 30)
        back = seen + await until(http, server.url, True, 60)
        return seen, back, differences(await asking, expected)


async def everybody(server: Server, tokens: int) -> list[Answer]:
    """One answer for each client, all at once."""
    async with client() as http:
        return list(await asyncio.gather(*(ask(http, server.url, one, tokens, 7) for one in prompts(CLIENTS))))


def differences(got: list[Answer], expected: list[Answer]) -> list[str]:
    """What is wrong with each answer that is not as it should be."""
    wrong = []
    for at, (one, other) in enumerate(zip(got, expected, strict=True)):
        if not one.complete:
            wrong.append(f"client {at} got {one.error or f'status {one.status} and no end'}")
        elif one.text != other.text:
            wrong.append(f"client {at} got another text")
    return wrong
