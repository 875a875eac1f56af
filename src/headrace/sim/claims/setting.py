"""What the settings of claims are made of: a device with its scheduler, requests of drawn lengths, the highest rate
that holds, and observers of what reports do not keep. Everything follows from its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random
from statistics import NormalDist, median

from headrace.core.config import EngineSettings
from headrace.core.events import Event, Planned, StepDone
from headrace.core.ports import Capacity, Observer
from headrace.sim.cost.batch import Batch, Line, StepCost
from headrace.sim.executor import MOST_STEPS
from headrace.sim.run import Report, Site, simulate
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.sim.stats import Totals
from headrace.workload.arrival import Arrival, Stretch

ENDLESS = 1 << 40  # of queues that refuse nobody
ROUNDS = 8  # of a bisection: from 1:160 to 2 %
_P90 = NormalDist().inv_cdf(0.9)

Lengths = Callable[[Random], tuple[int, int]]  # -> prompt tokens, output tokens


Device = Callable[[EngineSettings], Site]  # under any scheduler


def device(simulate: SimulateSettings, kv_tokens: int | None = None) -> Device:
    """A device as `headrace simulate` has it, with `kv_tokens` of KV memory or what is left beside the weights. Prompts
    may be as long as that memory, whatever the model was trained for."""

    def under(settings: EngineSettings) -> Site:
        site = Scenario(simulate, patient(settings)).site()
        blocks = site.capacity.blocks if kv_tokens is None else kv_tokens // settings.block_tokens
        capacity = replace(site.capacity, blocks=blocks, max_context_tokens=blocks * settings.block_tokens)
        return replace(site, capacity=capacity)

    return under


def patient(settings: EngineSettings) -> EngineSettings:
    """With queues that refuse nobody."""
    return replace(settings, max_queue_requests=ENDLESS, max_queue_tokens=ENDLESS)


@dataclass(frozen=True, slots=True)
class Even:
    """A price by which every step takes one second, for claims that count steps."""

    def estimate(self, batch: Batch) -> StepCost:
        return StepCost(1.0, overhead_s=1.0)

    def line(self, batch: Batch, steps: int) -> Line:
        return Line(1.0, 0.0, steps)


def counted(settings: EngineSettings, kv_tokens: int) -> Site:
    """A device of which only the memory matters, with blocks of one token."""
    settings = patient(replace(settings, block_tokens=1, prefix_cache=False))
    capacity = Capacity(kv_tokens, 1, kv_tokens, 1 << 15, MOST_STEPS)
    return Site(settings, capacity, Even(), token_budget=ENDLESS)


def ask(
    site: Site, arrivals: Sequence[Arrival] | Iterator[Arrival], observer: Observer | None = None, clients: int = 1
) -> Totals:
    """Simulate it to its end."""
    report: Report = simulate(arrivals, site, observer=observer, clients=clients)
    return report.totals


# -- requests ----------------------------------------------------------------------------------------------------------


def log_normal(prompt: tuple[float, float], output: tuple[float, float], most: int) -> Lengths:
    """Lengths of which papers publish median and P90, cut so that prompt and output come to at most `most`."""

    def drawn(rng: Random) -> tuple[int, int]:
        lengths = [middle * (high / middle) ** (rng.gauss(0, 1) / _P90) for middle, high in (prompt, output)]
        new = max(2, min(round(lengths[1]), most // 2))
        return max(1, min(round(lengths[0]), most - new)), new

    return drawn


def uniform(prompt: tuple[int, int], output: tuple[int, int]) -> Lengths:
    return lambda rng: (rng.randint(*prompt), rng.randint(*output))


def requests(lengths: Lengths, count: int, limit: Callable[[int, int], int], seed: int = 0) -> list[Arrival]:
    """All at time zero. `limit` is what clients allow: (prompt, output) -> most new tokens."""
    rng = Random(seed)
    pairs = [lengths(rng) for _ in range(count)]
    return [Arrival(0.0, (Stretch(prompt),), new, max_new_tokens=limit(prompt, new)) for prompt, new in pairs]


def poisson(of: Sequence[Arrival], rate: float, seed: int = 1) -> list[Arrival]:
    """The same requests at a rate. Two rates differ in nothing but how fast they come."""
    rng = Random(seed)
    moments = accumulate(rng.expovariate(1.0) for _ in of)
    return [replace(one, at_s=at / rate) for one, at in zip(of, moments, strict=True)]


def closed(of: Sequence[Arrival]) -> list[Arrival]:
    """The same requests, each sent when a client is free."""
    return [replace(one, at_s=None, gap_s=0.0) for one in of]


def exactly(prompt: int, output: int) -> int:
    """Clients that know how long answers will be, as in traces that are replayed with the lengths they had."""
    return output


# -- answers -----------------------------------------------------------------------------------------------------------


def highest(holds: Callable[[float], bool], low: float, high: float, rounds: int = ROUNDS) -> float:
    """The highest rate that holds, by bisection of the logarithm. `low` if not even that one does."""
    if holds(high):
        return high
    for _ in range(rounds):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def per_token_s(totals: Totals) -> list[float]:
    """From arrival to end over the tokens of the answer, of every request that is kept (see `sim.lives`)."""
    return [(life[3] - life[0]) / life[5] for life in totals.lives.kept if life[5]]


def median_per_token_s(totals: Totals) -> float:
    return median(per_token_s(totals))


@dataclass(slots=True)
class Steps:
    """What each step computed, and who ran meanwhile."""

    tokens: list[tuple[int, int]] = field(default_factory=list)  # (computed by each, steps)
    blocks: list[tuple[float, float]] = field(default_factory=list)  # (mean used blocks, seconds)
    pressed: list[tuple[float, float]] = field(default_factory=list)  # of these, where somebody waits
    running_s: float = 0.0  # the integral of the requests that run
    busy_s: float = 0.0
    _running: int = 0
    _waiting: int = 0

    def observe(self, event: Event) -> None:
        if type(event) is Planned:
            self._running, self._waiting = event.running, event.waiting
        elif type(event) is StepDone and event.seconds:
            self.tokens.append((event.tokens, event.run.steps))
            self.blocks.append((event.used_block_s / event.seconds, event.seconds))
            if self._waiting:
                self.pressed.append(self.blocks[-1])
            self.running_s += self._running * event.seconds
            self.busy_s += event.seconds

    @property
    def running(self) -> float:
        """Mean over the time in steps."""
        return self.running_s / self.busy_s


def mean_and_deviation(weighted: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of (value, weight) pairs."""
    total = sum(weight for _, weight in weighted)
    mean = sum(value * weight for value, weight in weighted) / total
    square = sum((value - mean) ** 2 * weight for value, weight in weighted) / total
    return mean, square**0.5
