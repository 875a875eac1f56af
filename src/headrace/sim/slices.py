"""Divides traffic in time for a search: what settings are fitted to, shorter pieces of it to sort out the worst, and
what is held out to judge them. Owns nothing.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from headrace.core.config import BadSetting
from headrace.sim.scenario import Scenario

LEAST_REQUESTS = 20  # in a slice that decides anything
SCREENING_REQUESTS = 60  # in a slice that only sorts out the worst
KEEP = 3  # a round is so many times as long as the one before
ROUNDS = 3

_TOO_FEW = f"too little traffic: both slices need {LEAST_REQUESTS} requests; give more --requests or a longer --trace"


class Slice(NamedTuple):
    """Traffic from here to there, in seconds."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Slices:
    """How traffic is divided. The rounds are pieces of the train slice, the last one is all of it."""

    rounds: tuple[Slice, ...]
    held_out: Slice

    @property
    def train(self) -> Slice:
        return self.rounds[-1]


def cut(scenario: Scenario, held_out: float) -> Slices:
    """The last share `held_out` of the time is for the verdict. Raises BadSetting for traffic that has no times, no
    promises, or too few requests."""
    times, tokens, promised = array("d"), array("q", [0]), False
    for arrival in scenario.arrivals():
        if arrival.at_s is None:
            raise BadSetting("a closed loop has no times to divide; give --arrivals with a rate, such as poisson:6")
        times.append(arrival.at_s)
        tokens.append(tokens[-1] + arrival.prompt_tokens + arrival.output_tokens)
        promised = promised or arrival.slo is not None
    if not promised:
        raise BadSetting("tuning is for requests that keep their promises; say which with --slo, such as ttft=1.0")
    if not times:
        raise BadSetting(_TOO_FEW)
    first_s, last_s = times[0], math.nextafter(times[-1], math.inf)
    middle_s = last_s - held_out * (last_s - first_s)
    train, last = Slice(first_s, middle_s), Slice(middle_s, last_s)
    trained = bisect_left(times, middle_s)
    if min(trained, len(times) - trained) < LEAST_REQUESTS:
        raise BadSetting(_TOO_FEW)
    pieces = (KEEP**power for power in range(ROUNDS - 1, 0, -1))
    rounds = (_busiest(train, parts, times, tokens) for parts in pieces if trained >= parts * SCREENING_REQUESTS)
    return Slices((*rounds, train), last)


def _busiest(whole: Slice, parts: int, times: Sequence[float], tokens: Sequence[int]) -> Slice:
    """Of so many equal pieces, the one with the most tokens: where nothing is missed, nothing is learned."""
    edges = [whole.start_s + part * whole.seconds / parts for part in range(parts)] + [whole.end_s]
    pieces = [Slice(*pair) for pair in pairwise(edges)]

    def load(piece: Slice) -> int:
        return tokens[bisect_left(times, piece.end_s)] - tokens[bisect_left(times, piece.start_s)]

    return max(pieces, key=load)
