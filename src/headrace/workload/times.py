"""When requests come: arrival processes as endless streams of seconds, functions of a generator and nothing else.

    even:6                one every 1/6 s            mmpp:2@60,20@5       2 per s for 60 s, then 20 per s for 5 s, ...
    poisson:6             6 per s                    diurnal:6:0.8:86400  6 per s on average, swinging by 80 % a day
    gamma:6:0.5           Gamma gaps of shape 0.5    hours:1,1,8,20,8     1 per s in the first hour, and so on, again
    closed:8:exp:2        eight clients, each thinks 2 s on average before its next request

A renewal process (even, poisson, gamma) has its first arrival at 0; the others start at a random moment of quiet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, repeat
from random import Random

from headrace.core.config import BadSetting
from headrace.workload.laws import Law, fixed, parse_law

Times = Callable[[Random], Iterator[float]]

MOST_CLIENTS = 1_000_000
_FORMS = (
    "even:RATE, poisson:RATE, gamma:RATE:SHAPE, mmpp:RATE@SECONDS,RATE@SECONDS, diurnal:RATE:SWING[:PERIOD], "
    "hours:RATE,RATE,... or closed:CLIENTS[:LAW]"
)


@dataclass(frozen=True, slots=True)
class Closed:
    """No times: so many clients, each sends its next request when its last is answered and it has thought."""

    clients: int
    think_s: Law


def parse_arrivals(text: str) -> Times | Closed:
    """Raises BadSetting."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "closed":
            clients, _, think = rest.partition(":")
            _require(1 <= int(clients) <= MOST_CLIENTS)
            return Closed(int(clients), parse_law(think) if think else fixed(0.0))
        return _PARSERS[kind](rest)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise BadSetting(f"arrivals {text!r} are none of {_FORMS}; rates are per second") from error


def even(rate: float) -> Times:
    _check_rate(rate)
    return lambda rng: accumulate(repeat(1 / rate), initial=0.0)


def gamma_gaps(rate: float, shape: float, rng: Random) -> Iterator[float]:
    """Seconds between arrivals: Gamma of this shape and mean 1/rate, so their variance is 1 / (shape * rate^2).

    Shape 1 is a Poisson process, less comes in bursts (coefficient of variation shape^-1/2), much more is a
    metronome. An infinite rate has no gaps.
    """
    if math.isinf(rate):
        return repeat(0.0)
    return (rng.gammavariate(shape, 1 / (rate * shape)) for _ in repeat(None))


def renewal(rate: float, shape: float = 1.0) -> Times:
    """Gamma gaps; shape 1 is Poisson."""
    _check_rate(rate)
    _require(1e-3 <= shape <= 1e6)
    return lambda rng: accumulate(gamma_gaps(rate, shape, rng), initial=0.0)


def modulated(states: Sequence[tuple[float, float]]) -> Times:
    """Markov-modulated Poisson: stays in a state (rate per s, mean seconds) for an exponential time, then goes on to
    the next. The mean rate is the mean of the rates weighted by their seconds."""
    _require(1 <= len(states) <= 1000 and any(rate > 0 for rate, _ in states))
    for rate, mean_s in states:
        _require((rate == 0 or 1e-6 <= rate <= 1e9) and 1e-3 <= mean_s <= 1e9)
    return lambda rng: _modulated(states, rng)


def _modulated(states: Sequence[tuple[float, float]], rng: Random) -> Iterator[float]:
    weights = [mean_s for _, mean_s in states]
    first = rng.choices(range(len(states)), weights)[0]  # stationary from the start
    now_s = 0.0
    for rate, mean_s in cycle((*states[first:], *states[:first])):
        end_s = now_s + rng.expovariate(1 / mean_s)
        while rate > 0 and (now_s := now_s + rng.expovariate(rate)) < end_s:
            yield now_s
        now_s = end_s  # what was left of the gap is forgotten: exponential gaps have no memory


def thinned(rate_at: Callable[[float], float], peak: float) -> Times:
    """Poisson arrivals of rate `rate_at(seconds)` <= peak: candidates come at the peak rate and stay with probability
    rate/peak (Lewis and Shedler, 1979)."""
    _check_rate(peak)
    _require(math.isfinite(peak))

    def times(rng: Random) -> Iterator[float]:
        now_s = 0.0
        while True:
            now_s += rng.expovariate(peak)
            if rng.random() * peak < rate_at(now_s):
                yield now_s

    return times


def diurnal(rate: float, swing: float, period_s: float = 86_400.0) -> Times:
    """rate * (1 - swing * cos(2 pi t / period)): starts at the quietest moment, peaks half a period later."""
    _require(0 <= swing <= 1 and 1 <= period_s <= 1e9)
    return thinned(lambda at_s: rate * (1 - swing * math.cos(2 * math.pi * at_s / period_s)), rate * (1 + swing))


def hourly(rates: Sequence[float], hour_s: float = 3600.0) -> Times:
    """One rate per hour, from the start again after the last."""
    _require(1 <= len(rates) <= 10_000 and all(0 <= rate <= 1e9 for rate in rates))
    return thinned(lambda at_s: rates[int(at_s // hour_s) % len(rates)], max(rates))


def _mmpp(text: str) -> Times:
    pairs = [part.split("@") for part in text.split(",")]
    return modulated([(float(rate), float(seconds)) for rate, seconds in pairs])


_PARSERS: dict[str, Callable[[str], Times]] = {
    "even": lambda text: even(float(text)),
    "poisson": lambda text: renewal(float(text)),
    "gamma": lambda text: renewal(*map(float, text.split(":"))),
    "mmpp": _mmpp,
    "diurnal": lambda text: diurnal(*map(float, text.split(":"))),
    "hours": lambda text: hourly([float(rate) for rate in text.split(",")]),
}


def _check_rate(rate: float) -> None:
    _require(1e-6 <= rate)


def _require(condition: bool) -> None:
    """NaN fails every comparison, so conditions say what must hold."""
    if not condition:
        raise ValueError("out of bounds")
