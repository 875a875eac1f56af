"""Prompts and answers on replicas of their own, against both on one (DistServe): what each is worth per device.

Nothing of a request's decoding reaches back to its prefill but back-pressure, which begins where decoding is
overloaded; so the two phases are simulated one after the other, with the KV's way over a link between them:

    arrivals --> prefill replicas --first token--> link, one after the other --> decode replicas --last token-->
                 simulate, one token each          bytes / bandwidth              simulate, prompts cost nothing

The first token is that of the prefill; the way and the queue behind it count as time per token, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headrace.core.events import Event, Finished
from headrace.sim.cost.batch import Batch, CostModel, Line, Spans, StepCost
from headrace.sim.hardware import Link
from headrace.sim.run import Site, least_tokens, simulate
from headrace.sim.stats import COMPLETED
from headrace.workload.arrival import Arrival, Stretch

ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Life:
    """One request: seconds to its first token, per later token on average, and its longest pause."""

    ttft_s: float
    tpot_s: float
    longest_s: float


@dataclass(frozen=True, slots=True)
class Promise:
    """So many of the requests within each promise, each counted by itself, as the paper does."""

    ttft_s: float
    token_s: float
    share: float = 0.9
    longest: bool = False  # token_s is about the longest pause, not the mean

    def kept(self, lives: Sequence[Life], asked: int) -> bool:
        """Who has no life was refused and kept nothing."""
        first = sum(life.ttft_s <= self.ttft_s for life in lives)
        token = sum((life.longest_s if self.longest else life.tpot_s) <= self.token_s for life in lives)
        return min(first, token) >= self.share * asked


@dataclass(frozen=True, slots=True)
class Pulled:
    """A price by which prompts are there already: their rows are decode rows of the same context."""

    cost: CostModel

    def estimate(self, batch: Batch) -> StepCost:
        return self.cost.estimate(self._of(batch))

    def line(self, batch: Batch, steps: int) -> Line:
        return self.cost.line(self._of(batch), steps)

    @staticmethod
    def _of(batch: Batch) -> Batch:
        if not batch.prefill_tokens:
            return batch
        rows = batch.rows
        full, *windowed = (
            Spans(0, 0, span.decode_context + span.prefill_context, growing=rows)
            for span in (batch.full, *batch.windowed)
        )
        return Batch(rows, rows, batch.sampled, rows, 0, full, tuple(windowed), batch.longest)


class _Ends:
    """An observer of who finished, by number of arrival, which is what a simulated request is called."""

    def __init__(self) -> None:
        self.ends: dict[int, tuple[float, float, float]] = {}  # (arrival, first token, last token)

    def observe(self, event: Event) -> None:
        if isinstance(event, Finished) and event.first_token_s is not None:
            if event.reason in COMPLETED:
                self.ends[int(event.request_id)] = (event.arrival_s, event.first_token_s, event.at_s)


def separated(
    arrivals: Sequence[Arrival], prefill: Site, decode: Site, link: Link, kv_bytes_per_token: float
) -> list[Life]:
    """Lives of the requests that were answered, on replicas of one phase each."""
    firsts = _Ends()
    asked = [replace(one, output_tokens=1, max_new_tokens=1) for one in arrivals]
    simulate(asked, prefill, dispatch=least_tokens, observer=firsts)
    moved = _moved(arrivals, firsts.ends, link, kv_bytes_per_token)
    lasts = _Ends()
    again = [_continued(arrivals[number], at_s) for number, at_s in moved]
    mixed = replace(decode.settings, batch="chunked", prefix_cache=False)  # who is pulled joins those that decode
    there = replace(decode, settings=mixed, cost=Pulled(decode.cost), token_budget=1 << 40)
    if again:
        simulate(again, there, dispatch=least_tokens, observer=lasts)
    lives = []
    order = {number: at for at, (number, _) in enumerate(moved)}
    for number, (arrival_s, first_s, _) in firsts.ends.items():
        if arrivals[number].output_tokens < 2:
            lives.append(Life(first_s - arrival_s, 0.0, 0.0))
        elif order[number] in lasts.ends:
            _, second_s, last_s = lasts.ends[order[number]]
            tokens = arrivals[number].output_tokens - 1
            lives.append(Life(first_s - arrival_s, (last_s - first_s) / tokens, second_s - first_s))
    return lives


def _moved(
    arrivals: Sequence[Arrival], ends: dict[int, tuple[float, float, float]], link: Link, kv_bytes: float
) -> list[tuple[int, float]]:
    """(arrival, when its KV is there), in the order of being there: one after the other over the link."""
    free_s, found = 0.0, []
    for number, (_, first_s, _) in sorted(ends.items(), key=lambda item: item[1][1]):
        if arrivals[number].output_tokens < 2:
            continue
        nbytes = kv_bytes * arrivals[number].prompt_tokens
        begun_s = max(first_s, free_s)
        free_s = begun_s + nbytes / link.bytes_per_s
        found.append((number, free_s + link.latency_s))
    return found


def _continued(arrival: Arrival, at_s: float) -> Arrival:
    """The same request with its first token in the prompt."""
    tokens = arrival.output_tokens - 1
    return replace(
        arrival,
        at_s=at_s,
        prompt=(Stretch(arrival.prompt_tokens + 1),),
        output_tokens=tokens,
        max_new_tokens=tokens,
        session="",
        gap_s=None,
    )


def goodput(lives: Callable[[float], Sequence[Life]], promise: Promise, asked: int, high: float = 20.0) -> float:
    """The highest rate that keeps the promise, by bisection of its logarithm between 1/500 of `high` and `high`."""
    low = high / 500
    if not promise.kept(lives(low), asked):
        return 0.0
    for _ in range(ROUNDS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if promise.kept(lives(middle), asked) else (low, middle)
    return low
