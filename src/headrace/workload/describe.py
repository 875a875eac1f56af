"""What traffic was like, in one pass: rate, burstiness, lengths, and how much of the prompts an endless cache holds.

Lengths are counted by value, so quantiles are exact and memory is bounded by how many different lengths there are;
shared contents are remembered up to MOST_NAMES, beyond which sharing is a lower bound.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from headrace.workload.arrival import Arrival, name_of

MOST_NAMES = 10_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of prompts or answers, in tokens. Quantiles lie on the straight line between the two nearest values."""

    mean: float
    std: float  # of the population
    min: int
    p10: float
    p50: float
    p90: float
    p99: float
    max: int
    sum: int


@dataclass(frozen=True, slots=True)
class Description:
    """Times are None where the traffic has none."""

    requests: int
    follow_ups: int  # later turns of conversations
    span_s: float | None  # first to last arrival
    rate: float | None  # requests per second of the span
    gap_cv: float | None  # standard deviation over mean of the gaps between arrivals: 1 is Poisson, more is bursts
    prompt: Lengths
    output: Lengths
    shared_fraction: float  # of all prompt tokens, those that an endless prefix cache would hold
    tenants: int

    def table(self) -> str:
        """For a person."""
        rate = "no times" if self.rate is None else f"{self.rate:.3g} requests/s over {self.span_s:.1f} s"
        burst = "" if self.gap_cv is None else f", gaps with CV {self.gap_cv:.2f}"
        rows = [f"{self.requests:,} requests ({self.follow_ups:,} follow-ups), {rate}{burst}"]
        for name, lengths in (("prompt", self.prompt), ("output", self.output)):
            rows.append(
                f"{name}: mean {lengths.mean:,.1f}, p50 {lengths.p50:,.0f}, p90 {lengths.p90:,.0f}, "
                f"p99 {lengths.p99:,.0f}, max {lengths.max:,} tokens"
            )
        rows.append(f"shared: {self.shared_fraction:.1%} of prompt tokens; tenants: {self.tenants:,}")
        return "\n".join(rows)


def describe(arrivals: Iterable[Arrival]) -> Description:
    """Raises ValueError for no traffic at all."""
    prompts, outputs = Counter[int](), Counter[int]()
    gaps, seen, tenants = _Gaps(), dict[int, int](), set[str]()
    shared = follow_ups = 0
    for arrival in arrivals:
        prompts[arrival.prompt_tokens] += 1
        outputs[arrival.output_tokens] += 1
        follow_ups += arrival.turn > 0
        tenants.add(arrival.tenant)
        shared += _remember(seen, arrival)
        gaps.add(arrival.at_s)
    prompt, output = _lengths(prompts), _lengths(outputs)
    return Description(
        requests=prompts.total(),
        follow_ups=follow_ups,
        span_s=gaps.span_s,
        rate=prompts.total() / gaps.span_s if gaps.span_s else None,
        gap_cv=gaps.cv,
        prompt=prompt,
        output=output,
        shared_fraction=shared / prompt.sum,
        tenants=len(tenants),
    )


def lru_hit_ratio(prompts: Iterable[Sequence[Hashable]], capacity: int) -> float:
    """Blocks found over blocks asked for, with one least-recently-used cache of `capacity` blocks.

    A block is found if it is there and every block before it was; then all blocks of the prompt are touched, front to
    back. This is how Mooncake's paper (Qin et al., 2025) counts.
    """
    cache: OrderedDict[Hashable, None] = OrderedDict()
    asked = found = 0
    for blocks in prompts:
        asked += len(blocks)
        for block in blocks:
            if block not in cache:
                break
            found += 1
        for block in blocks:
            cache[block] = None
            cache.move_to_end(block)
            if len(cache) > capacity:
                cache.popitem(last=False)
    return found / asked if asked else 0.0


class _Gaps:
    """Mean and variance of the gaps as they come (Welford, 1962)."""

    def __init__(self) -> None:
        self.timed = True
        self.first_s = self.last_s = math.nan
        self.count = 0
        self.mean = self.squares = 0.0

    def add(self, at_s: float | None) -> None:
        if at_s is None:
            self.timed = False
        elif math.isnan(self.first_s):
            self.first_s = self.last_s = at_s
        else:
            self.count += 1
            step = (at_s - self.last_s) - self.mean
            self.mean += step / self.count
            self.squares += step * ((at_s - self.last_s) - self.mean)
            self.last_s = at_s

    @property
    def span_s(self) -> float | None:
        return self.last_s - self.first_s if self.timed and self.count else None

    @property
    def cv(self) -> float | None:
        return math.sqrt(self.squares / self.count) / self.mean if self.timed and self.count and self.mean else None


def _remember(seen: dict[int, int], arrival: Arrival) -> int:
    """Prompt tokens that were there before. `seen` maps a chain of names to the most tokens its last stretch had."""
    chain, shared, known = name_of(arrival.tenant) if arrival.tenant else 0, 0, True
    for stretch in arrival.prompt:
        if stretch.name is None:
            break
        chain = hash((chain, stretch.name))
        before = seen.get(chain, 0)
        if known:
            shared += min(before, stretch.tokens)
            known = before >= stretch.tokens
        if stretch.tokens > before and (before or len(seen) < MOST_NAMES):
            seen[chain] = stretch.tokens
    return shared


def _lengths(counts: Counter[int]) -> Lengths:
    total = counts.total()
    if not total:
        raise ValueError("there is no traffic to describe")
    ordered = sorted(counts.items())
    amount = sum(length * count for length, count in ordered)
    mean = amount / total
    variance = sum(count * (length - mean) ** 2 for length, count in ordered) / total
    p10, p50, p90, p99 = (_quantile(ordered, level * (total - 1)) for level in (0.1, 0.5, 0.9, 0.99))
    return Lengths(mean, math.sqrt(variance), ordered[0][0], p10, p50, p90, p99, ordered[-1][0], amount)


def _quantile(ordered: Sequence[tuple[int, int]], rank: float) -> float:
    """The value at a fractional rank, counted from 0."""
    below, part = int(rank), rank - int(rank)
    reached, value = 0, float(ordered[-1][0])
    for at, (length, count) in enumerate(ordered):
        reached += count
        if below < reached:
            after = length if below + 1 < reached or at + 1 == len(ordered) else ordered[at + 1][0]
            value = length + part * (after - length)
            break
    return value
