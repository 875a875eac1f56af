"""Answers to scenarios, one or many at once, and the highest load that keeps the promises.

A sweep keeps the requests and changes only how fast they come, so two loads differ in nothing else, and the answer is
monotone but for the noise of the tail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from headrace.cluster.router import round_robin
from headrace.core.config import BadSetting
from headrace.core.types import FinishReason
from headrace.sim.apart import simulate_apart
from headrace.sim.feed import NotApart
from headrace.sim.run import Report, simulate
from headrace.sim.scenario import Scenario
from headrace.sim.stats import Totals
from headrace.sim.workers import Each
from headrace.workload.arrival import Arrival

Watch = Callable[[Iterator[Arrival]], Iterator[Arrival]]

PRECISION = 0.01  # relative width of the interval at which a bisection ends
ROOM = 0.05  # by which steps may take longer than their price says (`make accuracy`), and promises are to be kept yet


def answer(scenario: Scenario, processes: int = 1, watch: Watch = iter) -> Report:
    """Simulate it; the result does not depend on the number of processes. `watch` sees the arrivals pass, in every
    process. Raises what the scenario raises."""
    site, seed = scenario.site(), scenario.traffic[0].seed
    if site.replicas > 1 and scenario.dispatch is round_robin and scenario.traffic[0].clients is None:
        try:
            return simulate_apart(lambda: watch(scenario.arrivals()), site, processes=processes, seed=seed)
        except NotApart:
            pass  # conversations tie the replicas together
    return simulate(watch(scenario.arrivals()), site, dispatch=scenario.dispatch, clients=scenario.clients, seed=seed)


def answered(question: bytes) -> bytes:
    """As `answer`, from bytes to bytes, for another process."""
    report = answer(Scenario.from_json(question))
    return msgspec.msgpack.encode(report, enc_hook=lambda kept: kept.state())


def answers(
    scenarios: Sequence[Scenario], each: Each, heard: Callable[[int, Report], None] = lambda at, report: None
) -> list[Report]:
    """One report per scenario; `heard` is called with each as it comes. Raises WorkerFailed."""
    reports: dict[int, Report] = {}
    for at, encoded in each(answered, [scenario.to_json() for scenario in scenarios]):
        reports[at] = msgspec.msgpack.decode(encoded, type=Report, dec_hook=lambda kind, state: kind.of(tuple(state)))
        heard(at, reports[at])
    return [reports[at] for at in range(len(scenarios))]


def attained(totals: Totals) -> float | None:
    """Of the requests that had an SLO, the share that kept it. Who went away by himself does not count; who was
    refused or came too late does. None if nobody had one."""
    gone = totals.finished.get(FinishReason.ABORT, 0)
    asked = totals.promised + totals.rejected - gone
    return totals.good / asked if totals.promised and asked > 0 else None


def holds(scenario: Scenario, report: Report) -> bool:
    share = attained(report.totals)
    return share is not None and share >= scenario.simulate.attain


@dataclass(frozen=True, slots=True)
class Point:
    """One load that was tried."""

    rate: float  # requests per second
    report: Report
    holds: bool


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep found, in the order of the rates."""

    points: tuple[Point, ...]
    highest: Point | None  # the highest load found to keep the promises, below all that were found not to
    planned_rate: (
        float | None
    )  # requests per second that a machine slower by ROOM holds too; None: fewer than all these


def highest(
    scenario: Scenario,
    low: float,
    high: float,
    each: Each,
    at_once: int = 1,
    heard: Callable[[Point], None] = lambda point: None,
) -> Sweep:
    """The highest rate in [low, high] that keeps the promises, to PRECISION. Every round tries `at_once` rates that
    cut the interval evenly. Raises BadSetting for an interval that is none, or traffic without an SLO."""
    if not 0 < low < high:
        raise BadSetting(f"--sweep rate={low:g}:{high:g} is not LOW:HIGH with 0 < LOW < HIGH")
    if not any(part.slo for part in scenario.traffic):
        raise BadSetting("a sweep looks for the highest load that keeps the promises; say which with --slo ttft=1.0")
    points: list[Point] = []

    def attempt(rates: Sequence[float]) -> tuple[Point, ...]:
        tried = curve(scenario, rates, each, heard)
        points.extend(tried)
        return tried

    first, last = attempt([low, high])
    if not first.holds:
        return Sweep((first, last), None, None)
    edge = high if last.holds else _bisected(attempt, low, high, at_once)
    points.sort(key=lambda point: point.rate)
    found = next(point for point in points if point.rate == edge)
    return Sweep(tuple(points), found, _planned(scenario, low, edge, each, at_once))


def _planned(scenario: Scenario, low: float, edge: float, each: Each, at_once: int) -> float | None:
    """What a machine holds whose steps take 1 + ROOM times as long. That is this machine with another second: its
    promises are as much tighter, its arrivals as much closer. Where a promise hardly depends on the rate, the edge
    says little, and this is far below it."""
    slower = replace(scenario, margin=1 - (1 - scenario.margin) / (1 + ROOM))

    def attempt(rates: Sequence[float]) -> tuple[Point, ...]:
        return curve(slower, rates, each)

    near = max(low, (1 - 2 * ROOM) * edge)
    for rate, above in ((edge, None), (near, edge), (low, near)):
        if attempt([rate])[0].holds:
            return (rate if above is None else _bisected(attempt, rate, above, at_once)) / (1 + ROOM)
    return None


def _bisected(attempt: Callable[[Sequence[float]], Sequence[Point]], low: float, high: float, at_once: int) -> float:
    """Between a rate that holds and one that does not: the highest that was tried and holds, to PRECISION."""
    while high - low > PRECISION * high:
        width = (high - low) / (at_once + 1)
        tried = attempt([low + width * (part + 1) for part in range(at_once)])
        high = next((point.rate for point in tried if not point.holds), high)
        low = max([low, *(point.rate for point in tried if point.holds and point.rate < high)])
    return low


def curve(
    scenario: Scenario,
    rates: Sequence[float],
    each: Each,
    heard: Callable[[Point], None] = lambda point: None,
) -> tuple[Point, ...]:
    """The same requests at each of these rates."""
    natural = scenario.rate()
    points: dict[float, Point] = {}

    def hear(at: int, report: Report) -> None:
        points[rates[at]] = Point(rates[at], report, holds(scenario, report))
        heard(points[rates[at]])

    answers([scenario.faster(rate / natural) for rate in rates], each, hear)
    return tuple(points[rate] for rate in rates)
