"""Runs the application on a socket: binding, signals, draining, and the limits below HTTP.

The first SIGTERM or SIGINT stops taking requests and lets running ones finish within the drain timeout, while the
listener stays open to say so; the second ends them. Owns the socket and the server's life.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from headrace.core.config import GatewaySettings
from headrace.core.ports import Service
from headrace.core.types import HeadraceError
from headrace.gateway import bounds
from headrace.gateway.edge import is_loopback
from headrace.gateway.errors import LOG

_HEAD_TIMEOUT_S = 30.0  # for the request line and headers, from the connection or the request's first byte
_GOODBYE_S = 5  # for slow readers to take what is already computed, after the drain


class CannotListen(HeadraceError):
    """The address is refused or taken; the message says what to do."""


def bind(settings: GatewaySettings, asks: bool = False) -> socket.socket:
    """A listening socket, for a server that asks for keys or not. Raises CannotListen."""
    host, port = settings.host, settings.port
    if not (is_loopback(host) or asks or settings.insecure):
        raise CannotListen(
            f"{host} can be reached from other machines and nobody is asked for a key. "
            "Make keys with `headrace keys add NAME`, listen on 127.0.0.1, or accept the risk with --insecure."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise CannotListen(
            f"cannot listen on {host} port {port}: {reason}. Choose another port with --port, or 0 for any free one."
        ) from error


def check(settings: GatewaySettings, asks: bool = False) -> None:
    """Raises CannotListen now rather than after minutes of loading a model."""
    bind(settings, asks).close()


async def serve(
    app: ASGIApp,
    service: Service,
    settings: GatewaySettings,
    announce: Callable[[str], None] = lambda url: None,
    asks: bool = False,
) -> None:
    """Serve until a signal ends it, or the task is cancelled. Calls `announce` with the URL once it listens."""
    listener = bind(settings, asks)
    port = listener.getsockname()[1]
    config = uvicorn.Config(
        app,
        http=BoundedHttp,
        ws="none",
        loop="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=_GOODBYE_S,
    )
    server = _Server(config)
    shutdown = _Shutdown(server, service, settings.drain_timeout_s)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        with shutdown.on_signals():
            serving = asyncio.ensure_future(server.serve(sockets=[listener]))
            announce(f"http://{host}:{port}")
            try:
                await asyncio.shield(serving)
            except asyncio.CancelledError:
                server.should_exit = True  # connections are still closed in order
                await serving
                raise
    finally:
        listener.close()
        await shutdown.close()


class _Server(uvicorn.Server):
    """Uvicorn's server without its signal handlers: a signal must drain the service first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Shutdown:
    """Turns the first signal into a drain and the second into an end."""

    def __init__(self, server: uvicorn.Server, service: Service, drain_timeout_s: float) -> None:
        self._server = server
        self._service = service
        self._drain_timeout_s = drain_timeout_s
        self._draining: asyncio.Task[None] | None = None
        self._aborting: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number in before:
            loop.add_signal_handler(number, self.signalled)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, _callable_or_default(handler))

    def signalled(self) -> None:
        if self._draining is None:
            LOG.info("draining: running requests have %g s, new ones are refused", self._drain_timeout_s)
            self._draining = asyncio.create_task(self._drain(self._drain_timeout_s))
        elif self._aborting is None:
            LOG.info("second signal: ending running requests")
            self._draining.cancel()
            self._server.config.timeout_graceful_shutdown = 1
            self._aborting = asyncio.create_task(self._drain(0.0))

    async def _drain(self, timeout_s: float) -> None:
        try:
            finished = await self._service.drain(timeout_s)
            LOG.info("drained" if finished else "drain timeout: the rest was aborted")
        finally:
            if asyncio.current_task() is self._aborting or self._aborting is None:
                self._server.should_exit = True

    async def close(self) -> None:
        tasks = [task for task in (self._draining, self._aborting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _callable_or_default(
    handler: Callable[[int, FrameType | None], object] | int | None,
) -> Callable[[int, FrameType | None], object] | int:
    return signal.SIG_DFL if handler is None else handler


class BoundedHttp(HttpToolsProtocol):
    """Uvicorn's parser with a bound on the size of a request's head, and on the time it may take to arrive."""

    _head_bytes = 0  # of a head that is not complete; a complete one is checked by `edge.Door`
    _in_head = True
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_begins()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > bounds.MAX_HEAD_BYTES:
                self._refuse(431, b"Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_begins()

    def on_headers_complete(self) -> None:
        self._head_done()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_done()
        super().connection_lost(exc)

    def _head_begins(self) -> None:
        self._head_done()
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._refuse, 408, b"Request Timeout")

    def _head_done(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, reason: bytes) -> None:
        self._head_done()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 %d %b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % (status, reason))
            self.transport.close()
