"""How many more servers fit under a row's power budget when their clocks are capped in time (POLCA, ASPLOS 2024), and
what a token costs in joules at each clock.

    row as provisioned, load to its peak --> peak watts / 0.79 = budget
    row + x %: without caps -> latencies to compare with, and how far over the budget it would go
               with caps    -> brakes, ticks over the budget, latencies: within the promises? x fits

The load of every server rises to its peak for half of the time and stays there: the busiest stretch of a day.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

import msgspec

from headrace.sim.cost.clocked import FULL_MHZ, Clocked
from headrace.sim.plan.limits import steady
from headrace.sim.plan.traffic import Demand
from headrace.sim.power import Drawn, Row, drawn
from headrace.sim.run import Site
from headrace.sim.workers import Each
from headrace.workload.arrival import Arrival

PEAK_SHARE = 0.79  # of its budget that a row of inference servers draws at most, as provisioned (POLCA, table 2)
LOW_SHARE = 0.5  # of the servers have low priority
CLOCKS = (1410.0, 1305.0, 1275.0, 1110.0, 900.0)
LOSSES = {"high p50": 0.01, "high p99": 0.05, "low p50": 0.05, "low p99": 0.50}  # of latency that may be lost


@dataclass(frozen=True, slots=True)
class Sample:
    """What came of one row."""

    peak_w: float
    peak_share: float
    over: int
    brakes: int
    e2e_s: tuple[float, float, float, float]  # in the order of LOSSES
    capped: float  # share of the ticks under any cap
    joules_per_token: float
    joules_per_request: float
    lost: int


@dataclass(frozen=True, slots=True)
class More:
    """So many servers more."""

    servers: int
    share: float  # of the servers there were
    free: Sample
    held: Sample

    @property
    def losses(self) -> tuple[float, ...]:
        """Of latency, in the order of LOSSES."""
        return tuple(mine / theirs - 1 for mine, theirs in zip(self.held.e2e_s, self.free.e2e_s, strict=True))

    @property
    def broken(self) -> list[str]:
        """The promises that are not kept; none: these servers fit."""
        found = [f"{self.held.brakes} power brakes"] * bool(self.held.brakes)
        for (name, most), lost in zip(LOSSES.items(), self.losses, strict=True):
            found += [f"{name} latency {lost:+.1%} (at most {most:+.0%})"] * (lost > most)
        return found


@dataclass(frozen=True, slots=True)
class Clock:
    """A replica at one clock, its steps full."""

    mhz: float
    tokens_per_s: float
    watts: float  # of a server in steps
    joules_per_token: float
    joules_per_request: float


@dataclass(frozen=True, slots=True)
class Power:
    """All that was found."""

    servers: int
    budget_w: float
    base: Sample
    more: tuple[More, ...]
    clocks: tuple[Clock, ...]
    swings: tuple[tuple[str, More], ...]

    @property
    def fitting(self) -> More | None:
        """The most that fit, all smaller steps fitting too."""
        found = None
        for one in self.more:
            if one.broken:
                break
            found = one
        return found


@dataclass(frozen=True, slots=True)
class Setting:
    """One row and its traffic, without the price of a step."""

    servers: int
    budget_w: float  # infinite as 1e30
    control: bool
    static_w: float
    rest_w: float
    load: float = 1.0  # times the traffic


def rising(asked: Sequence[Arrival], servers: int, rate: float, seconds: float, seed: int = 0) -> list[Arrival]:
    """Requests of these lengths for so many servers of `rate` each at the peak: from half of it, in half the time.

    The cumulative number rises as r (t/2 + t^2 / (2 s)) up to t = s/2 ... then straight; it is inverted for arrivals
    of a unit Poisson process.
    """
    rng, total, found, at_s = Random(seed), servers * rate, list[Arrival](), 0.0
    ramp_s = seconds / 2
    while True:
        now = total * (0.5 + 0.5 * min(1.0, at_s / ramp_s))
        at_s += rng.expovariate(now)
        if at_s >= seconds:
            return found
        found.append(replace(asked[len(found) % len(asked)], at_s=at_s))


def power(
    asked: Sequence[Arrival],
    site: Site,
    rate: float,
    servers: int,
    extras: Sequence[float],
    seconds: float,
    static_w: float,
    rest_w: float,
    each: Each,
) -> Power:
    """`rate` is what one server gets at its peak, requests per second."""

    def work(question: bytes) -> bytes:
        one = msgspec.json.decode(question, type=Setting)
        low = round(LOW_SHARE * one.servers)
        row = Row(site, one.servers, low, one.static_w, one.rest_w, one.budget_w, one.control)
        return msgspec.json.encode(_sample(drawn(rising(asked, one.servers, one.load * rate, seconds), row)))

    def ask(settings: Sequence[Setting]) -> list[Sample]:
        answers = {at: msgspec.json.decode(text, type=Sample) for at, text in each(work, [*map(_encoded, settings)])}
        return [answers[at] for at in range(len(settings))]

    usual = Setting(servers, 1e30, False, static_w, rest_w)
    (base,) = ask([usual])
    budget_w = base.peak_w / PEAK_SHARE
    counts = [max(servers + 1, round(servers * (1 + extra))) for extra in extras]
    pairs = [replace(usual, servers=n, budget_w=budget_w, control=held) for n in counts for held in (False, True)]
    found = ask(pairs)
    more = tuple(More(n, n / servers - 1, found[2 * at], found[2 * at + 1]) for at, n in enumerate(counts))
    whole = Power(servers, budget_w, base, more, tuple(clocks(asked, site, static_w, rest_w)), ())
    if whole.fitting is None:
        return whole
    there = replace(usual, servers=whole.fitting.servers, budget_w=budget_w)
    worse = {
        "10 % more traffic": replace(there, load=1.1),
        "devices' idle power 10 % more": replace(there, static_w=1.1 * static_w),
        "a budget 10 % smaller": replace(there, budget_w=0.9 * budget_w),
    }
    answers = ask([replace(one, control=held) for one in worse.values() for held in (False, True)])
    swings = tuple(
        (name, More(there.servers, whole.fitting.share, answers[2 * at], answers[2 * at + 1]))
        for at, name in enumerate(worse)
    )
    return replace(whole, swings=swings)


def _encoded(setting: Setting) -> bytes:
    return msgspec.json.encode(setting)


def _sample(found: Drawn) -> Sample:
    high, low = sorted(found.e2e_s[False]), sorted(found.e2e_s[True])
    times = (_quantile(high, 0.5), _quantile(high, 0.99), _quantile(low, 0.5), _quantile(low, 0.99))
    capped = sum(caps.low_mhz < FULL_MHZ for caps in found.caps) / max(len(found.caps), 1)
    return Sample(
        max(found.watts, default=0.0),
        max(found.shares, default=0.0),
        found.over,
        found.brakes,
        times,
        capped,
        found.joules / max(found.output_tokens, 1),
        found.joules / max(found.requests, 1),
        found.lost,
    )


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 1e-9


def clocks(asked: Sequence[Arrival], site: Site, static_w: float, rest_w: float) -> Iterator[Clock]:
    """A server whose steps are as full as its memory allows, at every clock."""
    count = len(asked)
    prompt = sum(one.prompt_tokens for one in asked) / count
    output = sum(one.output_tokens for one in asked) / count
    room = site.capacity.blocks * site.capacity.block_tokens / (prompt + output / 2)
    running = max(1.0, min(float(site.settings.max_running), room))
    batch = steady(Demand(1, 1.0, prompt, prompt, output, round(prompt + output), (), None), running, site.windows)
    for mhz in CLOCKS:
        cost = Clocked(site.cost, static_w, mhz).estimate(batch)
        watts = cost.joules / cost.seconds + rest_w
        each = watts * cost.seconds / running
        yield Clock(mhz, running / cost.seconds, watts, each, each * output)
