"""Simulates the replicas of one fleet each by itself, in several processes. Requests that are dealt round robin tie no
two replicas together, so the result is the same to the last bit.

Every process reads all the traffic, a window at a time, and brings one of its replicas after the other to the end of
the window: a replica that runs by itself costs half of one that takes turns with others at every step.

    window          |  1  |  2  |  3  |
    replica 0        ==1== ==4== ==7==        in this order
    replica 2        ==2== ==5== ==8==
    replica 4        ==3== ==6== ==9==
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import msgspec

from headrace.core.clock import Timeline
from headrace.sim.feed import NotApart
from headrace.sim.run import Fleet, Part, Report, Site, merged, seldom_collected
from headrace.sim.workers import forked
from headrace.workload.arrival import Arrival

_TIED = "traffic that waits for answers ties the replicas together"
WINDOW = 256  # arrivals of each replica, on average


def simulate_apart(arrivals: Callable[[], Iterable[Arrival]], site: Site, *, processes: int, seed: int = 0) -> Report:
    """As `run.simulate` with `round_robin`. `arrivals` makes the same traffic every time. More than one process needs
    an operating system that forks. Raises NotApart for traffic that waits for answers, WorkerFailed with the words of a
    process."""
    if processes <= 1:
        return merged(seed, in_turns(arrivals(), site, range(site.replicas)))
    shares = [range(first, site.replicas, processes) for first in range(min(processes, site.replicas))]

    def work(share: bytes) -> bytes:
        try:
            with seldom_collected():
                parts: list[Part] | None = in_turns(arrivals(), site, shares[int(share)])
        except NotApart:
            parts = None
        return msgspec.msgpack.encode(parts, enc_hook=lambda kept: kept.state())

    found: dict[int, Part] = {}
    for at, encoded in forked(processes)(work, [str(at).encode() for at in range(len(shares))]):
        parts = msgspec.msgpack.decode(
            encoded, type=list[Part] | None, dec_hook=lambda kind, state: kind.of(tuple(state))
        )
        if parts is None:
            raise NotApart(_TIED)
        found |= zip(shares[at], parts, strict=True)
    return merged(seed, [found[number] for number in range(site.replicas)])


def in_turns(arrivals: Iterable[Arrival], site: Site, numbers: range, window: int = WINDOW) -> list[Part]:
    """These replicas of the site, in this process; `window` changes nothing but memory and speed."""
    everything = enumerate(arrivals)
    alone = {number: _Alone(number, site) for number in numbers}
    try:
        while some := list(islice(everything, window * site.replicas)):
            until_s = 0.0
            for number, arrival in some:
                if arrival.at_s is None or arrival.gap_s is not None:
                    raise NotApart(_TIED)
                until_s = arrival.at_s
                if number % site.replicas in alone:
                    alone[number % site.replicas].arrivals.more.append((number, arrival))
            for one in alone.values():
                one.until(until_s)
        return [one.end() for one in alone.values()]
    finally:
        for one in alone.values():
            one.timeline.close()


class _Arrivals(Iterator[tuple[int, Arrival] | None]):
    """What one replica has still to be sent; None while there may be more."""

    def __init__(self) -> None:
        self.more: deque[tuple[int, Arrival]] = deque()
        self.ended = False

    def __next__(self) -> tuple[int, Arrival] | None:
        if self.more:
            return self.more.popleft()
        if self.ended:
            raise StopIteration
        return None


class _Alone:
    """One replica in a time of its own."""

    def __init__(self, number: int, site: Site) -> None:
        self.arrivals = _Arrivals()
        self.timeline = Timeline()
        self._fleet = Fleet(self.arrivals, site, (number,))
        self.timeline.run(self._fleet.begin())

    def until(self, when_s: float) -> None:
        self.timeline.run(self._fleet.until(when_s))

    def end(self) -> Part:
        self.arrivals.ended = True
        (part,) = self.timeline.run(self._fleet.end())
        return part
