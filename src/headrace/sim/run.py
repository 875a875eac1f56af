"""Runs a workload against modelled replicas in virtual time: the same `Engine`, `Scheduler` and policies as live, on
another clock and another executor. Arrivals are read as their time comes, so memory holds the requests in flight.

    arrivals --> Feed --- dispatch ---> Engine of replica i --> Stats of replica i --.
                  ^                          |                                       v
                  '------ Finished ----------'                                    Report
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Protocol, overload

from headrace.cluster.router import Route, round_robin
from headrace.cluster.view import ReplicaView
from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.events import Arrived, Event, Finished
from headrace.core.ports import Capacity, Observer
from headrace.core.types import SLO, FinishReason, HeadraceError, Request, RequestId
from headrace.engine.loop import Engine
from headrace.engine.policy import Policies, choose
from headrace.engine.scheduler import Scheduler
from headrace.sim.cost.batch import CostModel
from headrace.sim.cost.copies import HostLink
from headrace.sim.drafts import Acceptance, guesses
from headrace.sim.executor import SimulatedExecutor
from headrace.sim.feed import Feed
from headrace.sim.stats import Stats, Totals
from headrace.workload.arrival import Arrival, Traffic

Choose = Callable[[EngineSettings, Mapping[RequestId, int]], Policies]  # (settings, lengths of live answers)


@dataclass(frozen=True, slots=True)
class Site:
    """What is simulated: `replicas` alike, each with this memory, this price of a step and these settings."""

    settings: EngineSettings
    capacity: Capacity  # `steps` more than 1 allows many decode steps per plan, with the same results
    cost: CostModel
    token_budget: int
    replicas: int = 1
    windows: tuple[int, ...] = ()  # attention windows of the model
    policies: Choose = choose  # makes those of each replica; by default as its settings say
    max_new_tokens: int = 1 << 14  # for arrivals that name no limit
    slo: SLO | None = None  # for arrivals that name none
    acceptance: Acceptance | None = None  # of drafts, where the settings ask for some
    host: HostLink | None = None  # the way to the host tier, if the capacity has one


@dataclass(slots=True)
class Report:
    """What came of it. The digest is that of the event logs of all replicas, in their order."""

    seed: int
    replicas: int
    totals: Totals
    digests: tuple[str, ...]

    @property
    def digest(self) -> str:
        return blake2b("".join(self.digests).encode(), digest_size=16).hexdigest()


@dataclass(slots=True)
class Part:
    """What came of one replica."""

    totals: Totals
    digest: str


class SimulationFailed(HeadraceError):
    """The simulated executor, and so its cost model, raised."""


class Heard(Protocol):
    """Who sends requests to replicas: knows how long answers will be, and hears when they end."""

    @property
    def lengths(self) -> dict[RequestId, int]: ...

    def ended(self, request_id: RequestId) -> None: ...

    def stop(self, error: Exception) -> None: ...


class Replica:
    """One engine with its executor and its statistics."""

    def __init__(self, number: int, site: Site, feed: Heard, more: Observer | None) -> None:
        self.number = number
        self.requests = self.prompt_tokens = 0
        self.stats = Stats(site.slo)
        self._feed = feed
        self._more = more
        self._executor = SimulatedExecutor(
            site.capacity,
            site.cost,
            feed.lengths,
            windows=site.windows,
            spent=self.stats.totals.spent,
            acceptance=site.acceptance,
            host=site.host,
        )
        policies = site.policies(site.settings, feed.lengths)
        if policies.drafter is not None and site.acceptance is not None:
            policies = replace(policies, drafter=guesses)  # no text has values here
        self._scheduler = Scheduler(
            site.settings, site.capacity, token_budget=site.token_budget, observer=self, policies=policies
        )
        self.engine = Engine(f"replica {number}", self._scheduler, self._executor)

    def view(self, request: Request | None = None) -> ReplicaView:
        """Exact at any moment, however many steps a plan stands for; with what it has cached of this prompt."""
        capacity, keys = self.engine.capacity, () if request is None else request.block_keys
        return ReplicaView(
            self.number,
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            blocks=capacity.blocks,
            free_blocks=capacity.blocks - self._scheduler.used_blocks,
            cached_tokens=self._scheduler.cached_tokens(keys) if keys else 0,
        )

    def observe(self, event: Event) -> None:
        self.stats.observe(event)
        if self._more is not None:
            self._more.observe(event)
        if isinstance(event, Arrived):
            self.requests += 1
            self.prompt_tokens += event.prompt_tokens
        elif isinstance(event, Finished):
            self.requests -= 1
            self.prompt_tokens -= event.usage.prompt_tokens
            self._feed.ended(event.request_id)
            if event.reason is FinishReason.ERROR:
                self._feed.stop(SimulationFailed(f"replica {self.number} failed: {self._executor.error}"))


class _Views(Sequence[ReplicaView]):
    """One view per replica, made when somebody looks."""

    def __init__(self, replicas: Sequence[Replica], request: Request) -> None:
        self._replicas = replicas
        self._request = request

    def __len__(self) -> int:
        return len(self._replicas)

    @overload
    def __getitem__(self, at: int) -> ReplicaView: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[ReplicaView]: ...
    def __getitem__(self, at: int | slice) -> ReplicaView | Sequence[ReplicaView]:
        if isinstance(at, slice):
            return _Views(self._replicas[at], self._request)
        return self._replicas[at].view(self._request)


def simulate(
    arrivals: Iterable[Arrival],
    site: Site,
    *,
    dispatch: Route = round_robin,
    clients: int = 1,
    seed: int = 0,
    observer: Observer | None = None,
) -> Report:
    """Run the traffic to its end. `seed` is what the traffic was made with, for the report; `clients` is for arrivals
    without times; `observer` sees the events of all replicas. Raises what the traffic or the cost model raises."""
    here = range(site.replicas)
    fleet = Fleet(enumerate(arrivals), site, here, dispatch=dispatch, clients=clients, observer=observer)
    with seldom_collected():
        return merged(seed, clock.run(fleet.run(), virtual=True))


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Plans and events are small tuples without cycles: looking for garbage takes 5 to 10 % of the time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def merged(seed: int, parts: Sequence[Part]) -> Report:
    """One report of all replicas."""
    totals = Totals()
    for part in parts:
        totals.merge(part.totals)
    return Report(seed, len(parts), totals, tuple(part.digest for part in parts))


class Fleet:
    """Some replicas of a site under virtual time, and the feed that sends them their requests. Not all of them need be
    `here` if requests are dealt round robin."""

    def __init__(
        self,
        arrivals: Iterator[tuple[int, Arrival] | None],
        site: Site,
        here: Sequence[int],
        *,
        dispatch: Route = round_robin,
        clients: int = 1,
        observer: Observer | None = None,
    ) -> None:
        self._feed = Feed(
            arrivals,
            block_tokens=site.capacity.block_tokens,
            max_new_tokens=site.max_new_tokens,
            clients=clients,
        )
        self._of = site.replicas
        self._replicas = {number: Replica(number, site, self._feed, observer) for number in here}
        self._all = list(self._replicas.values())
        self._dispatch = dispatch
        self._serving: list[asyncio.Task[None]] = []

    async def run(self) -> list[Part]:
        """From the first arrival to the last answer."""
        await self.begin()
        return await self.end()

    async def begin(self) -> None:
        self._serving = [asyncio.create_task(replica.engine.run()) for replica in self._replicas.values()]
        self._feed.begin(self._send)

    async def until(self, when_s: float) -> None:
        """There are more arrivals; go on to this moment."""
        self._feed.go_on()
        await clock.sleep_until(when_s)
        self._check()

    async def end(self) -> list[Part]:
        """There are no more arrivals; go on until all are answered. Raises what the traffic or the cost model did."""
        self._feed.go_on()
        await self._feed.done.wait()
        await clock.sleep(1.0)  # every executor hears whom to forget
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)
        self._check()
        return [Part(replica.stats.totals, replica.stats.digest) for replica in self._replicas.values()]

    def _send(self, number: int, traffic: Traffic) -> Engine:
        plain = self._dispatch is round_robin
        request = traffic.request
        chosen = number % self._of if plain else self._dispatch(number, request, _Views(self._all, request))
        engine = self._replicas[chosen].engine
        engine.submit(request)
        return engine

    def _check(self) -> None:
        if self._feed.error is not None:
            raise self._feed.error
