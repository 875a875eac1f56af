"""The search for plans: memory turns most of the space down, bounds turn down more, the simulator judges the rest.

Candidates are simulated in the order of what they could be at best. One is skipped when a plan that was simulated is
already no worse in cost, latency and energy than the candidate could ever be, so the front is that of the whole space.

    space --memory--> --bounds--> [layout, fewest replicas that could do] --simulate--> holds? else more replicas
                                  [layout, all replicas]                  --simulate--> misses? then fewer miss too
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from headrace.core.config import BadSetting, EngineSettings
from headrace.sim.plan import space
from headrace.sim.plan.judge import Outcome, Question, Rival, encoded, idle_w, judged
from headrace.sim.plan.limits import Limits, hopeless, least_replicas, limits
from headrace.sim.plan.space import Plan, Pool, Refused
from headrace.sim.plan.traffic import Demand, demand
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.sim.workers import Each
from headrace.workload.settings import parse_slo

OBJECTIVES = ("cost", "latency", "energy", "throughput")
ENDLESS = 1 << 40

Heard = Callable[[str], None]
Best = tuple[float, float, float, float]  # (cost, end-to-end seconds, joules per token, -tokens per second)


@dataclass(frozen=True, slots=True)
class Judged:
    """A plan that was simulated."""

    plan: Plan
    outcome: Outcome
    holds: bool

    @property
    def usd_per_mtok(self) -> float | None:
        """US dollars per million output tokens at this traffic."""
        cost, outcome = self.plan.cost, self.outcome
        return None if cost is None or not outcome.output_per_s else cost / 3600 / outcome.output_per_s * 1e6

    def score(self, objective: str) -> tuple[float, float, float]:
        """Smaller is better; ties are decided by the other objectives."""
        cost = _cost(self.plan)
        joules, e2e_s = self.outcome.joules_per_token, self.outcome.e2e_s
        first = {
            "cost": (cost, e2e_s, joules),
            "latency": (e2e_s, cost, joules),
            "energy": (joules, cost, e2e_s),
            "throughput": (-self.outcome.output_per_s, cost, joules),
        }
        return first[objective]


@dataclass(frozen=True, slots=True)
class Swing:
    """What becomes of the answer when something that it rests on is 10 % off."""

    of: str
    outcome: Outcome
    holds: bool


@dataclass(slots=True)
class Found:
    """All that a search came to."""

    scenario: Scenario
    pools: tuple[Pool, ...]
    objective: str
    demand: Demand
    size: int  # of the space, replicas not counted
    refused: list[Refused] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    beaten: int = 0  # candidates that could not be better than what was found, and so were not simulated
    untried: int = 0  # left when the budget was spent
    swings: tuple[Swing, ...] = ()

    @property
    def holding(self) -> list[Judged]:
        """Plans that keep the promises, best first."""
        return sorted((one for one in self.judged if one.holds), key=lambda one: one.score(self.objective))

    @property
    def front(self) -> list[Judged]:
        """Of these, the ones that no other one beats in cost, latency and energy at once (and throughput, if asked)."""
        names = ("cost", "latency", "energy", *(["throughput"] if self.objective == "throughput" else []))
        scores = [(one, [one.score(name)[0] for name in names]) for one in self.holding]
        return [
            one
            for one, mine in scores
            if not any(other != mine and all(map(float.__le__, other, mine)) for _, other in scores)
        ]

    @property
    def best(self) -> Judged | None:
        return next(iter(self.holding), None)


def search(
    scenario: Scenario,
    pools: Sequence[Pool],
    formats: Sequence[tuple[str, str]],
    each: Each,
    *,
    at_once: int = 1,
    objective: str = "cost",
    budget: int = 200,
    heard: Heard = lambda line: None,
) -> Found:
    """Every plan of the pools for this traffic; at most `budget` are simulated. `scenario.simulate` says all that is
    not searched. Raises BadSetting, UnknownName, BadTrace."""
    if objective == "throughput":
        scenario = _backlog(scenario)
    needed = demand(scenario.arrivals(), None if objective == "throughput" else parse_slo(scenario.traffic[0].slo))
    everything = [plan for pool in pools for plan in space.plans(pool, scenario.simulate, formats)]
    found = Found(scenario, tuple(pools), objective, needed, len(everything))
    trials = Trials(found, each, at_once, budget)
    for plan in everything:
        trials.consider(plan)
    heard(f"{len(everything):,} plans: {len(found.refused):,} refused by memory and bounds, the others are simulated")
    trials.run(heard)
    found.judged = trials.kept
    return found


def _backlog(scenario: Scenario) -> Scenario:
    """All requests at once and nobody refused: how long until all are answered?"""
    engine = replace(scenario.engine, max_queue_requests=ENDLESS, max_queue_tokens=ENDLESS)
    traffic = tuple(replace(part, slo=None) for part in scenario.traffic)
    return replace(scenario, engine=engine, traffic=traffic, speed=1e9)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A plan with all its replicas, what it could be at best, and between how many replicas its answer lies."""

    plan: Plan
    bound: Limits
    least: int


class Trials:
    """Owns the candidates and what is known of them."""

    def __init__(self, found: Found, each: Each, at_once: int, budget: int) -> None:
        self.kept: list[Judged] = []
        self._found = found
        self._each = each
        self._at_once = at_once
        self._left = budget
        self._waiting: dict[Plan, Best] = {}
        self._turn = 0
        self._layouts: dict[SimulateSettings, _Layout] = {}
        self._most: dict[SimulateSettings, int] = {}  # replicas that were seen to hold, the fewest
        self._missed: dict[SimulateSettings, int] = {}  # that were seen to miss, the most

    def consider(self, plan: Plan) -> None:
        """Refuse it or let it wait with all and with the fewest replicas."""
        found = self._found
        no = space.refused(plan, found.demand.longest)
        if no is None:
            bound = limits(plan, found.scenario.engine, found.demand)
            no = hopeless(plan, bound, found.demand)
        if no is not None:
            found.refused.append(no)
            return
        layout = _Layout(plan, bound, least_replicas(plan, bound, found.demand))
        self._layouts[_key(plan)] = layout
        all_of_them = found.objective == "throughput" or found.demand.slo is None
        for replicas in {plan.simulate.replicas} if all_of_them else {plan.simulate.replicas, layout.least}:
            self._wait(plan.of(replicas))

    def run(self, heard: Heard) -> None:
        """Until nobody waits, or the budget is spent."""
        while batch := self._next():
            questions = [self._question(plan) for plan in batch]
            for at, answer in self._each(judged, questions):
                self._note(batch[at], msgspec.json.decode(answer, type=Outcome))
            best = min((one for one in self.kept if one.holds), key=self._score, default=None)
            if best:
                heard(f"  {len(self.kept):3} simulated, best so far: {best.plan.layout} in {best.plan.formats}")
        self._found.untried = len(self._waiting)

    def _next(self) -> list[Plan]:
        """Those that could be best: at cost, at latency and at energy in turns, as each finds rivals for the others."""
        batch: list[Plan] = []
        while self._waiting and len(batch) < min(self._at_once, self._left):
            axis = 3 if self._found.objective == "throughput" else self._turn % 3
            self._turn += 1
            plan = min(self._waiting, key=lambda plan: (self._waiting[plan][axis], self._waiting[plan]))
            best_case = self._waiting.pop(plan)
            if plan.simulate.replicas <= self._missed.get(_key(plan), 0):
                continue  # more of them missed
            if any(one.holds and all(map(float.__le__, self._values(one), best_case)) for one in self.kept):
                self._found.beaten += 1
                continue
            batch.append(plan)
        self._left -= len(batch)
        return batch

    def _note(self, plan: Plan, outcome: Outcome) -> None:
        key, replicas = _key(plan), plan.simulate.replicas
        if outcome.beaten:
            self._found.beaten += 1
            return
        holds = outcome.whole and (outcome.kept is None or outcome.kept >= plan.simulate.attain)
        self.kept.append(Judged(plan, outcome, holds))
        if holds:
            self._most[key] = min(replicas, self._most.get(key, replicas))
            return
        self._missed[key] = max(replicas, self._missed.get(key, 0))
        middle = self._between(key)
        if middle:
            self._wait(self._layouts[key].plan.of(middle))

    def _between(self, key: SimulateSettings) -> int | None:
        """Replicas to try next, after a miss: half way to those that hold, or to all there are."""
        low = self._missed[key]
        high = self._most.get(key, self._layouts[key].plan.simulate.replicas)
        return low + max(1, (high - low) // 2) if high - low > 1 else None

    def _wait(self, plan: Plan) -> None:
        """With what it cannot be better than."""
        bound, needed = self._layouts[_key(plan)].bound, self._found.demand
        tokens = needed.requests * needed.output_tokens
        idle = idle_w(plan.simulate.hardware, plan.simulate.replicas) * needed.span_s / max(tokens, 1.0)
        served = bound.capacity * plan.simulate.replicas * needed.output_tokens
        e2e_s = 0.0 if self._found.objective == "throughput" else bound.e2e_s
        self._waiting[plan] = (_cost(plan), e2e_s, max(bound.joules_per_token, idle), -served)

    def _values(self, one: Judged) -> Best:
        """Of a simulated plan; of traffic that comes by itself, throughput is not the plan's."""
        backlog = self._found.objective == "throughput"
        served = -one.outcome.output_per_s if backlog else float("-inf")
        return _cost(one.plan), 0.0 if backlog else one.outcome.e2e_s, one.outcome.joules_per_token, served

    def _score(self, one: Judged) -> tuple[float, float, float]:
        return one.score(self._found.objective)

    def _question(self, plan: Plan) -> bytes:
        scenario = replace(self._found.scenario, simulate=plan.simulate)
        idle = idle_w(plan.simulate.hardware, plan.simulate.replicas)
        rivals: tuple[Rival, ...] = ()
        if self._found.objective != "throughput":
            rivals = tuple((_cost(one.plan), *one.outcome.first) for one in self.kept if one.holds)
        return encoded(Question(scenario, self._found.demand.requests, idle, _cost(plan), rivals))


def _key(plan: Plan) -> SimulateSettings:
    return replace(plan.simulate, replicas=1)


def _cost(plan: Plan) -> float:
    """Dollars an hour, or devices where nobody said what they cost."""
    return float(plan.all_devices) if plan.cost is None else plan.cost


# -- how sure ----------------------------------------------------------------------------------------------------------


def swings(found: Found, each: Each) -> tuple[Swing, ...]:
    """The best plan again, with one thing at a time 10 % worse."""
    best = found.best
    if best is None:
        return ()
    there = list(worse(replace(found.scenario, simulate=best.plan.simulate)))
    idle = idle_w(best.plan.simulate.hardware, best.plan.simulate.replicas)
    questions = [encoded(Question(scenario, found.demand.requests, idle)) for _, scenario in there]
    answers = {at: msgspec.json.decode(answer, type=Outcome) for at, answer in each(judged, questions)}
    attain = found.scenario.simulate.attain
    return tuple(
        Swing(name, answers[at], answers[at].whole and (answers[at].kept is None or (answers[at].kept or 0) >= attain))
        for at, (name, _) in enumerate(there)
    )


def worse(scenario: Scenario) -> Iterator[tuple[str, Scenario]]:
    from headrace.sim.scenario import convention, placement

    usual, counted = scenario.simulate, convention(scenario.simulate)
    chip = placement(usual).device
    eight = usual.weights in ("fp8", "int8") and counted.attained_shares
    compute = (chip.eight_bit_share or counted.compute_share) if eight else counted.compute_share
    yield "arithmetic 10 % slower", _with(scenario, replace(usual, compute_share=0.9 * compute))
    yield "memory 10 % slower", _with(scenario, replace(usual, bandwidth_share=0.9 * counted.memory_share))
    if placement(usual).parallel.devices > 1:
        yield "links 10 % slower", _with(scenario, replace(usual, network_share=0.9 * counted.network_share))
    yield "host time 10 % longer", _with(scenario, replace(usual, host_ms=1.1 * usual.host_ms))
    yield "10 % more traffic", replace(scenario, speed=1.1 * scenario.speed)


def _with(scenario: Scenario, simulate: SimulateSettings) -> Scenario:
    return replace(scenario, simulate=simulate)


def engine_for(engine: EngineSettings, slo_tpot_s: float | None, given: bool) -> EngineSettings:
    """Steps no longer than a token may take, unless somebody said how long they may be."""
    if slo_tpot_s is None or given or engine.token_budget is not None:
        return engine
    return replace(engine, inter_token_ms=min(engine.inter_token_ms, 1000 * slo_tpot_s))


def parse_formats(weights: str, kv: str, known: Sequence[str]) -> list[tuple[str, str]]:
    """Every pair of two lists of names. Raises BadSetting."""
    lists = [[word.strip() for word in text.split(",") if word.strip()] for text in (weights, kv)]
    for name in (*lists[0], *lists[1]):
        if name not in known:
            raise BadSetting(f"there is no format {name!r}; choose from {', '.join(known)}")
    if not all(lists):
        raise BadSetting("--formats and --kv-formats each need at least one name")
    return [(one, other) for one in lists[0] for other in lists[1]]
