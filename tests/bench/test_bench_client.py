"""The HTTP client over real sockets: framing at every split, errors, early close, timeouts, keep-alive."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from itertools import pairwise

import pytest
from fake_server import SSE_HEAD, Answer, Call, chunk, fixed, openai, raw, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.client import Client, Exchange, Failure, _Connection
from headrace.bench.settings import parse_url
from headrace.core import clock

CHUNKED = SSE_HEAD + chunk(b"data: one\n\n") + chunk(b"data: two\n\n") + chunk(b"")


def exchange_with(
    answer: Answer, *, requests: int = 1, timeout_s: float = 5.0, keep_alive: bool = True
) -> list[Exchange]:
    """What a client gets from a server that answers so."""

    async def main() -> list[Exchange]:
        async with serving(answer) as server:
            client = Client(parse_url(server.url), timeout_s=timeout_s, keep_alive=keep_alive)
            found = [await client.post("/completions", b"{}") for _ in range(requests)]
            client.close()
            return found

    return clock.run(main())


def failure_of(answer: Answer, **options: float) -> Failure:
    found = exchange_with(answer, **options)[-1].failure  # type: ignore[arg-type]
    assert found is not None
    return found


class FakeTransport(asyncio.Transport):
    """Swallows what is written."""

    def write(self, data: bytes | bytearray | memoryview) -> None: ...

    def abort(self) -> None: ...


def fed(*parts: bytes, eof: bool = False) -> Exchange:
    """An exchange whose answer arrives in these parts, without sockets, under virtual time."""

    async def main() -> Exchange:
        connection, exchange = _Connection(), Exchange(0.0)
        connection.connection_made(FakeTransport())
        conversation = asyncio.create_task(connection.converse(b"", exchange))
        for part in parts:
            await clock.sleep(1.0)
            connection.data_received(part)
        if eof:
            connection.connection_lost(None)
        await conversation
        return exchange

    return clock.run(main(), virtual=True)


@pytest.mark.parametrize("answer", [CHUNKED, fixed(b"data: one\n\ndata: two\n\n")])
def test_an_answer_split_at_every_byte_is_the_same_answer(answer: bytes) -> None:
    for cut in range(1, len(answer)):
        exchange = fed(answer[:cut], answer[cut:])
        assert (exchange.status, exchange.server, exchange.failure) == (200, "fake/1", None)
        assert exchange.body == b"data: one\n\ndata: two\n\n"
        assert {at_s for at_s, _ in exchange.chunks} <= {1.0, 2.0}


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.binary(min_size=1, max_size=60), st.lists(st.integers(1, 200), max_size=8))
def test_garbage_in_any_pieces_is_a_failure_and_never_an_exception(data: bytes, cuts: list[int]) -> None:
    text = b"HTTP/1.1 200 OK\r\n" + data
    edges = [0, *sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    parts = [text[a:b] for a, b in pairwise(edges) if a < b]
    exchange = fed(*parts, eof=True)
    assert exchange.failure is not None or exchange.status == 200


def test_pieces_are_stamped_with_their_arrival() -> None:
    exchange = fed(SSE_HEAD + chunk(b"a"), chunk(b"b") + chunk(b"c"), chunk(b""))
    assert exchange.chunks == [(1.0, b"a"), (2.0, b"b"), (2.0, b"c")]


def test_interim_answers_and_answers_that_end_with_the_connection() -> None:
    interim = b"HTTP/1.1 100 Continue\r\n\r\n"
    assert fed(interim, fixed(b"ok")).body == b"ok"
    until_close = fed(b"HTTP/1.1 200 OK\r\n\r\nall of it", eof=True)
    assert (until_close.body, until_close.failure) == (b"all of it", None)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (raw(b"SSH-2.0-OpenSSH\r\n"), "not HTTP"),
        (raw(b"", close=True), "closed early"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Le", close=True), "closed early"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", close=True), "closed early"),
        (raw(SSE_HEAD + chunk(b"data: one\n\n"), close=True), "closed early"),
        (raw(SSE_HEAD + b"zz\r\n"), "not HTTP"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nzz"), "not HTTP"),
        (raw(b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), "not HTTP"),
        (raw(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 60_000), "too large"),
    ],
)  # fmt: skip
def test_bad_answers(answer: Answer, kind: str) -> None:
    assert failure_of(answer).kind == kind


def test_a_body_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.bench.client.MAX_BODY_BYTES", 1 << 20)
    exchange = fed(SSE_HEAD, *[chunk(b"x" * (1 << 17))] * 20)
    assert exchange.failure is not None
    assert exchange.failure.kind == "too large"
    assert exchange.body_bytes == (1 << 20) + (1 << 17)


def test_errors_keep_their_status_and_body() -> None:
    exchange = exchange_with(raw(fixed(b'{"error": "full"}', "429 Too Many Requests")))[0]
    assert (exchange.status, exchange.failure, exchange.body) == (429, None, b'{"error": "full"}')


def test_a_silent_server_times_out_and_its_connection_is_not_used_again() -> None:
    async def answer(call: Call, writer: asyncio.StreamWriter) -> None:
        if len(seen) == 0:
            seen.append(call)
            writer.write(SSE_HEAD + chunk(b"data: late\n\n"))  # and then nothing
        else:
            writer.write(fixed(b"new"))

    seen: list[Call] = []
    slow, quick = exchange_with(answer, requests=2, timeout_s=0.1)
    assert slow.failure is not None
    assert slow.failure.kind == "timeout"
    assert slow.body == b"data: late\n\n"
    assert slow.ended_s - slow.sent_s == pytest.approx(0.1, abs=0.09)
    assert (quick.failure, quick.body) == (None, b"new")


def test_nobody_listens() -> None:
    async def main() -> Exchange:
        async with serving(openai) as server:
            port = server.port
        return await Client(parse_url(f"http://127.0.0.1:{port}/v1")).get("/models")

    failure = clock.run(main()).failure
    assert failure is not None
    assert failure.kind == "connect"


def connections(
    answer: Answer, requests: int, act: Callable[[Client], Awaitable[None]], *, keep_alive: bool = True
) -> int:
    async def main() -> int:
        async with serving(answer) as server:
            client = Client(parse_url(server.url), timeout_s=5.0, keep_alive=keep_alive)
            for _ in range(requests):
                await act(client)
            client.close()
            return server.connections

    return clock.run(main())


async def succeed(client: Client) -> None:
    exchange = await client.post("/completions", b"{}")
    assert exchange.failure is None, exchange.failure
    assert exchange.body == b"data: one\n\ndata: two\n\n"


def test_connections_are_reused_when_both_sides_agree() -> None:
    closing = CHUNKED.replace(b"Server", b"Connection: close\r\nServer")
    assert connections(raw(CHUNKED), 4, succeed) == 1
    assert connections(raw(CHUNKED), 4, succeed, keep_alive=False) == 4
    assert connections(raw(closing), 4, succeed) == 4


def test_a_connection_closed_while_idle_is_replaced_without_a_failure() -> None:
    """The server hangs up after each answer although it promised not to; the client may or may not notice in time."""
    assert connections(raw(CHUNKED, close=True), 4, succeed) == 4


def test_a_second_answer_nobody_asked_for_poisons_the_connection() -> None:
    assert connections(raw(CHUNKED + fixed(b"for somebody else")), 3, succeed) == 3


def test_concurrent_requests_have_their_own_connections() -> None:
    async def both(client: Client) -> None:
        await asyncio.gather(succeed(client), succeed(client))

    assert connections(raw(CHUNKED), 3, both) == 2


def test_what_is_sent() -> None:
    async def main() -> Call:
        async with serving(raw(fixed(b"{}"))) as server:
            client = Client(parse_url(server.url), api_key="sk-1")
            await client.post("/completions", b'{"a": 1}')
            client.close()
            assert server.calls[0].headers["host"] == f"127.0.0.1:{server.port}"
            return server.calls[0]

    call = clock.run(main())
    assert (call.method, call.path, call.json) == ("POST", "/v1/completions", {"a": 1})
    assert call.headers["authorization"] == "Bearer sk-1"
    assert call.headers["accept-encoding"] == "identity"


def test_https_verifies_the_server() -> None:
    """A plain server is no TLS server: the handshake fails, and that is a connection failure."""

    async def main() -> Exchange:
        async with serving(raw(b"hello")) as server:
            client = Client(parse_url(f"https://127.0.0.1:{server.port}"), timeout_s=0.2)
            assert client._tls is not None
            assert client._tls.verify_mode == ssl.CERT_REQUIRED
            assert client._tls.check_hostname
            return await client.get("/models")

    failure = clock.run(main()).failure
    assert failure is not None
    assert failure.kind in ("connect", "timeout")
