"""A fleet question for real traffic: profiles from the cost model, pools from the formulas, then a simulated slice.

A fleet of thousands is many small fleets: `SLICE` of its replicas with their share of the requests, least loaded first,
are simulated, and the count is raised until the promises hold. A larger fleet queues less, so the slice errs on the
safe side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil

from headrace.cluster.router import least_tokens
from headrace.core.config import BadSetting
from headrace.sim.cost.batch import batch_of
from headrace.sim.plan.answer import Answer, Part
from headrace.sim.plan.files import plan_file
from headrace.sim.plan.pools import NoFleet, Pair, Profile, Sized, Split, kusd_per_year, sized, split
from headrace.sim.plan.search import worse
from headrace.sim.run import simulate
from headrace.sim.scenario import Scenario, parse_hardware
from headrace.sim.sweep import attained
from headrace.workload.arrival import Arrival

SLICE = 8  # replicas that are simulated
THRESHOLDS = tuple(2**power for power in range(8, 18))
ROUNDS = 14


@dataclass(frozen=True, slots=True)
class Checked:
    """One pool after simulation."""

    formula: int  # replicas by the formulas
    replicas: int  # that were simulated to hold
    kept: float
    first_kept: float  # with as many as the formulas say


@dataclass(frozen=True, slots=True)
class Fleet:
    """What fleets the traffic needs."""

    devices: int  # of one replica
    usd_per_hour: float | None  # of one replica
    one: Sized
    splits: tuple[Split, ...]
    checked: tuple[tuple[str, tuple[Checked, ...]], ...]  # (name, its pools)

    @property
    def best(self) -> Split | None:
        better = [found for found in self.splits if found.devices < self.one.devices]
        return min(better, key=lambda found: (found.devices, found.long.ttft_s), default=None)


def profile(scenario: Scenario, usual_context: float) -> Profile:
    """One replica as straight lines: a step with one row, what each row more costs at the usual context, and what each
    prompt token adds."""
    site = scenario.site()
    context = max(2, round(usual_context))
    capacity, engine = site.capacity, scenario.engine
    rows = max(2, min(engine.max_running, capacity.blocks * capacity.block_tokens // context))
    one, many = (site.cost.estimate(batch_of([(context, 1)] * n, n, site.windows)).seconds for n in (1, rows))
    row_s = (many - one) / (rows - 1) * 8192 / context
    chunk = site.cost.estimate(batch_of([(0, site.token_budget)], 1, site.windows)).seconds
    return Profile(
        max(one - row_s * context / 8192, 1e-6),
        row_s,
        site.token_budget,
        capacity.blocks,
        engine.max_running,
        capacity.block_tokens,
        max(0.0, chunk - one) / site.token_budget,
    )


def fleet(scenario: Scenario, rate: float, slo_s: float, heard: Callable[[str], None] = lambda line: None) -> Fleet:
    """Raises NoFleet, BadSetting and what the scenario raises."""
    arrivals = list(scenario.arrivals())
    pairs = [(one.prompt_tokens, one.output_tokens) for one in arrivals]
    context = max(prompt + output for prompt, output in pairs)
    line = profile(scenario, sum(prompt + output / 2 for prompt, output in pairs) / len(pairs))
    one = sized(line, pairs, rate, slo_s, context)
    splits = tuple(_splits(line, pairs, rate, slo_s, context))
    topology = parse_hardware(scenario.simulate.hardware)
    price = topology.device.usd_per_hour
    found = Fleet(topology.devices, None if price is None else price * topology.devices, one, splits, ())
    natural = scenario.rate()
    heard(f"one pool: {one.devices:,} replicas by the formulas; simulating {min(SLICE, one.devices)} of them ...")
    checked: list[tuple[str, tuple[Checked, ...]]] = [
        ("one pool", (checked_pool(scenario, arrivals, rate / natural, one.devices),))
    ]
    if found.best:
        cut = found.best.threshold
        heard(f"two pools at {cut:,} tokens: {found.best.devices:,} replicas; simulating a slice of each ...")
        parts = (
            [a for a in arrivals if a.prompt_tokens + a.output_tokens <= cut],
            [a for a in arrivals if a.prompt_tokens + a.output_tokens > cut],
        )
        pools = (found.best.short, found.best.long)
        both = tuple(
            checked_pool(scenario, part, rate / natural, pool.devices) for part, pool in zip(parts, pools, strict=True)
        )
        checked.append((f"two pools at {cut:,}", both))
    return replace(found, checked=tuple(checked))


def _splits(line: Profile, pairs: Sequence[Pair], rate: float, slo_s: float, context: int) -> Iterator[Split]:
    for threshold in THRESHOLDS:
        try:
            found = split(line, pairs, rate, slo_s, threshold, context)
        except NoFleet:
            continue
        if found:
            yield found


def checked_pool(scenario: Scenario, arrivals: Sequence[Arrival], speed: float, count: int) -> Checked:
    """Raise or lower the count by a tenth until a slice of the pool just keeps the promises. Raises NoFleet."""
    attain, now = scenario.simulate.attain, count
    kept = first = slice_kept(scenario, arrivals, speed, now)
    for _ in range(ROUNDS):
        fewer = min(now - 1, ceil(now / 1.1))
        if kept < attain or fewer < 1:
            break
        less = slice_kept(scenario, arrivals, speed, fewer)
        if less < attain:
            break
        now, kept = fewer, less
    for _ in range(ROUNDS):
        if kept >= attain:
            return Checked(count, now, kept, first)
        now = max(now + 1, ceil(1.1 * now))
        kept = slice_kept(scenario, arrivals, speed, now)
    raise NoFleet(f"even {now:,} replicas do not keep the promises in simulation: they are broken without any queue")


def slice_kept(scenario: Scenario, arrivals: Sequence[Arrival], speed: float, count: int) -> float:
    """The share of the requests that a slice of so many replicas keeps its promises to."""
    part = min(SLICE, count)
    factor = speed * part / count
    there = replace(scenario, simulate=replace(scenario.simulate, replicas=part))
    coming = (replace(one, at_s=(one.at_s or 0.0) / factor) for one in arrivals)
    return attained(simulate(coming, there.site(), dispatch=least_tokens).totals) or 0.0


def answer(found: Fleet, rate: float, scenario: Scenario, swings: Sequence[tuple[str, Checked]] = ()) -> Answer:
    """In words."""
    rows = [["fleet", "short", "long", "replicas", "devices", "k$/year", "p99 TTFT short ms", "long ms"]]
    one = found.one
    rows.append(_row("one pool", (None, one.devices), one.devices, found, (None, one.ttft_s)))
    for each in found.splits:
        mark = "* " if each is found.best else ""
        counts, ttfts = (each.short.devices, each.long.devices), (each.short.ttft_s, each.long.ttft_s)
        rows.append(_row(f"{mark}split at {each.threshold:,}", counts, each.devices, found, ttfts))
    lines = list(_headline(found, rate))
    totals = {name: sum(pool.replicas for pool in pools) for name, pools in found.checked}
    there = replace(scenario.simulate, replicas=min(SLICE, min(totals.values())), dispatch="least-tokens")
    return Answer(
        f"Fleets for {rate:,.3g} requests/s",
        lines,
        (Part("By M/G/c formulas", "Erlang's C and Kimura's tail; the best split is marked.", rows),),
        tuple(
            f"split at {each.threshold:,}: {each.devices:,} replicas are no fewer than {one.devices:,} in one pool"
            for each in found.splits
            if each.devices >= one.devices
        ),
        tuple(_sure(found, swings)),
        tuple(_work(found)),
        {
            "rate": rate,
            "devices_of_a_replica": found.devices,
            "one_pool": asdict(one),
            "splits": [asdict(each) for each in found.splits],
            "simulated": {name: [asdict(pool) for pool in pools] for name, pools in found.checked},
            "ten_percent_off": {name: one.replicas for name, one in swings},
        },
        plan_file(replace(scenario, simulate=there), [*lines, "A slice of the fleet: at most eight replicas."]),
    )


def _headline(found: Fleet, rate: float) -> Iterator[str]:
    whole = [(sum(pool.replicas for pool in pools), name, pools) for name, pools in found.checked]
    count, name, _ = min(whole, key=lambda one: one[0])
    price = "" if found.usd_per_hour is None else f", {kusd_per_year(count, found.usd_per_hour):,.0f} k$ a year"
    devices = count * found.devices
    yield f"RECOMMENDED: {name}, {count:,} replicas, {devices:,} devices{price}, for {rate:,.3g} requests/s."
    for total, name, pools in whole:
        by = sum(pool.formula for pool in pools)
        worst = min(pool.first_kept for pool in pools)
        yield f"  simulated, {name}: {total:,} replicas hold; the formulas say {by:,}, which keep {worst:.1%}."


def _sure(found: Fleet, swings: Sequence[tuple[str, Checked]]) -> Iterator[str]:
    yield "A slice of at most eight replicas is simulated, so a larger fleet queues a little less than that."
    yield "Counts are found to a tenth. Prices of steps are the cost model's at catalogue peaks, not measured."
    for name, one in swings:
        yield f"{name}: {one.replicas:,} replicas in one pool"


def _work(found: Fleet) -> Iterator[str]:
    service = found.one.service
    yield "slots = min(most x 8192 / context, KV blocks / blocks of a context)"
    yield "seconds in a slot = (chunks + output) x (step + row x rows + slots x prompts' seconds a step)"
    yield "p99 wait = ln(C / 0.01) / (2 (servers x rate of one - arrivals) / (1 + cv^2)), C by Erlang; 85 % busy"
    yield (
        f"one pool: {service.slots} slots, {service.per_s:.3g} requests/s a replica, cv^2 {service.cv2:.2f}, prefill "
        f"{service.prefill_s:.3f} s"
    )


def swings_of(scenario: Scenario, rate: float, found: Fleet) -> list[tuple[str, Checked]]:
    """One pool again, with one thing at a time 10 % worse."""
    start, (_, (pool,)) = scenario.rate(), found.checked[0]
    answers = []
    for name, there in worse(scenario):
        arrivals = list(there.arrivals())
        answers.append((name, checked_pool(there, arrivals, rate / start, pool.replicas)))
    return answers


def _row(
    name: str,
    counts: tuple[int | None, int],
    replicas: int,
    found: Fleet,
    ttfts: tuple[float | None, float],
) -> list[str]:
    shown = ["-" if count is None else f"{count:,}" for count in counts]
    late = ["-" if ttft is None else f"{1e3 * ttft:,.0f}" for ttft in ttfts]
    price = found.usd_per_hour
    year = "-" if price is None else f"{kusd_per_year(replicas, price):,.0f}"
    return [name, *shown, f"{replicas:,}", f"{replicas * found.devices:,}", year, *late]


def needs_slo(ttft_s: float | None) -> float:
    """The promise that the formulas are about. Raises BadSetting."""
    if ttft_s is None:
        raise BadSetting("a fleet is sized for the wait before the first token; say how long with --slo ttft=1.0")
    return ttft_s
