"""A mix for real traffic: its buckets, what each device type serves of them by the cost model, and the mix simulated.

arrivals --sizes--> buckets --cost model--> requests/s per type --pack--> mix --simulate--> holds? else pack looser
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from headrace.cluster.router import least_tokens
from headrace.core.config import EngineSettings
from headrace.core.types import SLO
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import batch_of, windows_of
from headrace.sim.plan.limits import steady
from headrace.sim.plan.mix import Bucket, Mix, NoMix, Type, pack
from headrace.sim.plan.traffic import Demand
from headrace.sim.run import simulate
from headrace.sim.scenario import Scenario, convention, placement
from headrace.sim.settings import SimulateSettings
from headrace.sim.stats import Totals
from headrace.sim.sweep import attained
from headrace.workload.arrival import Arrival

PROMPTS = (25, 100, 250, 500, 1000, 2000, 4000, 8000, 16_000, 32_000, 64_000)  # upper edges of the buckets
OUTPUTS = (25, 100, 250, 500, 1000, 2000)
LOOSER = 1.1  # every round of confirmation packs this much less tightly
ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Confirmed:
    """A mix that was simulated: what was kept, at which slack, and the part of each type."""

    mix: Mix
    buckets: tuple[Bucket, ...]
    slack: float
    kept: float
    totals: Totals
    packed: Mix  # the first mix, which ignores queues
    packed_kept: float


def bucket_of(prompt: int, output: int) -> tuple[int, int]:
    return bisect_left(PROMPTS, prompt), bisect_left(OUTPUTS, output)


def buckets(
    arrivals: Sequence[Arrival], sites: Sequence[SimulateSettings], scenario: Scenario, slo: SLO
) -> list[Bucket]:
    """Every size that occurs, by its mean lengths, with what one replica of each site serves of it."""
    sizes: dict[tuple[int, int], list[Arrival]] = {}
    for one in arrivals:
        sizes.setdefault(bucket_of(one.prompt_tokens, one.output_tokens), []).append(one)
    span_s = (arrivals[-1].at_s or 0.0) - (arrivals[0].at_s or 0.0)
    if span_s <= 0:
        raise NoMix("the traffic has no rate: it needs requests at different times")
    found = []
    for key in sorted(sizes):
        same = sizes[key]
        prompt = sum(one.prompt_tokens for one in same) / len(same)
        output = sum(one.output_tokens for one in same) / len(same)
        most = tuple(highest(site, scenario.engine, prompt, output, slo) for site in sites)
        found.append(Bucket(f"{prompt:,.0f} + {output:,.0f} tokens", len(same) / span_s, most))
    return found


def highest(site: SimulateSettings, engine: EngineSettings, prompt: float, output: float, slo: SLO) -> float:
    """Requests per second of one size that one replica serves when all its steps are as full as memory and the promise
    about tokens allow; 0 if it cannot keep a promise at all."""
    where = placement(site)
    tokens = where.kv_tokens(site.memory_use)
    cost = Analytic(where, convention(site), host_s=site.host_ms / 1000)
    windows = windows_of(where.shape)
    if tokens < prompt + output or prompt + output > where.shape.max_context_tokens:
        return 0.0
    if slo.ttft_s and cost.estimate(batch_of([(0, round(prompt))], 1, windows)).seconds > slo.ttft_s:
        return 0.0
    demand = Demand(1, 1.0, prompt, prompt, output, round(prompt + output), (), slo)

    def step_s(running: float) -> float:
        return cost.estimate(steady(demand, running, windows)).seconds

    low, high = 0, max(1, int(min(engine.max_running, tokens / (prompt + output / 2))))
    if slo.tpot_s is None or step_s(high) <= slo.tpot_s:
        low = high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if step_s(middle) <= (slo.tpot_s or 0.0) else (low, middle)
    return low / (max(output, 1.0) * step_s(low)) if low else 0.0


def confirm(
    arrivals: Sequence[Arrival],
    types: Sequence[Type],
    sites: Sequence[SimulateSettings],
    scenario: Scenario,
    slo: SLO,
    slices: int = 8,
    heard: Callable[[str], None] = lambda line: None,
) -> Confirmed:
    """Pack and simulate, ever looser, until the promises hold. Raises NoMix."""
    sized = buckets(arrivals, sites, scenario, slo)
    slack, first = 1.0, None
    for _ in range(ROUNDS):
        mix = pack(types, sized, slices, slack)
        totals = played(arrivals, mix, sites, scenario)
        kept = attained(totals) or 0.0
        first = first or (mix, kept)
        heard(f"  {told(mix)}: ${mix.usd_per_hour:,.2f} an hour, {kept:.2%} kept")
        if kept >= scenario.simulate.attain:
            return Confirmed(mix, tuple(sized), slack, kept, totals, *first)
        slack *= LOOSER
    raise NoMix(f"no mix held within {ROUNDS} rounds of looser packing; loosen --slo or --attain")


def told(mix: Mix) -> str:
    """'3 A10G + 1 A100-80GB'."""
    return " + ".join(f"{count} {one.name}" for one, count in zip(mix.types, mix.counts, strict=True) if count)


def played(arrivals: Sequence[Arrival], mix: Mix, sites: Sequence[SimulateSettings], scenario: Scenario) -> Totals:
    """The traffic through the mix: every type serves its slices, on the least loaded of its replicas."""
    totals = Totals()
    parts = dealt(arrivals, mix)
    for kind, count in enumerate(mix.counts):
        if count and parts[kind]:
            there = replace(scenario, simulate=replace(sites[kind], replicas=count))
            report = simulate(parts[kind], there.site(), dispatch=least_tokens)
            totals.merge(report.totals)
    return totals


def dealt(arrivals: Sequence[Arrival], mix: Mix) -> list[list[Arrival]]:
    """The arrivals of each type: within a bucket every type gets its share as evenly as integers allow."""
    keys = {key: at for at, key in enumerate(sorted({bucket_of(*lengths) for lengths in _lengths(arrivals)}))}
    owed = [[0.0] * len(mix.types) for _ in keys]
    parts: list[list[Arrival]] = [[] for _ in mix.types]
    for one, lengths in zip(arrivals, _lengths(arrivals), strict=True):
        at = keys[bucket_of(*lengths)]
        for kind in range(len(mix.types)):
            owed[at][kind] += mix.share(at, kind)
        kind = max(range(len(mix.types)), key=owed[at].__getitem__)
        owed[at][kind] -= 1
        parts[kind].append(one)
    return parts


def _lengths(arrivals: Sequence[Arrival]) -> Iterator[tuple[int, int]]:
    return ((one.prompt_tokens, one.output_tokens) for one in arrivals)
