"""Prompts and answers on replicas of their own, against both on one (DistServe, OSDI 2024): what each is worth per
device, by the mean time of a token and by the longest pause.

    every size of instance --> goodput of its prefill alone, of its decode alone --> the best of each per device
    best pair --> how many of each (cluster.roles) --> simulated with the hand-off (sim.handoff) --> goodput per device
    every size, both phases on it, prompts chunked or first --simulated--> goodput per device      <- against this

Nothing of a request's decoding reaches back to its prefill but back-pressure, so phases may be asked for one by one;
the pair that is chosen is simulated as a whole. The first token is that of the prefill; the way of the KV and the queue
behind it count as time of later tokens, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from headrace.cluster.roles import balance, instances
from headrace.core.config import BadSetting
from headrace.sim.handoff import Apart, Life, Pulled, lives_apart, lives_together
from headrace.sim.hardware import Link
from headrace.sim.plan.pools import NoFleet
from headrace.sim.run import Site
from headrace.workload.arrival import Arrival, Stretch

ROUNDS = 4
WAVES = 4
DRAW = 0.95  # goodputs are found to a twentieth
FIRST = 2.0  # requests per second that are tried first
MOST = 1000  # times that: nobody looks further
METRICS = ("mean", "longest")


@dataclass(frozen=True, slots=True)
class Promise:
    """So many of the requests within each promise, each counted by itself, as the paper does."""

    ttft_s: float
    token_s: float
    share: float = 0.9
    longest: bool = False  # token_s is about the longest pause, not the mean

    def kept(self, lives: Sequence[Life], asked: int) -> bool:
        """Who has no life was refused and kept nothing."""
        return min(self.first(lives), self.tokens(lives)) >= self.share * asked

    def first(self, lives: Sequence[Life]) -> int:
        return sum(life.ttft_s <= self.ttft_s for life in lives)

    def tokens(self, lives: Sequence[Life]) -> int:
        return sum((life.longest_s if self.longest else life.tpot_s) <= self.token_s for life in lives)


@dataclass(frozen=True, slots=True)
class Instance:
    """A size of replica, and how it would do each of the jobs."""

    devices: int
    prefill: Site
    decode: Site
    both: tuple[Site, ...]  # ways of batching prompts with decoding: the best counts
    link: Link  # KV's way out of or into it
    kv_bytes_per_token: float  # that cross one such link: of a cut model every device sends its part


@dataclass(frozen=True, slots=True)
class Phase:
    """One size of instance in one role."""

    role: str  # "prefill", "decode" or "both"
    devices: int
    rates: tuple[float, ...]  # requests per second, by METRICS

    def per_device(self, metric: int) -> float:
        return self.rates[metric] / self.devices


@dataclass(frozen=True, slots=True)
class Placed:
    """Instances of two roles, simulated together."""

    prefill: Phase
    decode: Phase
    counts: tuple[int, int]
    rates: tuple[float, ...]  # by METRICS

    @property
    def devices(self) -> int:
        return self.counts[0] * self.prefill.devices + self.counts[1] * self.decode.devices

    def per_device(self, metric: int) -> float:
        return self.rates[metric] / self.devices


@dataclass(frozen=True, slots=True)
class Roles:
    """All that was found. `apart` is None when no size keeps the promises of one of the phases."""

    promise: Promise
    phases: tuple[Phase, ...]
    apart: Placed | None
    slow_link: float | None  # goodput per device of `apart` by the mean, if the link had a tenth of its bandwidth
    rate: float | None  # requests per second that are to be served
    needed: tuple[int, int] | None  # instances for them
    together: Phase  # the best of one role, by the mean

    @property
    def endless(self) -> bool:
        """Whether something held at every rate that was tried, so that nobody knows how much it can."""
        return any(rate >= DRAW * MOST * FIRST for one in self.phases for rate in one.rates)

    @property
    def pays(self) -> tuple[float, ...]:
        """Goodput per device apart over together, by METRICS."""
        if self.apart is None:
            return (0.0,) * len(METRICS)
        best = [max(one.per_device(at) for one in self.phases if one.role == "both") for at in range(len(METRICS))]
        return tuple(self.apart.per_device(at) / each if each else float("inf") for at, each in enumerate(best))


def roles(
    asked: Sequence[Arrival],
    sizes: Sequence[Instance],
    promise: Promise,
    rate: float | None = None,
    heard: Callable[[str], None] = lambda line: None,
) -> Roles:
    """`asked` come at one request per second; others are the same faster. Raises NoFleet when nothing holds."""
    phases = tuple(_phases(asked, sizes, promise, heard))
    chosen = {role: best(phases, role) for role in ("prefill", "decode", "both")}
    placed = None if chosen["prefill"] is None or chosen["decode"] is None else (chosen["prefill"], chosen["decode"])
    if chosen["both"] is None and placed is None:
        raise NoFleet("no size keeps the promises, together or apart: they are broken without any queue")
    apart, slow, needed = None, None, None
    if placed is not None:
        of = {one.devices: one for one in sizes}
        apart = _placed(asked, of, *placed, promise)
        prefill, decode = (each.rates[0] for each in placed)
        needed = None if rate is None else instances(rate, prefill, decode)
        narrow = {key: replace(one, link=_slower(one.link)) for key, one in of.items()}
        slow = _placed(asked, narrow, *placed, promise, METRICS[:1]).per_device(0)
    together = chosen["both"] or next(one for one in phases if one.role == "both")
    return Roles(promise, phases, apart, slow, rate, needed, together)


def best(phases: Sequence[Phase], role: str) -> Phase | None:
    """The most per device; of those that differ by less than what is measured, the smallest."""
    able = [one for one in phases if one.role == role and one.rates[0]]
    most = max((one.per_device(0) for one in able), default=0.0)
    return min((one for one in able if one.per_device(0) >= DRAW * most), key=lambda one: one.devices, default=None)


def _slower(link: Link) -> Link:
    return replace(link, bytes_per_s=link.bytes_per_s / 10)


def _phases(
    asked: Sequence[Arrival], sizes: Sequence[Instance], promise: Promise, heard: Callable[[str], None]
) -> Iterator[Phase]:
    by = [replace(promise, longest=metric == "longest") for metric in METRICS]
    for one in sizes:
        first = prefill_rate(asked, one, promise)  # has one token, so no metric of later ones
        found = (
            ("prefill", (first,) * len(by)),
            ("decode", tuple(decode_rate(asked, one, each) for each in by)),
            ("both", tuple(both_rate(asked, one, each) for each in by)),
        )
        for role, rates in found:
            heard(f"  {role} on {one.devices}: {rates[0] / one.devices:.3g} requests/s per device")
            yield Phase(role, one.devices, rates)


def prefill_rate(asked: Sequence[Arrival], one: Instance, promise: Promise) -> float:
    """The highest rate at which first tokens keep their promise, if one instance does nothing else."""
    short = [replace(arrival, output_tokens=1, max_new_tokens=1) for arrival in asked]
    needed = promise.share * len(asked)
    return goodput(lambda rate: promise.first(lives_together(at_rate(short, rate), one.prefill)) >= needed)


def decode_rate(asked: Sequence[Arrival], one: Instance, promise: Promise) -> float:
    """The highest rate at which later tokens keep theirs, if prompts are there already. The requests come again until
    they are `WAVES` times those that fit side by side: fewer would never queue, however fast they come."""
    mixed = replace(one.decode.settings, batch="chunked", prefix_cache=False)
    site = replace(one.decode, settings=mixed, cost=Pulled(one.decode.cost), token_budget=1 << 40)
    late = [
        replace(arrival, prompt=(Stretch(arrival.prompt_tokens + 1),), output_tokens=tokens, max_new_tokens=tokens)
        for arrival in asked
        if (tokens := arrival.output_tokens - 1)
    ]
    late = again(late, WAVES * side_by_side(late, site))
    needed = promise.share * len(late)
    return goodput(lambda rate: promise.tokens(_queued(lives_together(at_rate(late, rate), site))) >= needed)


def side_by_side(asked: Sequence[Arrival], site: Site) -> float:
    """Requests that run at a time, of these."""
    tokens = sum(one.prompt_tokens + one.output_tokens / 2 for one in asked) / len(asked)
    return min(site.settings.max_running, site.capacity.blocks * site.capacity.block_tokens / tokens)


def again(asked: Sequence[Arrival], least: float) -> list[Arrival]:
    """The requests, and the same later, until there are so many."""
    first_s, last_s = asked[0].at_s or 0.0, asked[-1].at_s or 0.0
    span_s = (last_s - first_s) * len(asked) / max(len(asked) - 1, 1)
    times = max(1, ceil(least / len(asked)))
    return [replace(one, at_s=(one.at_s or 0.0) + turn * span_s) for turn in range(times) for one in asked]


def _queued(lives: Sequence[Life]) -> list[Life]:
    """The wait for a place is time of later tokens, as the first is there already."""
    return [
        Life(0.0, (one.ttft_s + one.tpot_s * one.later) / (one.later + 1), max(one.ttft_s, one.longest_s), one.later)
        for one in lives
    ]


def both_rate(asked: Sequence[Arrival], one: Instance, promise: Promise) -> float:
    """The highest rate at which one instance keeps all promises, by its best way of batching."""
    count = len(asked)
    return max(
        goodput(lambda rate, site=site: promise.kept(lives_together(at_rate(asked, rate), site), count))  # type: ignore[misc]
        for site in one.both
    )


def _placed(
    asked: Sequence[Arrival],
    of: dict[int, Instance],
    prefill: Phase,
    decode: Phase,
    promise: Promise,
    metrics: Sequence[str] = METRICS,
) -> Placed:
    counts = balance(prefill.rates[0], decode.rates[0], (prefill.devices, decode.devices))
    there = joined(of[prefill.devices], of[decode.devices], counts)
    rates = tuple(apart_rate(asked, there, replace(promise, longest=metric == "longest")) for metric in metrics)
    return Placed(prefill, decode, counts, rates)


def joined(prefill: Instance, decode: Instance, counts: tuple[int, int]) -> Apart:
    """Instances of two roles; the KV moves at the pace of the narrower end."""
    narrow = max((prefill, decode), key=lambda one: one.kv_bytes_per_token / one.link.bytes_per_s)
    first, later = replace(prefill.prefill, replicas=counts[0]), replace(decode.decode, replicas=counts[1])
    return Apart(first, later, narrow.link, narrow.kv_bytes_per_token)


def apart_rate(asked: Sequence[Arrival], there: Apart, promise: Promise) -> float:
    """The highest rate that keeps all promises, hand-off included."""
    return goodput(lambda rate: promise.kept(lives_apart(at_rate(asked, rate), there), len(asked)))


def at_rate(asked: Sequence[Arrival], rate: float) -> list[Arrival]:
    """The same requests, faster. Raises BadSetting for those without times."""
    if any(one.at_s is None for one in asked):
        raise BadSetting("roles need to know when requests come; give --arrivals with a rate, such as poisson:1")
    return [replace(one, at_s=(one.at_s or 0.0) / rate) for one in asked]


def goodput(holds: Callable[[float], bool], first: float = FIRST, rounds: int = ROUNDS) -> float:
    """The highest rate that holds, to a twentieth, up to MOST times `first`; 0 where not even that part does.
    Doubles or halves from `first` to a rate that holds and one that does not, then halves the logarithm between."""
    low, high = 0.0, first
    while high < MOST * first and holds(high):
        low, high = high, 2 * high
    while not low:
        if high / 2 < first / MOST:
            return 0.0
        low, high = (high / 2, high) if holds(high / 2) else (0.0, high / 2)
    for _ in range(rounds):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
