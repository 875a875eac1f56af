"""Searches scheduler settings with the simulator as judge: successive halving over random ones, then local search from
the best, on one part of the traffic; another part, never seen by the search, says whether it was worth it and why.

    time    |------------ train ------------|--- held out ---|
    round 1      |-|   many, briefly                              the piece of each length with the most tokens
    round 2      |-----|   the best third
    round 3 |-------------------------------|   of those the best third, then the neighbours of the best
    verdict                                 |----------------|    what was given, what was found, each change undone

Owns the trials of one search; a simulation is a function of settings and slice, so none is run twice.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from random import Random
from typing import NamedTuple

import msgspec

from headrace.core.config import EngineSettings
from headrace.core.types import HeadraceError
from headrace.engine import policy
from headrace.sim.scenario import Scenario
from headrace.sim.slices import KEEP, Slice, Slices
from headrace.sim.sweep import answer, attained
from headrace.sim.workers import Each
from headrace.workload import streams

UNTRUSTED = 0.05  # share of time in steps beyond what was calibrated that is not held against a candidate
SAME = 0.001  # share of the requests that makes no difference worth a changed setting
SAME_TTFT = 0.02  # and of the p99 TTFT

_SIZES = (1, 1.5)  # times powers of two
BUDGETS = (*(int(2**power * size) for power in range(5, 13) for size in _SIZES), 8192)
RUNNING = (*(int(2**power * size) for power in range(1, 10) for size in _SIZES), 1024)

Value = str | int | None
Heard = Callable[[str], None]


class Axis(NamedTuple):
    """One setting and what it may be. Of ordered values, neighbours are close by; of names, all are neighbours."""

    field: str
    values: tuple[Value, ...]
    ordered: bool = False

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        at = self.values.index(value)
        near = self.values[max(0, at - 2) : at + 3] if self.ordered else self.values
        return tuple(one for one in near if one != value)


def space(scenario: Scenario, fixed: Collection[str] = (), *, stated: bool = False) -> tuple[Axis, ...]:
    """What is searched: every setting that the simulator prices and that is not `fixed`. Raises what the site raises.

    Left out: orderings by promised dates unless clients have `stated` them, because no OpenAI client can; Orca's
    batches, whose steps know no bound and activations no place; priorities that nobody gave; a shorter queue, because
    refusing is not serving; sizes of blocks, whose price in kernels no cost model here knows; and whatever changes no
    times.
    """
    start = scenario.engine
    made = {name: make(EngineSettings()) for name, make in policy.ORDERINGS.items()}
    made = {name: one for name, one in made.items() if not isinstance(one, policy.PriorityTrace)}
    names = [name for name, one in made.items() if stated or not _by_date(one)]
    axes = [
        Axis("ordering", tuple(names)),
        Axis("admission", tuple(policy.ADMISSIONS)),
        Axis("batch", tuple(name for name in policy.BATCHES if name != "orca")),
        Axis("preemption", tuple(policy.PREEMPTIONS)),
        Axis("token_budget", _among(BUDGETS, start.token_budget, scenario.site().token_budget), ordered=True),
        Axis("max_running", _among(RUNNING, start.max_running, start.max_running), ordered=True),
    ]
    taken = {*fixed, *(("token_budget",) if "inter_token_ms" in fixed else ())}  # either says how long a step may be
    free = (axis for axis in axes if axis.field not in taken)
    return tuple(_starting(axis, getattr(start, axis.field)) for axis in free)


def _by_date(ordering: policy.Ordering) -> bool:
    return ordering is policy.edd or isinstance(ordering, policy.Due)


def _among(values: tuple[int, ...], start: int | None, size: int) -> tuple[Value, ...]:
    """The values with the one to start from in its place: it may be None, and then stands for `size`."""
    others = [value for value in values if value != size]
    at = bisect_left(others, size)
    return (*others[:at], start, *others[at:])


def _starting(axis: Axis, value: Value) -> Axis:
    """What a search starts from is part of the space."""
    return axis if value in axis.values else axis._replace(values=(value, *axis.values))


# -- trials ------------------------------------------------------------------------------------------------------------


class Score(msgspec.Struct, frozen=True):
    """What came of some settings on a slice. Latencies are of completed requests, None if there are none."""

    good: int = 0  # completed within every promise
    kept: float = 0.0  # of those who had one, the share that kept it
    refused: int = 0
    completed: int = 0
    ttft_p99_s: float | None = None
    tpot_p99_s: float | None = None
    preemptions: int = 0
    extrapolated: float = 0.0  # share of time in steps beyond what was calibrated
    failed: str = ""  # why these settings cannot be simulated

    @property
    def rank(self) -> tuple[int, float]:
        """Goodput, ties by p99 TTFT. Larger is better."""
        return self.good, -math.inf if self.ttft_p99_s is None else -self.ttft_p99_s


_Question = tuple[Scenario, float, float]


def judged(question: bytes) -> bytes:
    """Simulate one scenario on one slice, in whatever process. The same bytes give the same bytes."""
    scenario, *piece = msgspec.json.decode(question, type=_Question, dec_hook=lambda kind, value: kind(value))
    return msgspec.json.encode(score(scenario, Slice(*piece)))


def score(scenario: Scenario, piece: Slice) -> Score:
    try:
        totals = answer(scenario, watch=partial(streams.between, start_s=piece.start_s, end_s=piece.end_s)).totals
    except HeadraceError as error:
        return Score(failed=str(error))
    return Score(
        totals.good,
        attained(totals) or 0.0,
        totals.rejected,
        totals.completed,
        totals.ttft_s.quantile(0.99),
        totals.tpot_s.quantile(0.99),
        totals.preemptions,
        totals.spent.extrapolated_s / max(totals.spent.seconds, 1e-9),
    )


class Trials:
    """Every simulation of one search. `left` is how many more the search may ask for."""

    def __init__(self, scenario: Scenario, each: Each, budget: int) -> None:
        self.start = scenario.engine
        self.left = budget
        self.count = 0
        self._scenario = scenario
        self._each = each
        self._scores: dict[tuple[EngineSettings, Slice], Score] = {}

    def of(self, settings: EngineSettings, piece: Slice) -> Score:
        """Simulated if it has not been."""
        self.ask([settings], piece)
        return self._scores[settings, piece]

    def ask(self, settings: Sequence[EngineSettings], piece: Slice) -> None:
        """Simulate those that have not been, side by side. Raises HeadraceError if the first settings of all fail."""
        new = [one for one in dict.fromkeys((self.start, *settings)) if (one, piece) not in self._scores]
        asked = [msgspec.json.encode((replace(self._scenario, engine=one), *piece), enc_hook=str) for one in new]
        for at, reply in self._each(judged, asked):
            self._scores[new[at], piece] = msgspec.json.decode(reply, type=Score)
        self.count += len(new)
        if failed := self._scores[self.start, piece].failed:
            raise HeadraceError(failed)

    def best(self, settings: Sequence[EngineSettings], piece: Slice, count: int = 1) -> list[EngineSettings]:
        """The best first, among those that were or may yet be simulated."""
        known = [one for one in dict.fromkeys(settings) if (one, piece) in self._scores]
        fresh = [one for one in dict.fromkeys(settings) if (one, piece) not in self._scores][: self.left]
        self.left -= len(fresh)
        self.ask(fresh, piece)
        return sorted(known + fresh, key=lambda one: self._order(one, piece), reverse=True)[:count]

    def _order(self, settings: EngineSettings, piece: Slice) -> tuple[bool, int, float, int]:
        """Fair ones first; of equals, the one that differs in fewer settings from what was given."""
        found = self.of(settings, piece)
        return self.fair(found, piece), *found.rank, -len(changed(self.start, settings))

    def fair(self, found: Score, piece: Slice) -> bool:
        """Whether goodput was not bought by refusing more, nor seen only where nobody measured."""
        given = self._scores[self.start, piece]
        kept = found.refused <= given.refused and found.completed >= given.completed
        return not found.failed and kept and self._trusted(found, piece)

    def _trusted(self, found: Score, piece: Slice) -> bool:
        return found.extrapolated <= max(UNTRUSTED, self._scores[self.start, piece].extrapolated)

    @property
    def untrusted(self) -> int:
        """Simulations that say nothing, because too many of their steps are beyond what was calibrated."""
        return sum(not self._trusted(found, piece) for (_, piece), found in self._scores.items())


def changed(one: EngineSettings, other: EngineSettings) -> tuple[str, ...]:
    """Names of the settings in which they differ."""
    names = EngineSettings.__dataclass_fields__
    return tuple(name for name in names if getattr(one, name) != getattr(other, name))


_BEYOND = (
    "went beyond what was calibrated and were set aside; headrace calibrate --rows and --token-budget measure more"
)

# -- search ------------------------------------------------------------------------------------------------------------


def draws(start: EngineSettings, axes: Sequence[Axis], rng: Random) -> Iterator[EngineSettings]:
    """Random settings: each is as it is at the start, or with the same probability anything else."""
    while True:
        moved = {axis.field: rng.choice(axis.values) for axis in axes if rng.random() < 0.5}
        yield replace(start, **moved)  # type: ignore[arg-type]  # values come from the axis of their field


def halve(trials: Trials, axes: Sequence[Axis], slices: Slices, rng: Random, heard: Heard) -> EngineSettings:
    """Successive halving (Jamieson and Talwalkar 2016) with half of what is left: all settings on a short slice, one in
    KEEP of them on a longer one. The one to start from stays to the end. All see the same requests."""
    rounds = slices.rounds
    count = max(1, int(trials.left / 2 / sum(KEEP**-power for power in range(len(rounds)))))
    drawn = islice(draws(trials.start, axes, rng), 4 * count)  # some are drawn twice
    here = list(dict.fromkeys([trials.start, *drawn]))[: count + 1]
    for number, piece in enumerate(rounds, 1):
        here = trials.best(here, piece, max(1, -(-len(here) // KEEP)))
        heard(f"round {number} of {len(rounds)}, {piece.seconds:,.0f} s of traffic: {_told(trials, here[0], piece)}")
        here = list(dict.fromkeys([*here, trials.start]))
    return here[0]


def climb(
    trials: Trials, axes: Sequence[Axis], best: EngineSettings, piece: Slice, rng: Random, heard: Heard
) -> EngineSettings:
    """Change one setting at a time for the better, until no neighbour is better or the budget is spent."""
    still = 0  # axes since the last move
    while still < len(axes) and trials.left > 0:
        for axis in rng.sample(axes, len(axes)):
            others = axis.neighbours(getattr(best, axis.field))
            (found,) = trials.best([best, *(replace(best, **{axis.field: one}) for one in others)], piece)  # type: ignore[arg-type]
            still = 0 if found != best else still + 1
            if found != best:
                best = found
                heard(f"{axis.field} = {getattr(best, axis.field)}: {_told(trials, best, piece)}")
    heard("no neighbour is better" if trials.left else "the budget is spent; a larger one may find more")
    return best


def plain(trials: Trials, best: EngineSettings, piece: Slice) -> EngineSettings:
    """Undo each change that makes no difference: what nobody needs, nobody should have to trust."""
    for field in changed(trials.start, best):
        before = trials.of(best, piece)
        without = replace(best, **{field: getattr(trials.start, field)})
        after = trials.of(without, piece)
        slower = (after.ttft_p99_s or math.inf) > (1 + SAME_TTFT) * (before.ttft_p99_s or math.inf)
        if trials.fair(after, piece) and after.good >= before.good - SAME * before.completed and not slower:
            best = without
    return best


def _told(trials: Trials, settings: EngineSettings, piece: Slice) -> str:
    found, given = trials.of(settings, piece), trials.of(trials.start, piece)
    words = ", ".join(f"{name} {getattr(settings, name)}" for name in changed(trials.start, settings))
    return f"{found.kept:.1%} keep the SLO (at the start {given.kept:.1%}) with {words or 'what was given'}"


# -- verdict -----------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """One changed setting, and what comes of the held-out slice when it alone is undone."""

    field: str
    before: Value
    after: Value
    without: Score


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search came to. `chosen` is the setting it started from unless the candidate is better held out."""

    start: EngineSettings
    candidate: EngineSettings
    slices: Slices
    train: tuple[Score, Score]  # at the start, of the candidate
    held_out: tuple[Score, Score]
    better: bool  # held out
    changes: tuple[Change, ...]  # of the candidate
    simulations: int

    @property
    def chosen(self) -> EngineSettings:
        return self.candidate if self.better else self.start


def tune(
    scenario: Scenario,
    axes: Sequence[Axis],
    slices: Slices,
    each: Each,
    *,
    budget: int,
    seed: int = 0,
    margin: float = 0.0,
    heard: Heard = lambda line: None,
) -> Tuned:
    """At most `budget` simulations to search; a few more undo what is not needed, and judge. The same seed finds the
    same, in any number of processes. One candidate only is tried on the held-out slice: the best of several there would
    be one more thing that was fitted to it.

    The search is for promises that are tighter by `margin`: without one it ends where steps take just as long as is
    promised, and a machine that is a little slower than its price keeps hardly any. The verdict is on the promises as
    they are. Raises what simulating the given settings raises."""
    trials, rng = Trials(replace(scenario, margin=margin), each, budget), Random(seed)
    best = halve(trials, axes, slices, rng, heard)
    best = climb(trials, axes, best, slices.train, rng, heard)
    best = plain(trials, best, slices.train)
    if trials.untrusted:
        heard(f"{trials.untrusted} of {trials.count} simulations {_BEYOND}")
    names, last, count = changed(scenario.engine, best), slices.held_out, trials.count
    trials = Trials(scenario, each, 0)
    undone = [replace(best, **{name: getattr(scenario.engine, name)}) for name in names]
    trials.ask([best, *undone], last)
    held_out = (trials.of(scenario.engine, last), trials.of(best, last))
    return Tuned(
        start=scenario.engine,
        candidate=best,
        slices=slices,
        train=(trials.of(scenario.engine, slices.train), trials.of(best, slices.train)),
        held_out=held_out,
        better=trials.fair(held_out[1], last) and held_out[1].rank > held_out[0].rank,
        changes=tuple(
            Change(name, getattr(scenario.engine, name), getattr(best, name), trials.of(without, last))
            for name, without in zip(names, undone, strict=True)
        ),
        simulations=count + trials.count,
    )
