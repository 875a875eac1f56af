"""A small HTTP/1.1 client that notes when every piece of an answer arrived, and parses nothing else while it runs.

The load generator often shares a machine with the server, so a token costs one callback, one clock reading and one
list entry. `httptools` does the framing (lengths, chunks, keep-alive). Owns the connections; knows no JSON and no SSE.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass, field

import httptools

from headrace import __version__
from headrace.bench.settings import Target
from headrace.core.clock import now

MAX_BODY_BYTES = 64 << 20
_MAX_HEAD_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request does not count: `kind` is what failures are counted by, `message` one example of it."""

    kind: str  # "connect", "timeout", "closed early", "not HTTP", "http 429", "server error", ...
    message: str


@dataclass(slots=True)
class Exchange:
    """One request and all that came back. Times are of `core.clock.now`."""

    sent_s: float  # before connecting
    ended_s: float = 0.0
    status: int = 0  # 0: no status line came
    server: str = ""  # the Server header
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    body_bytes: int = 0
    failure: Failure | None = None

    @property
    def body(self) -> bytes:
        return b"".join(chunk for _, chunk in self.chunks)


class Client:
    """Sends requests to one server. Reuses idle connections; opens one whenever none is idle."""

    def __init__(
        self, target: Target, *, api_key: str | None = None, timeout_s: float = 600.0, keep_alive: bool = True
    ):
        self._target = target
        self._timeout_s = timeout_s
        self._keep_alive = keep_alive
        self._tls = ssl.create_default_context() if target.secure else None
        self._idle: list[_Connection] = []
        self._headers = _common_headers(target, api_key, keep_alive)

    async def post(self, path: str, body: bytes) -> Exchange:
        """POST JSON to a path below the base URL. Never raises for what network or server do: see `failure`."""
        return await self._exchange("POST", path, body)

    async def get(self, path: str) -> Exchange:
        return await self._exchange("GET", path, b"")

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()

    async def _exchange(self, method: str, path: str, body: bytes) -> Exchange:
        length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if method == "POST" else ""
        head = f"{method} {self._target.path}{path} HTTP/1.1\r\n{self._headers}{length}\r\n".encode()
        exchange = Exchange(now())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._perform(head + body, exchange)
        except TimeoutError:
            exchange.failure = Failure("timeout", f"no complete answer within {self._timeout_s:g} s")
        exchange.ended_s = now()
        return exchange

    async def _perform(self, request: bytes, exchange: Exchange) -> None:
        """Use an idle connection if there is one. It may have been closed by the server while we were writing: if
        nothing at all came back, a fresh connection gets its turn."""
        if idle := self._take_idle():
            await self._converse(idle, request, exchange)
            if exchange.failure is None or exchange.failure.kind != "closed early" or exchange.status:
                return
            exchange.failure = None
        if fresh := await self._connect(exchange):
            await self._converse(fresh, request, exchange)

    async def _converse(self, connection: _Connection, request: bytes, exchange: Exchange) -> None:
        try:
            reusable = await connection.converse(request, exchange)
        except BaseException:  # timeout or cancellation: half an answer is still on its way
            connection.abort()
            raise
        if reusable and self._keep_alive:
            self._idle.append(connection)
        else:
            connection.abort()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.open:
                return connection
        return None

    async def _connect(self, exchange: Exchange) -> _Connection | None:
        loop, target = asyncio.get_running_loop(), self._target
        try:
            _, connection = await loop.create_connection(_Connection, target.host, target.port, ssl=self._tls)
        except (OSError, UnicodeError) as error:  # refused, unknown host, bad certificate, out of descriptors
            exchange.failure = Failure("connect", f"cannot connect to {target.authority}: {error}")
            return None
        return connection


class _Connection(asyncio.Protocol):
    """One TCP connection; at most one exchange at a time. The parser calls the `on_...` methods."""

    def __init__(self) -> None:
        self.open = False
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._done: asyncio.Future[bool] | None = None
        self._arrived_s = 0.0
        self._start_message()

    async def converse(self, request: bytes, exchange: Exchange) -> bool:
        """Send and wait for the end of the answer. True if the connection can be used again."""
        self._exchange, self._done = exchange, asyncio.get_running_loop().create_future()
        self._start_message()
        if self.open:
            self._transport.write(request)
        else:
            self._fail("closed early", "the server closed the connection before the request was sent")
        return await self._done

    def abort(self) -> None:
        self.open = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._arrived_s = now()  # one reading for all that arrived together
        if self._exchange is None:  # talk after the end of an answer: nothing we could trust
            self.abort()
            return
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail("not HTTP", f"the answer is not HTTP/1.1: {error or type(error).__name__}")
        if not self._in_body and self._head_bytes > _MAX_HEAD_BYTES:
            self._fail("too large", f"the answer's headers exceed {_MAX_HEAD_BYTES >> 10} KiB")

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        if self._in_body and self._until_close and exc is None:
            self._finish(False)
        self._fail("closed early", f"the server closed the connection before the end of its answer ({exc or 'EOF'})")

    def on_message_begin(self) -> None:
        if self._exchange is None:  # a second answer in the same packet
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.lower()
        if key in (b"content-length", b"transfer-encoding"):
            self._until_close = False
        elif key == b"server" and self._exchange:
            self._exchange.server = value.decode("latin-1")
        elif key == b"content-encoding" and value.lower() != b"identity":
            self._fail("not HTTP", f"the answer is compressed ({value[:40]!r}) although identity was asked for")

    def on_headers_complete(self) -> None:
        if self._exchange and (status := self._parser.get_status_code()) >= 200:
            self._exchange.status = status
            self._in_body = True

    def on_body(self, chunk: bytes) -> None:
        if self._exchange is None:
            return
        self._exchange.chunks.append((self._arrived_s, chunk))
        self._exchange.body_bytes += len(chunk)
        if self._exchange.body_bytes > MAX_BODY_BYTES:
            self._fail("too large", f"the answer exceeds {MAX_BODY_BYTES >> 20} MiB")

    def on_message_complete(self) -> None:
        if self._in_body:  # otherwise it was an interim answer such as 100 Continue
            self._finish(self._parser.should_keep_alive())

    def _start_message(self) -> None:
        self._until_close = True  # framed by the end of the connection, unless a header says otherwise
        self._in_body = False
        self._head_bytes = 0

    def _fail(self, kind: str, message: str) -> None:
        if self._exchange and not self._exchange.failure:
            self._exchange.failure = Failure(kind, message)
        self._finish(False)

    def _finish(self, reusable: bool) -> None:
        if self._done and not self._done.done():
            self._done.set_result(reusable)
        self._exchange = None


def _common_headers(target: Target, api_key: str | None, keep_alive: bool) -> str:
    lines = [
        f"Host: {target.authority}",
        f"User-Agent: headrace-bench/{__version__}",
        "Accept: text/event-stream, application/json",
        "Accept-Encoding: identity",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
    ]
    if api_key is not None:
        lines.append(f"Authorization: Bearer {api_key}")
    return "".join(f"{line}\r\n" for line in lines)
