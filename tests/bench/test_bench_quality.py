"""Quality of formats: windows lose no token, a divergence is a bound from below, and the same is the same."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.bench.quality import Judged, Unjudgeable, compare, divergence, judge, text, windows
from headrace.core.types import FinishReason, Output, Request, TokenLogprob

logits = st.lists(st.floats(-8, 8), min_size=12, max_size=12)


def entry(values: list[float], token: int, top: int) -> TokenLogprob:
    """What a model with these logits reports."""
    norm = math.log(math.fsum(map(math.exp, values)))
    ranked = sorted(range(len(values)), key=lambda at: -values[at])[:top]
    return TokenLogprob(token, values[token] - norm, tuple((at, values[at] - norm) for at in ranked))


def exact(p: list[float], q: list[float]) -> float:
    every = entry(p, 0, len(p)).top
    other = dict(entry(q, 0, len(q)).top)
    return sum(math.exp(value) * (value - other[token]) for token, value in every)


@given(logits, logits, st.integers(0, 11), st.integers(1, 12))
def test_a_divergence_never_exceeds_the_real_one(p: list[float], q: list[float], token: int, top: int) -> None:
    found = divergence(entry(p, token, top), entry(q, token, top))
    assert 0.0 <= found <= exact(p, q) + 1e-6
    if top == 12:
        assert found == pytest.approx(exact(p, q), abs=1e-6)


@given(st.lists(st.integers(0, 99), max_size=70), st.integers(4, 20), st.lists(st.integers(100, 101), max_size=2))
def test_windows_lose_no_token(ids: list[int], size: int, begin: list[int]) -> None:
    cut = list(windows(ids, size, begin))
    assert all(2 <= len(window) <= size and list(window[: len(begin)]) == begin for window in cut)
    kept = [token for window in cut for token in window[len(begin) :]]
    assert kept == ids or (not begin and kept == ids[:-1] and len(ids) % size == 1)


def judged(*columns: tuple[list[float], int]) -> Judged:
    return tuple(entry(values, token, 4) for values, token in columns)


def test_a_format_against_itself_loses_nothing() -> None:
    same = judged(([1.0, 2.0, 0.0, -1.0, 0.5], 1), ([0.0, 0.5, 3.0, 1.0, 1.0], 0))
    found = compare(same, same)
    assert (found.tokens, found.ratio, found.ratio_error, found.agreement) == (2, 1.0, 0.0, 1.0)
    assert found.kl_mean == pytest.approx(0.0, abs=1e-9)
    assert found.perplexity == pytest.approx(math.exp(-(same[0].logprob + same[1].logprob) / 2))


def test_a_worse_format_is_worse() -> None:
    reference = judged(([0.0, 3.0, 0.0, 0.0, 0.0], 1), ([0.0, 3.0, 0.0, 0.0, 0.0], 1))
    other = judged(([0.0, 2.0, 0.0, 0.0, 0.0], 1), ([3.0, 2.0, 0.0, 0.0, 0.0], 1))
    found = compare(reference, other)
    assert found.ratio > 1 and found.ratio_error > 0 and found.agreement == 0.5 and found.kl_p99 > found.kl_mean > 0


def test_judgements_of_different_tokens_are_refused() -> None:
    with pytest.raises(Unjudgeable, match="different"):
        compare(judged(([1.0, 2.0, 0.0, 0.0], 1)), judged(([1.0, 2.0, 0.0, 0.0], 2)))
    with pytest.raises(Unjudgeable, match="nothing"):
        compare((), ())


class Parrot:
    """A service that finds every token as likely as its id says, and reports in two parts."""

    async def generate(self, request: Request) -> AsyncIterator[Output]:
        ids = request.prompt_ids() or ()
        entries = tuple(TokenLogprob(token, -float(token)) for token in ids[1:])
        yield Output(request.id, prompt_logprobs=entries[:2])
        await asyncio.sleep(0)
        error = "the device fell over" if 13 in ids else None
        yield Output(request.id, (0,), prompt_logprobs=entries[2:], finish=FinishReason.LENGTH, error=error)


def test_what_a_service_says_comes_in_the_order_of_the_text() -> None:
    heard: list[float] = []
    found = asyncio.run(judge(Parrot(), [(1, 2, 3, 4), (5, 6), (7, 8, 9)], heard.append))  # type: ignore[arg-type]
    assert [one.token_id for one in found] == [2, 3, 4, 6, 8, 9] and heard[-1] == 1.0
    with pytest.raises(Unjudgeable, match="fell over"):
        asyncio.run(judge(Parrot(), [(1, 13)]))  # type: ignore[arg-type]


def test_the_text_that_comes_along_is_plain_prose() -> None:
    prose = text()
    assert prose.isascii() and 6000 < len(prose.split()) < 12000
    assert sum(char.isalpha() or char in " ,.\n'" for char in prose) > 0.97 * len(prose)
