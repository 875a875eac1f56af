"""Sends arrivals when their time has come: by their times, a later turn of a session after the answer before it, or one
after the other for a number of clients. Owns what only the executors may know: how long answers will be.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from headrace.core import clock
from headrace.core.types import HeadraceError, InvalidRequest, Overloaded, RequestId
from headrace.engine.loop import Engine
from headrace.workload.arrival import Arrival, Traffic, traffic

REMEMBERED_SESSIONS = 100_000  # whose last answer is known; later turns of those before come at their `at_s`

Send = Callable[[int, Traffic], Engine]  # (number of the request, request) -> who took it


class NotApart(HeadraceError):
    """This traffic ties the replicas together, so none can be simulated by itself."""


@dataclass(slots=True)
class _Session:
    """A conversation: one turn at a time."""

    ended_s: float | None = None  # of its last answer; None while one is being made
    turns: deque[tuple[int, Arrival]] = field(default_factory=deque)  # that wait for it, with their numbers


class Feed:
    """Reads arrivals with their numbers, one ahead. None among them means that the next one is not known yet: `go_on`
    when it is."""

    def __init__(
        self,
        arrivals: Iterator[tuple[int, Arrival] | None],
        *,
        block_tokens: int,
        max_new_tokens: int,
        clients: int,
    ) -> None:
        self._arrivals = arrivals
        self._block_tokens = block_tokens
        self._max_new_tokens = max_new_tokens
        self._clients = clients
        self.lengths: dict[RequestId, int] = {}  # output tokens of requests that have been sent and have not ended
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._session_of: dict[RequestId, str] = {}
        self._unsent = 0
        self._starved = False
        self._exhausted = False
        self._closed = False  # the next arrival waits for a free client
        self.error: Exception | None = None
        self.done = asyncio.Event()

    def begin(self, send: Send) -> None:
        self._send_to = send
        self._loop = asyncio.get_running_loop()
        self._guarded(self._read)
        for _ in range(self._clients - 1 if self._closed else 0):
            self._guarded(self._read)

    def go_on(self) -> None:
        """There are more arrivals."""
        if self._starved:
            self._guarded(self._read)

    def ended(self, request_id: RequestId) -> None:
        """A request has ended, or was refused."""
        del self.lengths[request_id]
        name = self._session_of.pop(request_id, None)
        if name is not None:
            self._next_turn(name)
        if self._closed:
            self._loop.call_soon(self._guarded, self._read)
        self._check_done()

    def stop(self, error: Exception) -> None:
        """Something is wrong, and the first that is ends the simulation."""
        self.error = self.error or error
        self.done.set()

    # -- reading -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read on to the next arrival, and come back to it when it is due."""
        try:
            entry = next(self._arrivals)
        except StopIteration:
            self._exhausted = True
            self._check_done()
            return
        self._starved = entry is None
        if entry is None:
            return
        number, arrival = entry
        self._unsent += 1
        if arrival.at_s is not None:
            self._at(arrival.at_s, self._arrive, number, arrival)
            return
        self._closed = True
        if arrival.gap_s:
            self._at(clock.now() + arrival.gap_s, self._send, number, arrival)
        else:
            self._send(number, arrival)  # who does not think is back before the next step is planned

    def _arrive(self, number: int, arrival: Arrival) -> None:
        """Send it, or let it wait for the answer before."""
        session = self._sessions.get(arrival.session) if arrival.session and arrival.gap_s is not None else None
        if session is None:
            self._send(number, arrival)
        elif session.ended_s is None:
            session.turns.append((number, arrival))
        else:
            when_s, session.ended_s = session.ended_s + (arrival.gap_s or 0.0), None
            self._at(when_s, self._send, number, arrival)
        self._read()

    # -- sending -------------------------------------------------------------------------------------------------------

    def _send(self, number: int, arrival: Arrival) -> None:
        name, size = str(number), self._block_tokens
        sent = traffic(arrival, name, now_s=clock.now(), block_tokens=size, max_new_tokens=self._max_new_tokens)
        self._unsent -= 1
        self.lengths[name] = sent.output_tokens
        if arrival.session:
            self._session_of[name] = arrival.session
            self._sessions.setdefault(arrival.session, _Session()).ended_s = None
        try:
            engine = self._send_to(number, sent)
        except (InvalidRequest, Overloaded):
            self.ended(name)
        else:
            if arrival.cancel_s is not None:
                self._loop.call_later(arrival.cancel_s, engine.abort, name)

    def _next_turn(self, name: str) -> None:
        session = self._sessions[name]
        if session.turns:
            number, arrival = session.turns.popleft()
            self._at(clock.now() + (arrival.gap_s or 0.0), self._send, number, arrival)
            return
        session.ended_s = clock.now()
        self._sessions.move_to_end(name)
        oldest = next(iter(self._sessions))
        if len(self._sessions) > REMEMBERED_SESSIONS and self._sessions[oldest].ended_s is not None:
            del self._sessions[oldest]

    def _at(self, when_s: float, call: Callable[..., None], *args: object) -> None:
        self._loop.call_at(when_s, self._guarded, call, *args)

    def _guarded(self, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception as error:
            self.stop(error)

    def _check_done(self) -> None:
        if self._exhausted and not self._unsent and not self.lengths:
            self.done.set()
