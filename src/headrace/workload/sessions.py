"""Makes arrivals from laws: when conversations begin, how they go on, what their prompts share, whose they are.

    turn 0   [ group's prefix | user 0 ]                          -> answer 0
    turn 1   [ group's prefix | user 0 | answer 0 | user 1 ]      -> answer 1, asked gap_s after answer 0

Draws depend on the seed and on the number of the conversation, not on the arrival times, so two rates see the same
conversations. Owns nothing; holds the turns of the conversations that are under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random

from headrace.core.types import SLO
from headrace.workload.arrival import NAME_BITS, Arrival, Stretch, name_of
from headrace.workload.laws import Count, Law, Pairs


@dataclass(frozen=True, slots=True)
class Recipe:
    """What conversations are like. A first prompt includes the shared prefix; a later one adds what the user says."""

    lengths: Pairs
    turns: Count | None = None  # None: every request stands alone
    gap_s: Law | None = None  # between an answer and the next turn: a tool runs or a person reads; needed with turns
    prefix_tokens: int = 0
    groups: Count | None = None  # which prefix, by number; None: all the same
    tenants: Count | None = None  # which tenant, by number; None: all one
    tenant: str = ""
    priority: int = 0
    slo: SLO | None = None
    max_new_tokens: int | None = None  # answers are cut there
    max_context_tokens: int = 1 << 20  # a conversation that would outgrow this ends

    @property
    def shares(self) -> bool:
        return self.turns is not None or self.prefix_tokens > 0


def conversations(starts: Iterable[float], recipe: Recipe, seed: str) -> Iterator[Arrival]:
    """Arrivals ordered by `at_s`, one conversation for each of `starts`, which must not decrease."""
    rng = Random(f"{seed}/conversations")
    pending: list[tuple[float, int, Arrival]] = []  # turns of conversations under way
    count = 0
    for index, start_s in enumerate(starts):
        while pending and pending[0][0] <= start_s:
            yield heappop(pending)[2]
        turns = _turns(start_s, recipe, rng, index, seed)
        yield next(turns)
        for arrival in turns:
            count += 1
            heappush(pending, (arrival.at_s or 0.0, count, arrival))
    while pending:
        yield heappop(pending)[2]


def closed_loop(think_s: Law, recipe: Recipe, seed: str) -> Iterator[Arrival]:
    """Requests without times, for clients that send one after the other."""
    rng, thinking = Random(f"{seed}/conversations"), Random(f"{seed}/thinking")
    index = 0
    while True:
        yield from _turns(None, recipe, rng, index, seed, think_s(thinking))
        index += 1


def _turns(
    start_s: float | None, recipe: Recipe, rng: Random, index: int, seed: str, think_s: float | None = None
) -> Iterator[Arrival]:
    tenant = recipe.tenant if recipe.tenants is None else f"{recipe.tenant}{recipe.tenants(rng)}"
    prompt_tokens, output_tokens = _lengths(recipe, rng)
    prompt = _first_prompt(recipe, rng, prompt_tokens, seed)
    turns = 1 if recipe.turns is None else recipe.turns(rng)
    session = f"{seed}/{index}" if recipe.turns else ""
    at_s, gap_s = start_s, think_s
    context_tokens = prompt_tokens + output_tokens
    for turn in range(turns):
        yield Arrival(
            at_s,
            prompt,
            output_tokens,
            recipe.max_new_tokens,
            session,
            turn,
            gap_s,
            tenant=tenant,
            priority=recipe.priority,
            slo=recipe.slo,
        )
        if turn + 1 == turns or recipe.gap_s is None:
            return
        said_tokens, next_tokens = _lengths(recipe, rng)
        answer = Stretch(output_tokens, rng.getrandbits(NAME_BITS), answer=True)
        prompt = (*prompt, answer, Stretch(said_tokens, rng.getrandbits(NAME_BITS)))
        output_tokens, gap_s = next_tokens, recipe.gap_s(rng)
        at_s = (at_s or 0.0) + gap_s
        context_tokens += said_tokens + next_tokens
        if context_tokens > recipe.max_context_tokens:
            return


def _lengths(recipe: Recipe, rng: Random) -> tuple[int, int]:
    prompt_tokens, output_tokens = recipe.lengths(rng)
    return (
        min(prompt_tokens, max(1, recipe.max_context_tokens - 1)),
        min(output_tokens, recipe.max_new_tokens or output_tokens),
    )


def _first_prompt(recipe: Recipe, rng: Random, tokens: int, seed: str) -> tuple[Stretch, ...]:
    if not recipe.shares:
        return (Stretch(tokens),)
    shared = min(recipe.prefix_tokens, tokens)
    group = 0 if recipe.groups is None else recipe.groups(rng)
    parts = (Stretch(shared, name_of(f"{seed}/group/{group}")), Stretch(tokens - shared, rng.getrandbits(NAME_BITS)))
    return tuple(stretch for stretch in parts if stretch.tokens)
