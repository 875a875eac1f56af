"""A thousand clients that hang up at random moments: are all blocks free afterwards, is the memory flat?

Clients stream completions over real sockets, 32 at a time, and close theirs after a random number of events, some
before the first, some never. Afterwards the server must hold no block and no request; its resident memory is read
every hundred clients.

    python benchmarks/disconnects.py [--clients 1000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from urllib.parse import urlsplit

import psutil
from server import serving

from headrace.core import clock

AT_ONCE = 32
MODEL = "headrace"


async def client(host: str, port: int, rng: random.Random) -> bool:
    """Ask for up to 64 tokens, hang up early three times out of four. True if it hung up."""
    events = rng.choice([0, 1, rng.randrange(60), 1000])
    prompt = [rng.randrange(1000, 30000) for _ in range(rng.randrange(1, 200))]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": rng.randrange(1, 64), "stream": True, "ignore_eos": True}
    data = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    try:
        while events > 0:
            line = await reader.readline()
            if line.startswith(b"data: [DONE]") or not line:
                return False
            events -= line.startswith(b"data:")
        return True
    finally:
        writer.close()


async def storm(host: str, port: int, pid: int, clients: int) -> list[int]:
    """Run all clients; resident bytes of the server after every hundredth."""
    rng, process = random.Random(0), psutil.Process(pid)
    limit, resident, hung_up = asyncio.Semaphore(AT_ONCE), [], 0

    async def one(seed: int) -> bool:
        async with limit:
            return await client(host, port, random.Random(seed))

    for begin in range(0, clients, 100):
        count = min(100, clients - begin)
        hung_up += sum(await asyncio.gather(*(one(rng.randrange(2**32)) for _ in range(count))))
        resident.append(process.memory_info().rss)
        print(f"{begin + count} clients, {hung_up} hung up, resident {resident[-1] / 2**20:.0f} MiB", flush=True)
    return resident


async def gauges(host: str, port: int) -> dict[str, float]:
    """Every plain gauge of the server's metrics page by its bare name."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"GET /metrics HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
    text = (await reader.read()).decode()
    writer.close()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and line[0] != "#" and ":" in line]
    return {name.split(":", 1)[1].split("{")[0]: float(value) for name, value in lines if _is_number(value)}


def _is_number(text: str) -> bool:
    return text.replace(".", "").replace("e", "").replace("+", "").replace("-", "").isdigit()


async def main_async(url: str, pid: int, clients: int) -> None:
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 0
    resident = await storm(host, port, pid, clients)
    for _ in range(100):
        after = await gauges(host, port)
        if not after["num_requests_running"] and not after["num_requests_waiting"]:
            break
        await clock.sleep(0.1)
    print(f"running {after['num_requests_running']:.0f}, waiting {after['num_requests_waiting']:.0f}, "
          f"KV in use {100 * after['kv_cache_usage_perc']:.2f} %")  # fmt: skip
    half = len(resident) // 2
    growth = resident[-1] - resident[half]
    print(f"resident memory over the second half: {growth / 2**20:+.1f} MiB ({100 * growth / resident[half]:+.2f} %)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    args = parser.parse_args()
    # a small KV memory, so that its pages have all been touched long before the second half
    with serving("smollm2", "--kv-memory", "512MiB", "--max-context", "2048", "--served-name", MODEL) as (url, pid):
        clock.run(main_async(url, pid, args.clients))


if __name__ == "__main__":
    main()
