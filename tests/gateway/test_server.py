"""The server on a real socket: disconnects, bad framing, limits below HTTP, signals, and answers while it is busy."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from gateway_rig import RoteService, Running, chat, events_of, http_bytes, make_text, read_response, running

from headrace.core import clock
from headrace.core.config import GatewaySettings
from headrace.core.metrics import Metrics
from headrace.core.types import HeadraceError
from headrace.gateway import server
from headrace.gateway.app import build

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def module_busy() -> Iterator[Running]:
    with running(RoteService()) as up:
        yield up


@pytest.fixture
def up(module_busy: Running) -> Iterator[Running]:
    module_busy.service.__init__()  # type: ignore[misc]
    yield module_busy


def eventually(true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def still_serves(up: Running) -> None:
    with up.connect() as connection:
        connection.sendall(http_bytes(CHAT, chat()))
        assert read_response(connection)[0] == 200


def test_a_thousand_random_disconnects_leave_nothing(up: Running) -> None:
    up.service.stall_after = 6
    rng = random.Random(7)

    def disconnect() -> None:
        body = chat(stream=rng.random() < 0.5, n=rng.choice([1, 1, 3]), max_tokens=500)
        data = http_bytes(CHAT, body)
        connection = up.connect()
        cut = rng.random()
        if cut < 0.25:  # in the middle of the request
            connection.sendall(data[: rng.randrange(len(data))])
        else:
            connection.sendall(data)
            if cut < 0.6:  # in the middle of the answer, or while waiting for it
                connection.settimeout(0.01)
                try:
                    connection.recv(rng.choice([1, 100, 2000]))
                except TimeoutError:
                    pass
        if rng.random() < 0.5:  # reset instead of a polite end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()

    def settled() -> bool:
        return not up.service.open and up.on_loop(lambda: len(asyncio.all_tasks())) <= baseline

    baseline = up.on_loop(lambda: len(asyncio.all_tasks()))
    grown = []
    tracemalloc.start()
    try:
        for at in range(1000):
            disconnect()
            if at in (499, 999):
                eventually(settled)
                up.service.started.clear() if at == 499 else None
                up.service.aborted.sort()
                gc.collect()
                kept = sum(map(len, (up.service.aborted, up.service.ended))) * 150  # the test's own account
                grown.append(tracemalloc.get_traced_memory()[0] - kept)
    finally:
        tracemalloc.stop()
    assert len(up.service.aborted) > 500
    assert set(up.service.aborted) >= {request.id for request in up.service.started}
    assert grown[1] - grown[0] < 1_500_000, f"memory grew by {grown[1] - grown[0]} bytes over 500 disconnects"
    up.service.stall_after = None
    still_serves(up)


def test_a_client_that_goes_away_is_noticed_at_once(up: Running) -> None:
    up.service.stall_after = 2
    for stream in (False, True):
        connection = up.connect()
        connection.sendall(http_bytes(CHAT, chat(stream=stream, max_tokens=1000)))
        eventually(lambda: bool(up.service.open))
        begin = time.monotonic()
        connection.close()
        eventually(lambda: not up.service.open)
        assert time.monotonic() - begin < 0.2


@pytest.mark.parametrize(
    "data",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
        b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\n\0\0\0",
    ],
)
def test_bad_framing_is_answered_with_4xx_or_a_closed_connection(up: Running, data: bytes) -> None:
    with up.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while chunk := connection.recv(4096):
                answer += chunk
        except ConnectionResetError:
            pass
    assert answer == b"" or answer.split()[1].startswith(b"4")
    still_serves(up)


@pytest.mark.parametrize("size", [40 << 10, 1 << 20, 8 << 20])
@pytest.mark.parametrize("finished", [True, False])
def test_huge_headers_are_refused(up: Running, size: int, finished: bool) -> None:
    with up.connect() as connection:
        status = b""
        try:
            end = b"\r\n\r\n" if finished else b""
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * size + end)
            status = connection.recv(100)
        except (ConnectionResetError, BrokenPipeError):
            pass  # it stopped reading before we stopped sending
    assert status == b"" or status.split()[1] == b"431"
    still_serves(up)


def test_a_ten_megabyte_body_is_413_and_the_connection_lives(up: Running) -> None:
    for body, headers in ((b"x" * (10 << 20), ""), (b" " * (10 << 20), "")):
        with up.connect() as connection:
            connection.sendall(http_bytes(CHAT, body, headers))
            status, _, answer = read_response(connection)
            assert status == 413 and json.loads(answer)["error"]["code"] == "body_too_large"
            connection.sendall(http_bytes(CHAT, chat()))
            assert read_response(connection)[0] == 200


def test_a_chunked_body_is_bounded_too(up: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with up.connect() as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        status = 0
        for _ in range(10):
            connection.sendall(b"100000\r\n" + b"y" * (1 << 20) + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        status = read_response(connection)[0]
    assert status == 413


def test_invalid_utf8_on_the_wire(up: Running) -> None:
    with up.connect() as connection:
        connection.sendall(http_bytes(CHAT, b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}'))
        status, _, body = read_response(connection)
    assert status == 400 and json.loads(body)["error"]["code"] == "invalid_json"


def test_a_large_prompt_does_not_stall_anyone(up: Running) -> None:
    up.service.context_tokens = 10_000_000
    big = chat(messages=[{"role": "user", "content": "what is a headrace? " * 60_000}], max_tokens=1)
    answers: list[int] = []

    def ask_big() -> None:
        with up.connect() as connection:
            connection.settimeout(60)
            connection.sendall(http_bytes(CHAT, big))
            answers.append(read_response(connection)[0])

    thread = threading.Thread(target=ask_big)
    thread.start()
    waits = probe(up, lambda: thread.is_alive())
    thread.join()
    assert answers == [200] and len(waits) > 5
    assert sorted(waits)[len(waits) // 2] < 0.05 and max(waits) < 1.0


def test_a_template_that_never_ends_does_not_stall_anyone() -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with running(RoteService(), make_text(loop)) as up:
        answers: list[int] = []

        def ask_chat() -> None:
            with up.connect() as connection:
                connection.sendall(http_bytes(CHAT, chat()))
                answers.append(read_response(connection)[0])

        thread = threading.Thread(target=ask_chat)
        thread.start()
        waits = probe(up, lambda: thread.is_alive())
        thread.join()
        assert answers == [400] and sorted(waits)[len(waits) // 2] < 0.1


def test_the_control_plane_answers_in_milliseconds_while_streams_flow(up: Running) -> None:
    up.service.pace_s = 0.02
    connections = [up.connect() for _ in range(32)]
    for connection in connections:
        connection.sendall(http_bytes(CHAT, chat(stream=True, max_tokens=4000)))
    eventually(lambda: len(up.service.open) == 32)
    waits = probe(up, lambda: len(waits_seen) < 40, waits_seen := [])
    for connection in connections:
        connection.close()
    eventually(lambda: not up.service.open)
    assert sorted(waits)[len(waits) // 2] < 0.05


def probe(up: Running, go_on, waits: list[float] | None = None) -> list[float]:
    """Seconds that each of many health and model requests took, one after the other."""
    waits = [] if waits is None else waits
    connection = HTTPConnection(up.host, up.port, timeout=20)
    while go_on():
        for path in ("/health/live", "/health/ready", "/metrics", "/v1/models"):
            begin = time.perf_counter()
            connection.request("GET", path)
            assert connection.getresponse().read()
            waits.append(time.perf_counter() - begin)
    connection.close()
    return waits


def test_a_slow_reader_holds_up_nobody(up: Running) -> None:
    with up.connect() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(http_bytes(CHAT, chat(stream=True, max_tokens=4000, logprobs=True, top_logprobs=20)))
        eventually(lambda: bool(up.service.started))
        still_serves(up)
    eventually(lambda: not up.service.open)


def test_a_head_that_never_ends_is_closed(monkeypatch: pytest.MonkeyPatch, up: Running) -> None:
    monkeypatch.setattr(server, "_HEAD_TIMEOUT_S", 0.05)
    for beginning in (b"", b"GET / HTTP/1.1\r\nX: "):
        with up.connect() as connection:
            connection.sendall(beginning)
            assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_everyone_but_loopback_needs_insecure() -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        with pytest.raises(HeadraceError, match="--insecure"):
            server.check(GatewaySettings(host=host, port=0))
    server.check(GatewaySettings(host="0.0.0.0", port=0, insecure=True))
    for host in ("127.0.0.1", "localhost"):
        server.check(GatewaySettings(host=host, port=0))


def test_a_taken_port_is_said_clearly(up: Running) -> None:
    with pytest.raises(HeadraceError, match=rf"port {up.port}.*--port"):
        server.check(GatewaySettings(port=up.port))
    with pytest.raises(HeadraceError, match="port 70000"):
        server.check(GatewaySettings(port=70000))


async def _signalled(service: RoteService, drain_timeout_s: float, signals: int) -> tuple[list[bytes], float]:
    """Open a stream, send signals, and see how the server ends. Returns what was answered, and the seconds it took."""
    settings = GatewaySettings(port=0, drain_timeout_s=drain_timeout_s)
    urls: asyncio.Queue[str] = asyncio.Queue()
    app = build(service, make_text(), settings, Metrics())
    serving = asyncio.create_task(server.serve(app, service, settings, urls.put_nowait))
    port = int((await urls.get()).rsplit(":", 1)[1])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(http_bytes(CHAT, chat(stream=True, max_tokens=50)))
    await reader.readuntil(b"data: ")
    begin = clock.now()
    os.kill(os.getpid(), signal.SIGTERM)
    while service.state != "draining":
        await clock.sleep(0.001)
    late_reader, late_writer = await asyncio.open_connection("127.0.0.1", port)
    late_writer.write(http_bytes(CHAT, chat()) + http_bytes("/health/ready", b"", method="GET"))
    refused = await late_reader.readuntil(b"\r\n\r\n")
    late_writer.close()
    for _ in range(signals - 1):
        os.kill(os.getpid(), signal.SIGTERM)
    if signals == 1:
        service.stall_after = None
    rest = await reader.read()
    await asyncio.wait_for(serving, 20)
    writer.close()
    return [refused, rest], clock.now() - begin


def test_the_first_signal_lets_requests_finish_and_refuses_new_ones() -> None:
    service = RoteService(stall_after=10)
    (refused, rest), _ = clock.run(_signalled(service, 30.0, signals=1))
    assert refused.startswith(b"HTTP/1.1 503") and b"retry-after" in refused.lower()
    assert b'"finish_reason":"length"' in rest and b"[DONE]" in rest and not service.aborted


def test_the_second_signal_ends_them() -> None:
    service = RoteService(stall_after=10)
    (_, rest), seconds = clock.run(_signalled(service, 30.0, signals=2))
    assert b'"code":"unavailable"' in rest and b"[DONE]" in rest and service.aborted and seconds < 2


def test_streams_over_a_socket_are_framed_like_those_without(up: Running) -> None:
    connection = HTTPConnection(up.host, up.port, timeout=20)
    connection.request("POST", CHAT, chat(stream=True), {"Content-Type": "application/json"})
    assert len(events_of(connection.getresponse().read())) == 6
    connection.close()
