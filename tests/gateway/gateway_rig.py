"""What gateway tests share: a service that answers by rote, tokenizers built in code, and a real server on a socket."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.ports import Capacity, Status
from headrace.core.types import FinishReason, Output, Request, TokenLogprob, Unavailable, Usage
from headrace.gateway.app import build
from headrace.gateway.checks import Checks
from headrace.gateway.endpoints import Extras
from headrace.gateway.server import serve
from headrace.gateway.text import Text

SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
BOS, IM_START, EOS = range(3)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = "The headrace feeds the wheel: água, 水, 🌊 and more. "
LEAK = re.compile(rb"0x[0-9a-f]{6,}|Traceback|site-packages|/(?:home|root|tmp|usr)/|\.py\b")  # of a server's insides
_CORPUS = [ANSWER, "hello world, what is a headrace? system user assistant"] * 3


def byte_level_json() -> str:
    """A byte-level BPE tokenizer small enough to train here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return str(tokenizer.to_str())


def fallback_json() -> str:
    """A SentencePiece-like tokenizer: pieces with U+2581 for spaces, and bytes for what has no piece."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefghijklmnop", "é"]
    vocab = {word: at for at, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return str(tokenizer.to_str())


BYTE_LEVEL = byte_level_json()


def make_text(template: str | None = TEMPLATE, tokenizer_json: str = BYTE_LEVEL, add_bos: bool = False) -> Text:
    special = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS]}
    return Text(tokenizer_json, template, special, frozenset({EOS}), add_bos)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(Tokenizer.from_str(BYTE_LEVEL).encode(text, add_special_tokens=False).ids)


@dataclass
class RoteService:
    """Answers every request with the same tokens, over and over, one per step; keeps account of every request."""

    answer: Sequence[int] = field(default_factory=lambda: ids_of(ANSWER))
    context_tokens: int = 4096
    refuse: Exception | None = None  # raised before the first output
    break_after: int | None = None  # a failed step after so many tokens
    stall_after: int | None = None  # no further token until aborted
    pace_s: float = 0.0  # duration of a step
    cached_tokens: int = 3
    drain_result: bool = True
    state: str = "ready"
    started: list[Request] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)  # had their last output
    aborted: list[str] = field(default_factory=list)  # by abort(), or closed before their last output
    open: set[str] = field(default_factory=set)
    _told: set[str] = field(default_factory=set)

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        if self.state == "draining":
            raise Unavailable("draining")
        if self.refuse is not None:
            raise self.refuse
        self.started.append(request)
        self.open.add(request.id)
        try:
            for at in range(request.max_new_tokens):
                await asyncio.sleep(self.pace_s)
                while self.stall_after == at and request.id not in self._told:
                    await asyncio.sleep(0.001)
                if request.id in self._told:
                    yield self._last(request, at, FinishReason.ABORT)
                    return
                if self.break_after == at:
                    yield self._last(request, at, FinishReason.ERROR, error="secret 0xdeadbeef /usr/lib\n")
                    return
                output = self._token(request, at)
                yield output
                if output.finish:
                    return
        finally:
            if request.id not in self.ended:
                self.aborted.append(request.id)
            self.open.discard(request.id)

    def _token(self, request: Request, at: int) -> Output:
        token = self.answer[at % len(self.answer)]
        finish = FinishReason.LENGTH if at + 1 == request.max_new_tokens else None
        finish = FinishReason.STOP if token in request.stop_token_ids else finish
        usage = self._usage(request, at + 1) if finish else None
        if finish:
            self.ended.append(request.id)
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if request.sampling.prompt_logprobs is not None and at == 0:
            prompt = request.prompt_ids() or ()
            prompt_logprobs = tuple(logprob(one, request.sampling.prompt_logprobs) for one in prompt[1:])
        wanted = request.sampling.logprobs
        logprobs = () if wanted is None else (logprob(token, wanted),)
        return Output(request.id, (token,), logprobs, prompt_logprobs, finish, usage)

    def _last(self, request: Request, tokens: int, finish: FinishReason, error: str | None = None) -> Output:
        self.ended.append(request.id)
        return Output(request.id, finish=finish, usage=self._usage(request, tokens), error=error)

    def _usage(self, request: Request, tokens: int) -> Usage:
        return Usage(request.prompt_tokens, tokens, self.cached_tokens)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        if request_id in self.open:
            self.aborted.append(request_id)
            self._told.add(request_id)

    def status(self) -> Status:
        capacity = Capacity(64, 16, self.context_tokens, 1000)
        return Status("rote", self.state, capacity, len(self.open), 0, 0, 16, 7, 0.0)

    async def drain(self, timeout_s: float) -> bool:
        self.state = "draining"
        deadline_s = clock.now() + timeout_s
        while self.open and clock.now() < deadline_s:
            await asyncio.sleep(0.005)
        clean = not self.open
        for request_id in list(self.open):
            self.abort(request_id)
        while self.open:
            await asyncio.sleep(0.005)
        return clean


def logprob(token: int, top: int) -> TokenLogprob:
    """Recognisable numbers: -token/100, and the likeliest are the token's neighbours."""
    return TokenLogprob(token, -token / 100, tuple((token + at, -(token + at) / 100) for at in range(top)))


@dataclass
class Running:
    """A server in a thread of its own."""

    url: str
    host: str
    port: int
    service: RoteService
    loop: asyncio.AbstractEventLoop

    def on_loop(self, ask: Callable[[], Any]) -> Any:
        async def asked() -> Any:
            return ask()

        return asyncio.run_coroutine_threadsafe(asked(), self.loop).result(10)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=20)


@contextmanager
def running(
    service: RoteService,
    text: Text | None = None,
    settings: GatewaySettings | None = None,
    extras: Extras | None = None,
    checks: Checks | None = None,
) -> Iterator[Running]:
    settings = settings or GatewaySettings(port=0)
    app = build(service, text or make_text(), settings, Metrics(), extras, checks)
    listening = threading.Event()
    found: dict[str, Any] = {}

    async def main() -> None:
        found["loop"], found["task"] = asyncio.get_running_loop(), asyncio.current_task()

        def announce(url: str) -> None:
            found["url"] = url
            listening.set()

        await serve(app, service, settings, announce)

    def run() -> None:
        try:
            clock.run(main())
        except asyncio.CancelledError:
            pass
        finally:
            listening.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert listening.wait(20) and "url" in found
    host, port = found["url"].removeprefix("http://").rsplit(":", 1)
    try:
        yield Running(found["url"], host, int(port), service, found["loop"])
    finally:
        found["loop"].call_soon_threadsafe(found["task"].cancel)
        thread.join(20)
        assert not thread.is_alive()
    assert not service.open, "a request outlived its server"


def http_bytes(path: str, body: bytes, headers: str = "", method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One response with a content length."""
    stream = connection.makefile("rb")
    status = int(stream.readline().split()[1])
    headers: dict[str, str] = {}
    while line := stream.readline().strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers, stream.read(int(headers.get("content-length", "0")))


async def ask(
    app: ASGIApp, path: str, body: bytes = b"", method: str = "POST", headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """One request without a socket. The client stays until it has its answer."""
    answered = asyncio.Event()
    sent: list[dict[str, Any]] = []
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    names = {"host": "localhost", "content-type": "application/json"} | (headers or {})
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in names.items()],
    }

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        await answered.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            answered.set()

    await app(scope, receive, send)
    got = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], got, b"".join(message.get("body", b"") for message in sent[1:])


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4} | fields).encode()


def events_of(body: bytes) -> list[Any]:
    """Server-sent events, with the framing checked."""
    assert body.endswith(b"\n\n")
    lines = body.removesuffix(b"\n\n").split(b"\n\n")
    assert all(line.startswith(b"data: ") and b"\n" not in line for line in lines)
    assert lines[-1] == b"data: [DONE]"
    return [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
