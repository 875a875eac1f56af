"""Pages about the server itself, while it computes as much as it can."""

from __future__ import annotations

import asyncio
import time

from reliability.check import Found, Setting, ms, percentile
from reliability.running import ask, client, prompts, serving

PATHS = ("/health/ready", "/health/live", "/metrics", "/v1/models")
CLIENTS = 16


async def answers(setting: Setting) -> Found:
    """/health, /metrics and /v1/models answer in 50 ms (p99) while the engine is saturated"""
    seconds_each = 3.0 if setting.short else 20.0
    async with serving(setting.model, setting.folder, *setting.flags) as server, client() as http, client() as probe:
        stop = asyncio.Event()

        async def load(prompt: str) -> None:
            while not stop.is_set():
                await ask(http, server.url, prompt, 60)

        running = [asyncio.create_task(load(one)) for one in prompts(CLIENTS, 200)]
        await asyncio.sleep(1)
        taken: dict[str, list[float]] = {path: [] for path in PATHS}
        begin = time.monotonic()
        while time.monotonic() - begin < seconds_each:
            for path in PATHS:
                asked = time.monotonic()
                response = await probe.get(server.url + path)
                assert response.status_code == 200
                taken[path].append(time.monotonic() - asked)
            await asyncio.sleep(0.1)
        stop.set()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    worst = {path: percentile(values, 99) for path, values in taken.items()}
    told = ", ".join(f"{path} {ms(percentile(taken[path], 50))} / {ms(worst[path])}" for path in PATHS)
    return Found(f"p50 / p99: {told}", max(worst.values()) <= 0.05)
