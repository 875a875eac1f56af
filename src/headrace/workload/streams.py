"""Traffic from traffic: merged, sliced, sped up, stretched, split. Every function takes and gives a stream of arrivals
ordered by time and holds at most a few of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import accumulate

from headrace.workload.arrival import MAX_TOKENS, Arrival, Stretch

Arrivals = Iterable[Arrival]


def merge(*streams: Arrivals) -> Iterator[Arrival]:
    """All of them, by time; at equal times in the order of the arguments. Streams without times cannot be merged."""
    return heapq.merge(*streams, key=_at_s)


def between(arrivals: Arrivals, start_s: float, end_s: float) -> Iterator[Arrival]:
    """Those in [start_s, end_s), counted from start_s. Stops reading at the first one after."""
    for arrival in arrivals:
        at_s = _at_s(arrival)
        if at_s >= end_s:
            return
        if at_s >= start_s:
            yield replace(arrival, at_s=at_s - start_s)


def faster(arrivals: Arrivals, speed: float) -> Iterator[Arrival]:
    """The same requests at `speed` times the rate; also what a client does between turns takes 1/speed of its time,
    or else `at_s` would no longer be the earliest moment of a turn."""
    for arrival in arrivals:
        gap_s = None if arrival.gap_s is None else arrival.gap_s / speed
        yield replace(arrival, at_s=_at_s(arrival) / speed, gap_s=gap_s)


def promised(arrivals: Arrivals, factor: float) -> Iterator[Arrival]:
    """The same requests, each of which is promised an answer in so many times the seconds."""
    for arrival in arrivals:
        yield arrival if arrival.slo is None else replace(arrival, slo=arrival.slo.times(factor))


def longer(arrivals: Arrivals, prompt: float = 1.0, output: float = 1.0) -> Iterator[Arrival]:
    """Lengths times these factors, at least 1. Shared prefixes stay shared: cuts are rounded from the beginning of
    the prompt, so they fall on the same places in every prompt that begins alike."""
    for arrival in arrivals:
        yield replace(
            arrival,
            prompt=_longer(arrival.prompt, prompt, output),
            output_tokens=min(MAX_TOKENS, max(1, round(arrival.output_tokens * output))),
            max_new_tokens=arrival.max_new_tokens and max(1, round(arrival.max_new_tokens * output)),
        )


def _longer(stretches: tuple[Stretch, ...], prompt: float, output: float) -> tuple[Stretch, ...]:
    """An earlier answer has the length that its own arrival got."""
    asked = [0 if stretch.answer else stretch.tokens for stretch in stretches]
    cuts = [round(end * prompt) for end in accumulate(asked, initial=0)]
    scaled = [
        stretch._replace(tokens=max(1, round(stretch.tokens * output)) if stretch.answer else end - start)
        for stretch, start, end in zip(stretches, cuts, cuts[1:], strict=False)
    ]
    kept = tuple(stretch for stretch in scaled if stretch.tokens)
    return kept or (stretches[-1]._replace(tokens=1),)


def part(arrivals: Arrivals, low: float, high: float, seed: int = 0) -> Iterator[Arrival]:
    """A random share of the requests: [0, 0.8) to train with and [0.8, 1) held out never overlap and miss nothing.
    All turns of a session fall on one side."""
    for index, arrival in enumerate(arrivals):
        content = f"{seed}/{arrival.session or index}".encode()
        draw = int.from_bytes(blake2b(content, digest_size=8).digest(), "little") / 2**64
        if low <= draw < high:
            yield arrival


def _at_s(arrival: Arrival) -> float:
    if arrival.at_s is None:
        raise ValueError("this traffic has no times; give it some first")
    return arrival.at_s
