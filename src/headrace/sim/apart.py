"""Simulates the replicas of one fleet in several processes. Requests that are dealt round robin tie no two replicas
together, so the result is the same to the last bit. Every process reads all the traffic and takes its part.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection

import msgspec

from headrace.core import clock
from headrace.sim.feed import NotApart
from headrace.sim.run import Part, Report, SimulationFailed, Site, merged, run
from headrace.workload.arrival import Arrival


def simulate_apart(arrivals: Callable[[], Iterable[Arrival]], site: Site, *, processes: int, seed: int = 0) -> Report:
    """As `run.simulate` with `round_robin`. `arrivals` makes the same traffic every time. Needs an operating system
    that forks. Raises NotApart for traffic that waits for answers, SimulationFailed with the words of a process."""
    forking = multiprocessing.get_context("fork")
    parts: dict[int, Part] = {}
    working = []
    for first in range(min(processes, site.replicas)):
        here, there = forking.Pipe(duplex=False)
        numbers = range(first, site.replicas, processes)
        process = forking.Process(target=_work, args=(there, arrivals, site, numbers))
        process.start()
        there.close()
        working.append((process, here, numbers))
    for process, here, numbers in working:
        parts |= zip(numbers, _received(here), strict=True)
        process.join()
    return merged(seed, [parts[number] for number in range(site.replicas)])


def _work(there: Connection, arrivals: Callable[[], Iterable[Arrival]], site: Site, numbers: range) -> None:
    """In the other process."""
    try:
        parts: list[Part] | str | None = clock.run(run(arrivals(), site, numbers), virtual=True)
    except NotApart:
        parts = None
    except Exception as error:
        parts = f"{type(error).__name__}: {error}"
    there.send_bytes(msgspec.msgpack.encode(parts, enc_hook=lambda kept: kept.state()))


def _received(here: Connection) -> list[Part]:
    try:
        parts = msgspec.msgpack.decode(
            here.recv_bytes(), type=list[Part] | str | None, dec_hook=lambda kind, state: kind.of(state)
        )
    except EOFError as error:
        raise SimulationFailed("a process of the simulation ended without a result; was memory short?") from error
    if parts is None:
        raise NotApart("traffic that waits for answers ties the replicas together; simulate it in one process")
    if isinstance(parts, str):
        raise SimulationFailed(parts)
    return parts
