"""Microseconds the gateway spends on one streamed token: 64 streams, no engine, no socket and then real sockets.

    python benchmarks/gateway_overhead.py [streams] [tokens]

A service that always has the next token ready leaves nothing but the gateway's own work to measure: merging, decoding,
encoding and framing, and with sockets also the web server's. The sockets' row includes the client that reads.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncIterator

import msgspec
from starlette.types import ASGIApp, Message
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.ports import Capacity, Status
from headrace.core.types import FinishReason, Output, Request, Usage
from headrace.gateway.app import build
from headrace.gateway.server import serve
from headrace.gateway.text import Text


class Ready:
    """A service whose next token is always there; it yields to the other streams after each."""

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        for at in range(request.max_new_tokens):
            await clock.sleep(0)
            last = at + 1 == request.max_new_tokens
            usage = Usage(request.prompt_tokens, at + 1, 0) if last else None
            yield Output(request.id, (at % 90 + 3,), finish=FinishReason.LENGTH if last else None, usage=usage)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        raise AssertionError("nothing here is aborted")

    def status(self) -> Status:
        return Status("ready", "ready", Capacity(1, 16, 1 << 20, 300), 0, 0, 0, 0, 0, 0.0)

    async def drain(self, timeout_s: float) -> bool:
        return True


def text() -> Text:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: at for at, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Text(tokenizer.to_str(), "{{ messages[0].content }}", {}, frozenset(), add_bos=False)


def body(tokens: int, **more: object) -> bytes:
    messages = [{"role": "user", "content": "hello"}]
    return msgspec.json.encode({"messages": messages, "max_tokens": tokens, "stream": True, **more})


async def inside(app: ASGIApp, data: bytes) -> None:
    """One stream through the application, without a socket."""
    done = asyncio.Event()
    waiting: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await done.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body" and not message["more_body"]:
            done.set()

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    await app(scope, receive, send)


async def outside(port: int, data: bytes) -> None:
    """One stream over a socket."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    while await reader.read(1 << 16):
        pass
    writer.close()


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def main(streams: int, tokens: int) -> None:
    service, settings = Ready(), GatewaySettings(port=0)
    app = build(service, text(), settings, Metrics())
    urls: asyncio.Queue[str] = asyncio.Queue()
    serving = asyncio.create_task(serve(app, service, settings, urls.put_nowait))
    port = int((await urls.get()).rsplit(":", 1)[1])
    print(f"{streams} streams of {tokens} tokens; microseconds per token, wall and processor")
    for name, more in (("plain", {}), ("4 stop strings", {"stop": ["zzzz", "yyyy", "xxxx", "<end>"]})):
        data = body(tokens, **more)
        for where in ("application", "sockets"):
            begin_s, begin_cpu_s = clock.perf(), cpu_s()
            work = [inside(app, data) if where == "application" else outside(port, data) for _ in range(streams)]
            await asyncio.gather(*work)
            wall, cpu = (clock.perf() - begin_s), (cpu_s() - begin_cpu_s)
            per = 1e6 / (streams * tokens)
            print(f"  {name:16} {where:12} {wall * per:7.1f} {cpu * per:7.1f}")
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    clock.run(main(*(arguments + [64, 500][len(arguments) :])))
