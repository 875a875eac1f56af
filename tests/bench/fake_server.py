"""A fake OpenAI server on real sockets, made of asyncio streams: each test says what it answers, byte by byte."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

Answer = Callable[["Call", asyncio.StreamWriter], Awaitable[None]]


class Call:
    """One request as the server saw it."""

    def __init__(self, head: str, body: bytes) -> None:
        first, *lines = head.split("\r\n")
        self.method, self.path, _ = first.split(" ")
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        self.body = body

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert isinstance(value, dict)
        return value


class FakeServer:
    """Answers every request with `answer`; remembers calls and counts connections."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.calls: list[Call] = []
        self.connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next((int(x.split(":")[1]) for x in head.split("\r\n") if x.startswith("Content-Length")), 0)
                call = Call(head, await reader.readexactly(length))
                self.calls.append(call)
                await self.answer(call, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[FakeServer]:
    fake = FakeServer(answer)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    fake.port = server.sockets[0].getsockname()[1]
    try:
        yield fake
    finally:
        server.close()


def raw(*pieces: bytes, close: bool = False) -> Answer:
    """Writes these bytes; the writes are separate, which TCP may or may not preserve."""

    async def answer(_: Call, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if close:
            writer.close()

    return answer


def fixed(body: bytes, status: str = "200 OK", headers: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nServer: fake/1\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: dict[str, Any] | None) -> bytes:
    """One server-sent event; None is the end mark."""
    return b"data: " + (b"[DONE]" if value is None else json.dumps(value).encode()) + b"\n\n"


def completion(tokens: int, prompt_tokens: int = 3, cached: int = 1) -> list[bytes]:
    """The events of an answer of so many tokens."""
    made = [
        event({"choices": [{"text": " x", "finish_reason": "length" if i == tokens - 1 else None}]})
        for i in range(tokens)
    ]
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    return [*made, event({"choices": [], "usage": usage}), event(None)]


SSE_HEAD = b"HTTP/1.1 200 OK\r\nServer: fake/1\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def openai(call: Call, writer: asyncio.StreamWriter) -> None:
    """A well-behaved server."""
    if call.method == "GET":
        writer.write(fixed(b'{"data": [{"id": "tiny"}, {"id": "other"}]}'))
        return
    prompt = call.json.get("prompt", "")
    writer.write(SSE_HEAD)
    for part in completion(call.json["max_tokens"], len(prompt)):
        writer.write(chunk(part))
        await writer.drain()
    writer.write(chunk(b""))
