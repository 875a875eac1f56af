"""Clients on bare sockets: they may hang up at any moment, with FIN or with RST, and cost little, so that there can be
ten thousand of them. Also what a server says of itself in its metrics."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_AT_ONCE_CLOSED = struct.pack("ii", 1, 0)  # SO_LINGER with no time: close() sends RST
_PATIENCE_S = 120.0


class Broken(Exception):
    """The connection ended before the answer did, or the answer was an error."""


@dataclass(slots=True)
class Got:
    text: str = ""
    events: int = 0  # with a piece of text
    finish: str | None = None
    done: int = 0  # how often [DONE] came
    hung_up: bool = False


async def stream(url: str, body: Mapping[str, object], hang_up_after: int | None = None, rst: bool = False) -> Got:
    """One streamed completion; hangs up after so many events. Raises Broken where a user would ask again."""
    got = Got()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            reader, writer = await connect(url, "POST", "/v1/completions", dict(body) | {"stream": True})
            try:
                await _read(reader, got, hang_up_after)
            finally:
                hang_up(writer, rst and got.hung_up)
    except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error
    return got


async def connect(
    url: str, method: str, path: str, body: Mapping[str, object] | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """With the request sent."""
    at = urlsplit(url)
    reader, writer = await asyncio.open_connection(at.hostname, at.port)
    data = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: {at.netloc}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


def hang_up(writer: asyncio.StreamWriter, rst: bool) -> None:
    if rst:
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE_CLOSED)
        writer.transport.abort()
    else:
        writer.close()


async def _read(reader: asyncio.StreamReader, got: Got, hang_up_after: int | None) -> None:
    """Until the server closes, so that whatever it says after the end is seen too."""
    status = await reader.readline()
    if not status.startswith(b"HTTP/1.1 200"):
        raise Broken(status.decode("latin-1").strip() or "closed without an answer")
    while True:
        if got.events == hang_up_after:
            got.hung_up = True
            return
        line = await reader.readline()
        if not line:
            break
        if line.startswith(b"data: "):
            _take(line[6:].strip(), got)
    if not got.done or got.finish is None:
        raise Broken(f"the stream ended after {got.events} events")


def _take(data: bytes, got: Got) -> None:
    if data == b"[DONE]":
        got.done += 1
        return
    event = json.loads(data)
    if "error" in event:
        raise Broken(str(event["error"])[:200])
    for choice in event["choices"]:
        got.text += choice["text"]
        got.finish = choice["finish_reason"] or got.finish
        got.events += 1


async def metrics(url: str) -> dict[str, float]:
    """Every number of the metrics page by its bare name, summed over labels."""
    reader, writer = await connect(url, "GET", "/metrics")
    page = (await reader.read()).decode()
    writer.close()
    found: dict[str, float] = {}
    for line in page.partition("\r\n\r\n")[2].splitlines():
        name, _, value = line.rpartition(" ")
        if ":" in name and not name.startswith("#"):
            bare = name.split("{")[0].split(":", 1)[1]
            found[bare] = found.get(bare, 0.0) + float(value)
    return found


async def idle(url: str, timeout_s: float, every_s: float = 0.02) -> dict[str, float] | None:
    """The metrics once no request runs or waits and no KV block is held; None if that does not come to be."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        now = await metrics(url)
        if not (now["num_requests_running"] or now["num_requests_waiting"] or now["kv_cache_usage_perc"]):
            return now
        await asyncio.sleep(every_s)
    return None
