"""Where HTTP meets the handlers: bodies in, bytes out, errors, and clients that go away.

An `Endpoint` serves one path of one dialect: `parse` makes a core value of the body, a handler turns the value into
events, a `Reply` makes bytes of them. So a further dialect is one file. The `Door` stands before every route: it checks
the Host header, asks for a key, names the request, and lets no exception out. No state.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.core import clock
from headrace.gateway import bounds
from headrace.gateway.chain import closing
from headrace.gateway.errors import Refused, bad, refused
from headrace.gateway.explaining import Book
from headrace.gateway.gate import Gate, ranked
from headrace.gateway.keys import ANYBODY, ASKED, NOBODY, Caller, Guard, caller_of, no_key
from headrace.gateway.lines import server_timing, visited
from headrace.gateway.models import Model, Models
from headrace.gateway.openapi import Operation
from headrace.gateway.text import Text

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
Q = TypeVar("Q")  # what a body asks for, in no dialect: a Call, texts to embed, ...
E = TypeVar("E")  # what its handler answers with
E_contra = TypeVar("E_contra", contravariant=True)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})


@dataclass(frozen=True, slots=True)
class Context:
    """What a dialect may know about the server and the connection."""

    models: Models
    to: Model  # the one that the call is for; until `of` has found it, the first
    max_choices: int
    embedding_model: str | None = None  # its name, if there is one
    stores: bool = False  # whether responses can be kept
    client_id: str = ""  # the X-Request-Id of the response
    caller: Caller = ANYBODY

    @property
    def tenant(self) -> str:
        return self.caller.tenant

    def of(self, asked: str | None) -> Context:
        """The same for the model that a body names. Raises Refused for a name that nothing here answers to, or that
        the caller may not use."""
        found = self.models.find(asked)
        self.caller.check_model(found.name)
        return replace(self, to=found)

    @property
    def model(self) -> str:
        return self.to.name

    @property
    def text(self) -> Text:
        return self.to.text


class Reply(Protocol[E_contra]):
    """How the events of one call look in one dialect. Either streamed (feed, end or failed) or whole (feed, body)."""

    @property
    def stream(self) -> bool: ...

    def feed(self, event: E_contra) -> bytes: ...

    def end(self) -> bytes: ...

    def failed(self, error: Refused) -> bytes:
        """The end of a stream that had begun."""
        ...

    def body(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Dialect(Generic[Q, E]):
    operation: Operation
    parse: Callable[[bytes, Context], tuple[Q, Reply[E]]]  # raises Refused
    error_body: Callable[[Refused], bytes]
    stream_type: bytes = EVENT_STREAM
    any_type: bool = False  # its clients leave out the Content-Type; a browser that is made to send never does


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[Q, E]):
    """An ASGI application: one POST path."""

    dialect: Dialect[Q, E]
    handler: Callable[[Q], AsyncIterator[E]]
    context: Context
    max_body: int
    gate: Gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            kind = None if self.dialect.any_type and b"origin" not in dict(scope["headers"]) else JSON
            body = await read_body(scope, receive, self.max_body, kind)
            caller = caller_of(scope)
            context = replace(self.context, client_id=scope["state"]["client_id"], caller=caller)
            call, reply = self.dialect.parse(body, context)
            await unless_gone(receive, self._answer(ranked(call, caller), caller, reply, send))
        except Exception as error:
            refusal = refused(error)
            scope["state"]["refused"] = refusal.code
            await respond(send, refusal.status, self.dialect.error_body(refusal), refusal.headers)

    async def _answer(self, call: Q, caller: Caller, reply: Reply[E], send: Send) -> None:
        if reply.stream:
            await self._stream(call, caller, reply, send)
            return
        async with self.gate.entered(caller, call) as permit:
            body = await whole(permit.watched(self.handler(call)), reply)
        await respond(send, 200, body, permit.headers)

    async def _stream(self, call: Q, caller: Caller, reply: Reply[E], send: Send) -> None:
        """What the call has taken of its key's limits is back before the last bytes go out."""
        began = False
        try:
            async with (
                self.gate.entered(caller, call) as permit,
                closing(permit.watched(self.handler(call))) as events,
            ):
                first = await anext(events)  # whatever is refused before this still gets a status of its own
                headers = [(b"content-type", self.dialect.stream_type), (b"cache-control", b"no-cache")]
                headers += [(b"x-accel-buffering", b"no"), *permit.headers]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                began = True
                chunk = reply.feed(first)
                async for event in events:
                    # the first event carries no text, so it travels with the one that follows at once
                    if chunk := chunk + reply.feed(event):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    chunk = b""
            last = reply.end()
        except Exception as error:
            if not began:
                raise
            last = reply.failed(refused(error))
        await send({"type": "http.response.body", "body": last, "more_body": False})


@dataclass(frozen=True, slots=True)
class ByMethod:
    """The methods of one path."""

    apps: Mapping[str, ASGIApp]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        await self.apps[method](scope, receive, send)


async def whole(answer: AsyncIterator[E], reply: Reply[E]) -> bytes:
    """The body of an answer that is not streamed."""
    async with closing(answer) as events:
        async for event in events:
            reply.feed(event)
    return reply.body()


async def unless_gone(receive: Receive, work: Coroutine[object, object, None]) -> None:
    """Run `work`, but cancel it as soon as the client has closed its connection."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
        results = await asyncio.gather(working, leaving, return_exceptions=True)
    if isinstance(results[0], Exception):
        raise results[0]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(scope: Scope, receive: Receive, max_body: int, kind: bytes | None = JSON) -> bytes:
    """The whole body. Raises Refused if it is too large, too slow, or not said to be of this kind."""
    headers = dict(scope["headers"])
    if kind and headers.get(b"content-type", b"").split(b";")[0].strip().lower() != kind:
        raise Refused(415, f"Send this with the header 'Content-Type: {kind.decode()}'.", code="unsupported_media_type")
    too_large = Refused(413, f"The request body is larger than {max_body} bytes.", code="body_too_large")
    length = headers.get(b"content-length", b"0")
    if not re.fullmatch(rb"\d{1,18}", length):
        raise bad("The Content-Length header is not a length.", code="invalid_length")
    if int(length) > max_body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(bounds.BODY_TIMEOUT_S):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise bad("The connection closed before the body was complete.")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > max_body:
                    raise too_large
    except TimeoutError:
        limit_s = bounds.BODY_TIMEOUT_S
        raise Refused(408, f"The body did not arrive within {limit_s:g} s.", code="body_timeout") from None
    return bytes(body)


async def respond(
    send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]] | None = None, kind: bytes = JSON
) -> None:
    all_headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


@dataclass(frozen=True, slots=True)
class ForAdmins:
    """A route that only an admin's key opens."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not caller_of(scope).admin:
            raise Refused(403, "This path needs an admin's key; see `headrace keys add --admin`.", code="admin_only")
        await self.app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Door:
    """Middleware before every route. Whoever comes without a key gets to the public pages and no further."""

    app: ASGIApp
    hosts: frozenset[str]  # names a browser may know us by; empty: any
    error_body: Callable[[str, Refused], bytes]  # of a path, in the dialect that is spoken there
    book: Book  # what is known of the calls
    guard: Guard
    public: frozenset[str]  # paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        client_id = given if re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["client_id"] = client_id
        name, began_s = client_id.encode(), clock.now()
        status: int | None = None

        async def named_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                timing = server_timing(self.book, scope, began_s)
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name), (b"server-timing", timing)]
            await send(message)

        try:
            _check_head(scope)
            self._check_host(headers.get(b"host"))
            scope["state"]["caller"] = self._caller(scope)
            await self.app(scope, receive, named_send)
        except Exception as error:
            refusal = refused(error)
            if status is not None:
                raise  # the server closes a connection whose answer broke off
            scope["state"]["refused"] = refusal.code
            await respond(named_send, refusal.status, self.error_body(scope["path"], refusal), refusal.headers)
        finally:
            visited(self.book, scope, began_s, status)

    def _caller(self, scope: Scope) -> Caller:
        """Raises Refused. The path is the one that routes are found by."""
        caller = self.guard.caller(scope["headers"])
        if caller is not None:
            return caller
        if scope["method"] in ("GET", "HEAD") and scope["path"] in self.public:
            return NOBODY
        raise no_key(ASKED)

    def _check_host(self, host: bytes | None) -> None:
        """A web page that resolves its own name to loopback (DNS rebinding) still sends that name."""
        if not self.hosts or host is None:
            return
        name = re.sub(r":\d*$", "", host.decode("latin-1").lower())
        if name not in self.hosts:
            raise Refused(403, "This server listens on loopback and answers to its own names only.", code="wrong_host")


def _check_head(scope: Scope) -> None:
    size = sum(len(name) + len(value) for name, value in scope["headers"])
    if size + len(scope["path"]) + len(scope["query_string"]) > bounds.MAX_HEAD_BYTES:
        limit = bounds.MAX_HEAD_BYTES
        raise Refused(431, f"The path and headers are larger than {limit} bytes.", code="headers_too_large")


def allowed_hosts(bound: str) -> frozenset[str]:
    """Host names to accept when listening on `bound`; any (empty) when that is not loopback."""
    return _LOOPBACK | {bound.lower(), f"[{bound.lower()}]"} if is_loopback(bound) else frozenset()


def is_loopback(host: str) -> bool:
    return host.lower().strip("[]") in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def http_refusal(error: HTTPException) -> Refused:
    """What the router has to say, as a refusal."""
    match error.status_code:
        case 404:
            return Refused(404, "There is nothing at this path; GET / lists what there is.", code="not_found")
        case 405:
            return Refused(405, "This path does not take this method.", code="method_not_allowed")
    return Refused(error.status_code, str(error.detail))
