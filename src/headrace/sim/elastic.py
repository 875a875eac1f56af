"""Simulates a fleet whose replicas come and go: `cluster.scaling` decides whom to start and to stop, a start takes its
time, and who comes before somebody is ready waits at the door.

    arrivals --> door --first come, first served--> ready replica with the fewest requests
                  |                                          |
                starts(waiting, views)             idle for keep_alive_s: stops(views)

Owns who is there and what that costs: a replica is paid from the decision to start it until it is stopped.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headrace.cluster.router import least_requests
from headrace.cluster.scaling import Scaling
from headrace.cluster.view import ReplicaView
from headrace.core import clock
from headrace.core.events import Event, Finished
from headrace.core.types import RequestId
from headrace.sim.course import Course, request, stopped
from headrace.sim.run import Replica, Site, seldom_collected
from headrace.sim.stats import COMPLETED
from headrace.workload.arrival import Arrival

ROUNDING_S = 1e-6  # sums of times


@dataclass(slots=True)
class Served:
    """What came of a fleet. Seconds."""

    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)  # of the same requests; 0 for one token
    cold: int = 0  # requests that found nobody ready
    starts: int = 0
    paid_s: float = 0.0  # of replicas
    span_s: float = 0.0
    most: int = 0  # replicas at a time
    refused: int = 0


@dataclass(slots=True)
class _Member:
    """One replica, while it is paid for."""

    replica: Replica
    since_s: float
    ready_s: float
    serving: asyncio.Task[None]
    idle_since_s: float


def served(arrivals: Sequence[Arrival], site: Site, rule: Scaling, cold_s: float) -> Served:
    """Run the traffic to its end. `rule.least` replicas are there and ready when it begins."""
    with seldom_collected():
        return clock.run(_Run(arrivals, site, rule, cold_s).run(), virtual=True)


class _Run:
    def __init__(self, arrivals: Sequence[Arrival], site: Site, rule: Scaling, cold_s: float) -> None:
        self._course = Course(arrivals)
        self.lengths = self._course.lengths
        self._arrivals, self._site, self._rule, self._cold_s = arrivals, site, rule, cold_s
        self._members: dict[int, _Member] = {}
        self._door: deque[int] = deque()
        self._where: dict[RequestId, int] = {}
        self._numbers = 0  # replicas so far
        self._leaving: list[asyncio.Task[None]] = []
        self._found = Served()

    async def run(self) -> Served:
        for _ in range(self._rule.least):
            self._start(0.0)
        self._course.begin(self._arrive)
        await self._course.over()
        end_s = clock.now()
        self._found.span_s = end_s
        await stopped([self._leave(number, end_s).serving for number in list(self._members)])
        await asyncio.gather(*self._leaving)
        self._course.check()
        return self._found

    # -- requests ------------------------------------------------------------------------------------------------------

    def _arrive(self, number: int) -> None:
        now = clock.now()
        self._found.cold += not any(one.ready_s <= now for one in self._members.values())
        self._door.append(number)
        self._settle()

    def observe(self, event: Event) -> None:
        if not isinstance(event, Finished):
            return
        if event.reason in COMPLETED and event.first_token_s is not None:
            arrival = self._arrivals[int(event.request_id)]
            later = event.usage.output_tokens - 1
            self._found.ttft_s.append(event.first_token_s - (arrival.at_s or 0.0))
            self._found.tpot_s.append((event.at_s - event.first_token_s) / later if later else 0.0)
        else:
            self._found.refused += 1

    def ended(self, request_id: RequestId) -> None:
        del self.lengths[request_id]
        self._course.soon(self._free, self._where.pop(request_id))

    def stop(self, error: Exception) -> None:
        self._course.stop(error)

    def _free(self, number: int) -> None:
        member = self._members.get(number)
        if member is not None and not member.replica.requests:
            self._rest(number, member)
        self._course.close()
        self._settle()

    def _rest(self, number: int, member: _Member) -> None:
        member.idle_since_s = clock.now()
        if self._rule.keep_alive_s < 1e12:
            self._course.at(member.idle_since_s + self._rule.keep_alive_s, self._settle)

    # -- replicas ------------------------------------------------------------------------------------------------------

    def _views(self) -> list[ReplicaView]:
        now = clock.now()
        return [
            replace(
                member.replica.view(),
                ready=member.ready_s <= now,
                idle_s=0.0 if member.replica.requests else max(0.0, now - member.idle_since_s + ROUNDING_S),
            )
            for member in self._members.values()
        ]

    def _settle(self) -> None:
        """Send who may be sent, then ask who should come and who should go."""
        ready = [view for view in self._views() if view.ready]
        while self._door and ready:
            self._send(self._door.popleft(), ready)
            ready = [view for view in self._views() if view.ready]
        for number in self._rule.stops(self._views()):
            self._leaving.append(asyncio.create_task(stopped([self._leave(number, clock.now()).serving])))
        for _ in range(self._rule.starts(len(self._door), self._views())):
            self._start(self._cold_s)

    def _send(self, number: int, ready: Sequence[ReplicaView]) -> None:
        sent = request(self._arrivals[number], str(number), self._site)
        to = self._where[sent.request.id] = least_requests(number, sent.request, ready)
        if not self._course.send(self._members[to].replica, sent):
            del self._where[sent.request.id]
            self._found.refused += 1
            self._course.close()

    def _start(self, cold_s: float) -> None:
        number, now = self._numbers, clock.now()
        self._numbers += 1
        replica = Replica(number, self._site, self, self)
        serving = asyncio.create_task(replica.engine.run())
        self._members[number] = _Member(replica, now, now + cold_s, serving, now + cold_s)
        self._found.starts += cold_s > 0
        self._found.most = max(self._found.most, len(self._members))
        self._course.at(now + cold_s, self._ready, number)

    def _ready(self, number: int) -> None:
        member = self._members.get(number)
        if member is not None:
            self._rest(number, member)
            self._settle()

    def _leave(self, number: int, at_s: float) -> _Member:
        member = self._members.pop(number)
        self._found.paid_s += at_s - member.since_s
        return member
