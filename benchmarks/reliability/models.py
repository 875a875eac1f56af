"""A model that is loaded and unloaded again and again: does every request get its answer, and all memory come back?"""

from __future__ import annotations

import statistics

import httpx
import psutil

from reliability.check import Found, Setting
from reliability.running import Server, client, serving, tiny_model

PROMPT = "river wheel mill water stone grain flour gate dam channel " * 8
CYCLES, SHORT_CYCLES = 1000, 40
WARM_UP = 0.2  # of the cycles
MOST_DRIFT = 0.02
SAMPLES = 5
FLAGS = ("--memory", "1GiB", "--max-context", "1024", "--threads", "1", "--explained", "10")


async def swapped(setting: Setting) -> Found:
    """1000 times loaded, asked and unloaded (a tiny model): 0 failures, every prefix found, memory back within 2%"""
    model, cycles = str(tiny_model(setting.folder / "swapped")), SHORT_CYCLES if setting.short else CYCLES
    async with serving(model, setting.folder, *FLAGS, *setting.flags) as server, client() as http:
        failed, found = 0, 0
        before: list[int] = []
        after: list[int] = []
        for at in range(cycles):
            cached = await _cycle(http, server)
            failed, found = failed + (cached is None), found + bool(cached)
            if at >= WARM_UP * cycles and len(before) < SAMPLES:
                before.append(await _rest(http, server))
            elif at >= cycles - SAMPLES:
                after.append(await _rest(http, server))
        loads = sum("ready after" in line for line in server.lines)
    first, last = statistics.median(before), statistics.median(after)
    drift = last / first - 1
    told = f"{loads} loads for {cycles} requests, {failed} failed, {found} found their prefix"
    told += f"; memory {first / 2**20:.0f} -> {last / 2**20:.0f} MiB ({drift:+.1%})"
    return Found(told, failed == 0 and loads >= cycles and found >= cycles - 1 and abs(drift) <= MOST_DRIFT)


async def _cycle(http: httpx.AsyncClient, server: Server) -> int | None:
    """A request that loads the model and lets it go. Returns how many tokens of its prompt were found; None if it
    failed. It is gone before the next one comes, or that would find it there."""
    body = {"prompt": PROMPT, "max_tokens": 2, "temperature": 0, "ignore_eos": True, "keep_alive": 0}
    response = await http.post(f"{server.url}/v1/completions", json=body)
    await _gone(http, server)
    if response.status_code != 200:
        return None
    usage = response.json()["usage"]
    return int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


async def _gone(http: httpx.AsyncClient, server: Server) -> None:
    """Until it is out of memory."""
    while (await http.get(f"{server.url}/v1/models")).json()["data"][0]["state"] != "cold":
        pass


async def _rest(http: httpx.AsyncClient, server: Server) -> int:
    """Resident bytes of the server and all that it has started, with nothing loaded. Not their share of pages (PSS):
    that of libraries falls when somebody else on the machine maps them too, and rises when they go."""
    await _gone(http, server)
    whole = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in (whole, *whole.children(recursive=True)))
