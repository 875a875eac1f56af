"""From records of single requests to numbers about a run. Pure: made-up records give exact, checkable answers.

Definitions, on one request, all counted from when it was due (its scheduled time in an open loop, so that a
generator or a server that stalls cannot hide the wait; the moment of sending in a closed loop):

    due ....... sent ...... first token . . . . . last token
     |<------- TTFT ------------>|<- ITL ->|<- ITL ->|
     |<------------------- e2e --------------------->|      TPOT = (e2e - TTFT) / (output tokens - 1)

ITL is the gap between events with tokens; an event may carry several (speculation), so mean ITL may exceed TPOT.
A request's largest ITL is reported beside its TPOT, which is a mean: the two can prefer different servers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from headrace.bench.client import Failure

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one request. Times in seconds since the start of the run."""

    index: int
    due_s: float
    sent_s: float
    ended_s: float  # the last event with a token, or when it failed
    lag_s: float  # how late the generator itself was
    prompt_tokens: int
    output_tokens: int  # as the server counts; events with tokens where it does not
    asked_tokens: int
    cached_tokens: int | None  # of the prompt; None: the server does not say
    token_times_s: tuple[float, ...]  # arrival of every event with a token
    finish: str | None
    failure: Failure | None = None

    @property
    def ok(self) -> bool:
        return self.failure is None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """None with fewer than two tokens."""
        if self.output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> tuple[float, ...]:
        return tuple(after - before for before, after in pairwise(self.token_times_s))

    @property
    def max_itl_s(self) -> float | None:
        return max(self.itl_s, default=None)

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.due_s


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in a few numbers. Percentiles are exact, interpolated linearly between closest ranks: Hyndman
    and Fan's type 7, which is numpy's default."""

    count: int
    mean: float
    std: float  # of the population
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in numbers. Rates are over `duration_s`; tokens and latencies are of successful requests only."""

    requests: int
    completed: int
    failures: Mapping[str, int]  # by kind
    duration_s: float  # from the start of the run until the last answer ended
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int | None
    short: int  # answers with fewer tokens than asked for
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    good: int | None  # kept every promise; None: nothing was promised
    goodput_per_s: float | None
    goodput_fraction: float | None  # of all requests sent
    spreads: Mapping[str, Spread | None]  # by metric: ttft, tpot, itl, max_itl, e2e, lag; None: no values


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, at least one; `percent` from 0 to 100."""
    rank = (len(ordered) - 1) * percent / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def spread(values: Iterable[float]) -> Spread | None:
    """None for no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    mean = math.fsum(ordered) / len(ordered)
    variance = math.fsum((value - mean) ** 2 for value in ordered) / len(ordered)
    p50, p90, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
    return Spread(len(ordered), mean, math.sqrt(variance), p50, p90, p99, ordered[-1])


def values_of(records: Sequence[Record], metric: str) -> list[float]:
    """All values of `ttft`, `tpot`, `itl`, `max_itl`, `e2e` or `lag` in seconds, of successful requests."""
    ok = [record for record in records if record.ok]
    if metric == "itl":
        return [gap for record in ok for gap in record.itl_s]
    return [value for record in ok if (value := _VALUE[metric](record)) is not None]


METRICS = ("ttft", "tpot", "itl", "max_itl", "e2e")

_VALUE: Mapping[str, Callable[[Record], float | None]] = {
    "ttft": lambda record: record.ttft_s,
    "tpot": lambda record: record.tpot_s,
    "max_itl": lambda record: record.max_itl_s,
    "e2e": lambda record: record.e2e_s,
    "lag": lambda record: record.lag_s,
}


def is_good(record: Record, slo: Mapping[str, float]) -> bool:
    """Succeeded and kept every promise. `itl` is the longest gap; a metric a request does not have is kept."""
    if not record.ok:
        return False
    measured = {name: _VALUE["max_itl" if name == "itl" else name](record) for name in slo}
    return all(value is None or value <= slo[name] for name, value in measured.items())


def summarise(records: Sequence[Record], slo: Mapping[str, float]) -> Summary:
    """Fold a run. `slo` is seconds by metric, empty for no promises."""
    ok = [record for record in records if record.ok]
    duration_s = max((record.ended_s for record in records), default=0.0)
    prompt, output = sum(r.prompt_tokens for r in ok), sum(r.output_tokens for r in ok)
    cached = [record.cached_tokens for record in ok if record.cached_tokens is not None]
    good = sum(is_good(record, slo) for record in records) if slo else None
    return Summary(
        requests=len(records),
        completed=len(ok),
        failures=Counter(record.failure.kind for record in records if record.failure),
        duration_s=duration_s,
        prompt_tokens=prompt,
        output_tokens=output,
        cached_tokens=sum(cached) if cached else None,
        short=sum(record.output_tokens < record.asked_tokens for record in ok),
        requests_per_s=_per(len(ok), duration_s),
        output_tokens_per_s=_per(output, duration_s),
        total_tokens_per_s=_per(prompt + output, duration_s),
        good=good,
        goodput_per_s=None if good is None else _per(good, duration_s),
        goodput_fraction=None if good is None else _per(good, len(records)),
        spreads={metric: spread(values_of(records, metric)) for metric in (*METRICS, "lag")},
    )


def cumulative(values: Sequence[float], points: int = 200) -> list[tuple[float, float]]:
    """At most `points` corners of the empirical distribution: (value, fraction of values at or below it)."""
    ordered = sorted(values)
    count = len(ordered)
    picks = sorted({round(i * (count - 1) / max(1, points - 1)) for i in range(points)}) if count else []
    return [(ordered[i], bisect_right(ordered, ordered[i]) / count) for i in picks]


def token_rate(records: Sequence[Record], bins: int = 120) -> tuple[float, list[float]]:
    """Output tokens per second over the run: (seconds per bin, rate in each). An event counts for its share of the
    request's tokens, so events with several tokens weigh more."""
    end_s = max((record.ended_s for record in records), default=0.0)
    width_s = end_s / bins
    if width_s <= 0:
        return 0.0, []
    rates = [0.0] * bins
    for record in records:
        for at_s in record.token_times_s:
            rates[min(bins - 1, int(at_s / width_s))] += record.output_tokens / len(record.token_times_s) / width_s
    return width_s, rates


def _per(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
