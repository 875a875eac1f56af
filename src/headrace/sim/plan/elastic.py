"""What a fleet costs that grows and shrinks: cold starts by bytes and bandwidths, keep-alive and scale-to-zero
simulated on the traffic, against replicas that are always there.

    weights, disk, link --> ColdStart --> every (least, keep-alive) --simulate--> promises kept? dollars an hour
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf

from headrace.cluster.scaling import ColdStart, Scaling
from headrace.core.types import SLO
from headrace.draw.text import short
from headrace.sim.elastic import Served, served
from headrace.sim.plan.answer import Answer, Part
from headrace.sim.plan.files import plan_file
from headrace.sim.run import Site
from headrace.sim.scenario import Scenario
from headrace.workload.arrival import Arrival

KEEP_ALIVES = (0.0, 60.0, 300.0, 900.0, inf)


@dataclass(frozen=True, slots=True)
class Tried:
    """One rule on the traffic."""

    rule: Scaling
    kept: float  # share of the requests, every promise; 1 where nothing was promised
    ttft_p50_s: float
    ttft_p99_s: float
    cold: int
    starts: int
    mean: float  # replicas that are paid, over the whole time
    most: int
    usd_per_hour: float | None

    @property
    def cost(self) -> float:
        """Dollars an hour, or replicas where nobody said what they cost."""
        return self.mean if self.usd_per_hour is None else self.usd_per_hour


@dataclass(frozen=True, slots=True)
class Elastic:
    """All that was tried."""

    start: ColdStart
    tried: tuple[Tried, ...]
    attain: float
    requests: int
    swings: tuple[tuple[str, Tried], ...] = ()

    @property
    def best(self) -> Tried | None:
        """The cheapest that keeps the promises, the quickest of equals."""
        able = [one for one in self.tried if one.kept >= self.attain]
        return min(able, key=lambda one: (round(one.cost, 9), one.ttft_p99_s), default=None)


def rules(per_replica: float, most: int) -> Iterator[Scaling]:
    """From nobody to everybody always there, with every keep-alive where it matters."""
    for least in sorted({0, 1, *range(2, most + 1, max(1, most // 4)), most}):
        for keep_s in KEEP_ALIVES if least < most else (inf,):
            if least or keep_s < inf:
                yield Scaling(per_replica, least, most, keep_s)


def tried(
    arrivals: Sequence[Arrival], site: Site, rule: Scaling, cold_s: float, slo: SLO | None, usd: float | None
) -> Tried:
    """`usd` is what one replica costs an hour."""
    found = served(arrivals, site, rule, cold_s)
    mean = found.paid_s / max(found.span_s, 1e-9)
    times = sorted(found.ttft_s)
    middle, late = (times[min(len(times) - 1, int(at * len(times)))] if times else inf for at in (0.5, 0.99))
    cost = None if usd is None else usd * mean
    return Tried(rule, _kept(found, slo), middle, late, found.cold, found.starts, mean, found.most, cost)


def _kept(found: Served, slo: SLO | None) -> float:
    if slo is None:
        return 1.0
    good = sum(
        (slo.ttft_s is None or first <= slo.ttft_s) and (slo.tpot_s is None or later <= slo.tpot_s)
        for first, later in zip(found.ttft_s, found.tpot_s, strict=True)
    )
    return good / max(1, len(found.ttft_s) + found.refused)


def elastic(
    arrivals: Sequence[Arrival],
    site: Site,
    start: ColdStart,
    slo: SLO | None,
    attain: float,
    per_replica: float,
    most: int,
    usd: float | None,
    heard: Callable[[str], None] = lambda line: None,
) -> Elastic:
    """Every rule, and the best one again with things 10 % worse."""
    found = []
    for rule in rules(per_replica, most):
        found.append(tried(arrivals, site, rule, start.seconds, slo, usd))
        heard(f"  {named(rule)}: {found[-1].kept:.2%} kept, {found[-1].mean:.2f} replicas on average")
    whole = Elastic(start, tuple(found), attain, len(arrivals))
    if whole.best is None:
        return whole
    rule = whole.best.rule
    faster = [replace(one, at_s=(one.at_s or 0.0) / 1.1) for one in arrivals]
    slow = replace(start, disk_bytes_per_s=0.9 * start.disk_bytes_per_s, link_bytes_per_s=0.9 * start.link_bytes_per_s)
    swings = (
        ("disk and link 10 % slower", tried(arrivals, site, rule, slow.seconds, slo, usd)),
        ("10 % more traffic", tried(faster, site, rule, start.seconds, slo, usd)),
    )
    return replace(whole, swings=swings)


def named(rule: Scaling) -> str:
    if rule.least == rule.most:
        return f"{rule.most} always there"
    keep = "for ever" if rule.keep_alive_s == inf else f"{rule.keep_alive_s:g} s"
    return f"{rule.least} to {rule.most}, kept {keep}"


def answer(found: Elastic, subject: str, scenario: Scenario) -> Answer:
    best, lines = found.best, list(_headline(found))
    there = replace(scenario.simulate, replicas=max(1, best.most if best else found.tried[-1].rule.most))
    rows = [["replicas", "kept", "p50 TTFT s", "p99 TTFT s", "cold requests", "starts", "paid on average", "$/h"]]
    return Answer(
        f"An elastic fleet of {subject}",
        lines,
        (
            Part(
                "Rules", f"{found.requests:,} requests, each rule simulated.", rows + [_row(one) for one in found.tried]
            ),
        ),
        tuple(
            f"{named(one.rule)}: only {one.kept:.2%} kept, p99 of the first token {one.ttft_p99_s:.1f} s"
            for one in found.tried
            if one.kept < found.attain
        ),
        tuple(_sure(found)),
        tuple(_work(found.start)),
        {
            "cold_start_s": found.start.seconds,
            "cold_start": asdict(found.start),
            "best": best and asdict(best),
            "tried": [asdict(one) for one in found.tried],
            "ten_percent_off": {name: one.kept for name, one in found.swings},
        },
        plan_file(replace(scenario, simulate=there), lines),
    )


def _headline(found: Elastic) -> Iterator[str]:
    best, start = found.best, found.start
    if best is None:
        yield "NO RULE keeps the promises: give more --most, or a looser --slo."
    else:
        fixed = [one for one in found.tried if one.rule.fixed and one.kept >= found.attain]
        cost = "" if best.usd_per_hour is None else f", ${best.usd_per_hour:,.2f} an hour"
        yield f"RECOMMENDED: {named(best.rule)}, {best.mean:.2f} replicas paid on average{cost}; {best.kept:.2%} kept."
        if fixed and not best.rule.fixed:
            cheapest = min(fixed, key=lambda one: one.cost)
            yield f"  {1 - best.cost / cheapest.cost:.0%} cheaper than {named(cheapest.rule)}."
        elif best.rule.fixed:
            yield "  Nothing that shrinks keeps the promises for less: cold starts are too long for them."
    yield (
        f"  A new replica draws its first token after {start.seconds:.1f} s: {start.process_s:g} s process, "
        f"{start.load_s:.1f} s weights, {start.warm_s:g} s warming."
    )


def _row(one: Tried) -> list[str]:
    return [
        named(one.rule),
        f"{one.kept:.2%}",
        f"{one.ttft_p50_s:.2f}",
        f"{one.ttft_p99_s:.1f}",
        f"{one.cold}",
        f"{one.starts}",
        f"{one.mean:.2f}",
        "-" if one.usd_per_hour is None else short(round(one.usd_per_hour, 2)),
    ]


def _sure(found: Elastic) -> Iterator[str]:
    yield "Bytes of weights follow from the shape; the disk, the process and the warming are what --disk, --process-s"
    yield "and --warm-s say, and nothing was measured. Replicas are paid from the decision to start them."
    for name, one in found.swings:
        holds = "still holds" if one.kept >= found.attain else "NO LONGER HOLDS"
        yield f"{name}: {holds}, {one.kept:.2%} kept, {one.mean:.2f} replicas"


def _work(start: ColdStart) -> Iterator[str]:
    yield "cold start = process + bytes / min(disk, devices x link) + warming"
    yield (
        f"  = {start.process_s:g} + {start.weight_bytes / 1e9:.2f} GB / min({start.disk_bytes_per_s / 1e9:g}, "
        f"{start.devices} x {start.link_bytes_per_s / 1e9:g}) GB/s + {start.warm_s:g} = {start.seconds:.2f} s"
    )
    yield "wanted = requests (waiting and served) / requests a replica should have, between least and most"
