"""Simulates a row of servers under one power budget: `cluster.power` decides the clocks from what the row draws, late
as the real commands are, and every server runs the live scheduler at its clock.

    requests --round robin by priority--> servers --joules of steps, by the second--> row's share of its budget
                                             ^                                              |
                                             '--- clocks, 40 s later (a brake 5 s) --- next_caps

Owns the meter and the clocks. A tick sees the mean of the last `TICK_S` seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from headrace.cluster.power import BRAKE_S, BRAKED, COMMAND_S, FREE, Caps, next_caps
from headrace.core import clock
from headrace.core.events import Event, Finished, StepDone
from headrace.core.types import FinishReason, RequestId
from headrace.sim.cost.clocked import Clocked
from headrace.sim.course import Course, request, stopped
from headrace.sim.run import Replica, Site, seldom_collected
from headrace.sim.stats import COMPLETED
from headrace.workload.arrival import Arrival

TICK_S = 2.0  # of telemetry
STEPS = 8  # decode steps a plan may stand for: a clock takes effect within so many


@dataclass(frozen=True, slots=True)
class Row:
    """Servers alike, each one replica with `idle_w` beside its steps; the first so many have low priority."""

    site: Site
    servers: int
    low: int
    static_w: float  # of all devices of a server, whatever they do
    rest_w: float  # of its processors, fans and network
    budget_w: float  # of the row; infinite: nobody watches
    control: bool = True


@dataclass(slots=True)
class Drawn:
    """What came of a row."""

    shares: list[float] = field(default_factory=list)  # of the budget, by tick
    watts: list[float] = field(default_factory=list)
    caps: list[Caps] = field(default_factory=list)  # in force, by tick
    brakes: int = 0
    over: int = 0  # ticks above the budget
    e2e_s: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})  # by low priority
    lost: int = 0
    joules: float = 0.0
    output_tokens: int = 0

    @property
    def requests(self) -> int:
        return sum(map(len, self.e2e_s.values()))


def drawn(arrivals: Sequence[Arrival], row: Row) -> Drawn:
    """Run the traffic to its end."""
    with seldom_collected():
        return clock.run(_Run(arrivals, row).run(), virtual=True)


class _Run:
    def __init__(self, arrivals: Sequence[Arrival], row: Row) -> None:
        self._course = Course(arrivals)
        self.lengths = self._course.lengths
        self._arrivals, self._row, self._found = arrivals, row, Drawn()
        self._clocks = [Clocked(row.site.cost, row.static_w) for _ in range(row.servers)]
        capacity = replace(row.site.capacity, steps=STEPS)
        self._servers = [
            Replica(at, replace(row.site, cost=cost, capacity=capacity), self, _Meter(self, at))
            for at, cost in enumerate(self._clocks)
        ]
        self._bins: dict[int, float] = {}  # joules of steps, by tick; those of a tick that was read go to the next
        self._read = 0  # ticks that were
        self._caps = self._asked = FREE
        self._order = self._braked = 0  # of commands, and of the last brake: it is quicker than those before it

    async def run(self) -> Drawn:
        serving = [asyncio.create_task(one.engine.run()) for one in self._servers]
        self._course.begin(self._arrive)
        self._course.at(TICK_S, self._tick, 0)
        await self._course.over()
        await stopped(serving)
        self._course.check()
        return self._found

    # -- requests ------------------------------------------------------------------------------------------------------

    def _arrive(self, number: int) -> None:
        server = self._servers[number % self._row.servers]
        if not self._course.send(server, request(self._arrivals[number], str(number), self._row.site)):
            self._found.lost += 1
            self._course.close()

    def ended(self, request_id: RequestId) -> None:
        del self.lengths[request_id]
        self._course.close()

    def stop(self, error: Exception) -> None:
        self._course.stop(error)

    def finished(self, server: int, event: Finished) -> None:
        if event.reason in COMPLETED:
            self._found.e2e_s[server < self._row.low].append(event.at_s - event.arrival_s)
            self._found.output_tokens += event.usage.output_tokens
        elif event.reason is not FinishReason.ERROR:
            self._found.lost += 1

    # -- power ---------------------------------------------------------------------------------------------------------

    def stepped(self, server: int, event: StepDone) -> None:
        """Spread what the steps drew above idle over the ticks that they lay in."""
        spent = self._servers[server].stats.totals.spent
        joules, spent.joules = spent.joules, 0.0
        begun_s, watts = event.at_s - event.seconds, joules / max(event.seconds, 1e-9) - self._row.static_w
        while begun_s < event.at_s:
            tick = int(begun_s / TICK_S + 1e-9)
            end_s, at = min(event.at_s, (tick + 1) * TICK_S), max(tick, self._read)
            self._bins[at] = self._bins.get(at, 0.0) + watts * (end_s - begun_s)
            begun_s = end_s

    def _tick(self, at: int) -> None:
        row, found = self._row, self._found
        watts = row.servers * (row.static_w + row.rest_w) + self._bins.pop(at, 0.0) / TICK_S
        share = watts / row.budget_w
        self._read = at + 1
        found.joules += watts * TICK_S
        found.watts.append(watts)
        found.shares.append(share)
        found.caps.append(self._caps)
        found.over += share > 1
        if row.control:
            self._command(next_caps(share, self._asked))
        if self._course.going:
            self._course.at((at + 2) * TICK_S, self._tick, at + 1)

    def _command(self, caps: Caps) -> None:
        if caps == self._asked:
            return
        self._asked = caps
        self._found.brakes += caps == BRAKED
        self._order += 1
        late_s = BRAKE_S if caps == BRAKED else COMMAND_S
        self._braked = self._order if caps == BRAKED else self._braked
        self._course.at(clock.now() + late_s, self._turn, self._order, caps)

    def _turn(self, order: int, caps: Caps) -> None:
        if order < self._braked:
            return
        self._caps = caps
        for at, one in enumerate(self._clocks):
            one.mhz = caps.low_mhz if at < self._row.low else caps.high_mhz


class _Meter:
    """An `Observer` of one server."""

    def __init__(self, of: _Run, server: int) -> None:
        self._of = of
        self._server = server

    def observe(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._of.stepped(self._server, event)
        elif isinstance(event, Finished):
            self._of.finished(self._server, event)
