"""Native drawing against the definition, against torch, and against itself in another batch or variant."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import TINY, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from rig import Given, NativeModel
from test_sampler import VOCAB, logits, obvious, samplings

from headrace.core.types import Sampling
from headrace.device.forward import Rows
from headrace.device.native import library
from headrace.device.native.forward import NativeForward, OutOfBounds
from headrace.device.reference import draws
from headrace.device.sampler import Row

HERE = [name for name in library.VARIANTS if library.variant(name)]
GREEDY = Sampling(temperature=0)


@cache
def drawer(vocab: int = VOCAB, variant: str | None = None, threads: int = 2) -> NativeForward:
    """A model of so many tokens, of which only the drawing is used."""
    weights, embedding = random_weights(3), torch.zeros(vocab, int(str(TINY["hidden_size"])))
    tensors = Given(lambda name: embedding if "embed_tokens" in name else weights(name))
    model = NativeModel(TINY | {"vocab_size": vocab}, tensors, variant=variant, threads=threads)
    return model.forward(16)


def bits(vocab: int, tokens: list[int]) -> np.ndarray:
    allowed = np.zeros(-(-vocab // 32), dtype=np.uint32)
    for token in tokens:
        allowed[token // 32] |= np.uint32(1 << token % 32)
    return allowed.view(np.int32)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(samplings, st.integers(0, 50), st.integers(0, 5), st.sampled_from([1, 12, 255, 256, 257, 1000, VOCAB]))
def test_equals_the_definition(sampling: Sampling, position: int, seed: int, vocab: int) -> None:
    table = logits(1, seed, vocab)
    assert drawer(vocab).draw(table.numpy().copy(), [Row(sampling, position)]) == [
        obvious(table[0], sampling, position)
    ]


def test_logits_and_draw_in_one_call_or_in_two() -> None:
    """Whoever wants log-probabilities or penalties gets two calls: the same tokens."""
    model = NativeModel(TINY, Given(random_weights(3))).forward(128)
    ids = np.random.default_rng(0).integers(0, model.shape.vocab, 40).tolist()
    hidden = model.layers([Rows(0, 0, 40, np.arange(3))], 0, model.shape.layers, ids, None)
    rows = [Row(Sampling(temperature=n % 4, seed=n), n) for n in range(40)]
    told = [Row(replace(row.sampling, logprobs=1), row.position) for row in rows]
    chosen = np.arange(40)[::-1].copy()
    tokens = [drawn.token_ids for drawn in model.sample(hidden, chosen, rows)]
    assert tokens == [drawn.token_ids for drawn in model.sample(hidden, chosen, told)]
    assert len({*tokens}) > 20


@pytest.mark.parametrize("temperature", [0.2, 1.0, 30.0])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 50}, {"min_p": 0.05}], ids=str)
def test_a_large_vocabulary_as_torch_draws_it(filters: dict[str, float], temperature: float) -> None:
    """From a peak to a flat row, where ten thousands of tokens are candidates: the same tokens for fixed seeds, but
    where two are as likely but for the last bits of their weights, and so may change places."""
    table = logits(40, 1, 49152)
    rows = [Row(Sampling(temperature=temperature, seed=n, **filters), n) for n in range(40)]
    ours, torchs = drawer(49152).draw(table.clone().numpy(), rows), draws.draw(table.clone(), rows)
    apart = [n for n, (one, other) in enumerate(zip(ours, torchs, strict=True)) if one != other]
    assert len(apart) <= (2 if temperature == 30 else 0)
    assert all(abs(table[n, ours[n]] - table[n, torchs[n]]) < 1e-6 * temperature for n in apart)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 1030), st.integers(1, 4), st.integers(0, 99), st.sampled_from([1.0, 1e30, 1e-42]))
def test_greedy_is_the_first_of_the_largest(vocab: int, values: int, seed: int, scale: float) -> None:
    """Among few values, so that many are equal; and some are no logits at all."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(values, (8, vocab), generator=generator).float().sub_(2).mul_(scale)
    table[1::2].masked_fill_(torch.rand(4, vocab, generator=generator) < 0.5, -math.inf)
    assert drawer(vocab).draw(table.clone().numpy(), [Row(GREEDY)] * 8) == table.argmax(-1).tolist()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(samplings | st.just(GREEDY), min_size=2, max_size=20), st.sampled_from([1, 3]))
def test_a_row_does_not_see_its_batch(batch: list[Sampling], threads: int) -> None:
    """Nor how many threads there are, nor what the machine can do."""
    table = logits(len(batch))
    rows = [Row(sampling, index) for index, sampling in enumerate(batch)]
    together = drawer(threads=threads).draw(table.clone().numpy(), rows)
    for variant in HERE:
        one = drawer(variant=variant)
        assert [one.draw(table[i : i + 1].clone().numpy(), [row])[0] for i, row in enumerate(rows)] == together


@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.2}, {"top_k": 8, "top_p": 0.9}], ids=str
)
def test_draws_follow_the_distribution(filters: dict[str, float]) -> None:
    """Chi-square of 20,000 draws: under 31.3 with probability 0.999 for 11 degrees of freedom, more so for fewer."""
    table = logits(1, vocab=12).mul_(0.4)
    weights = table[0].double().softmax(-1)
    order = weights.argsort(descending=True)
    before = weights[order].cumsum(-1) - weights[order]
    among = weights[order][: int(filters.get("top_k", 12))].sum()
    kept = (before < float(filters.get("top_p", 1)) * among) & (torch.arange(12) < filters.get("top_k", 12))
    kept &= weights[order] >= filters.get("min_p", 0) * weights.max()
    weights[order[~kept]] = 0
    expected = (weights / weights.sum() * 20_000).tolist()
    rows = [Row(Sampling(seed=7, **filters), position) for position in range(20_000)]
    drawn = Counter(drawer(12).draw(table.repeat(len(rows), 1).numpy(), rows))
    assert all(expected[token] > 0 for token in drawn)
    assert sum((drawn[i] - n) ** 2 / n for i, n in enumerate(expected) if n) < 31.3


def test_equals_are_taken_in_order() -> None:
    """Where all are alike, a nucleus of a half or the first ten are the lower tokens."""
    table = torch.zeros(400, 1000)
    halves, tens = (
        set(drawer(1000).draw(table.clone().numpy(), [Row(Sampling(seed=n, **filters)) for n in range(400)]))
        for filters in ({"top_p": 0.5}, {"top_k": 10})
    )
    assert 480 < max(halves) < 500
    assert tens == set(range(10))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3), Sampling(seed=3, top_p=0.9, top_k=40)], ids=str)
def test_what_is_not_allowed_is_not_drawn(sampling: Sampling) -> None:
    tokens = [3, 31, 32, 64, 499]
    table = logits(64, vocab=500)
    rows = [Row(sampling, n, allowed=bits(500, tokens) if n % 2 else None) for n in range(64)]
    drawn = drawer(500).draw(table.clone().numpy(), rows)
    assert drawn == draws.draw(table.clone(), rows)
    assert set(drawn[1::2]) <= set(tokens)
    assert not set(drawn[::2]) <= set(tokens)


def test_penalties_and_logprobs_come_before_it() -> None:
    """What is drawn is what torch draws, and what is told of it the same but for rounding."""
    table = logits(6, vocab=500)
    plain, biased = Sampling(seed=5, logprobs=3), Sampling(seed=5, logit_bias=((77, 100.0),), frequency_penalty=1.5)
    rows = [Row.of(each, [1, 2], [3, 77]) for each in (plain, biased, GREEDY) * 2]
    drawn, torchs = drawer(500).drawn(table.numpy().copy(), rows), draws.sample(table.clone(), rows)
    assert [one.token_ids for one in drawn] == [one.token_ids for one in torchs]
    for ours, theirs in zip(drawn, torchs, strict=True):
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert [one.token_id, *dict(one.top)] == [other.token_id, *dict(other.top)]
            assert [one.logprob, *dict(one.top).values()] == pytest.approx([other.logprob, *dict(other.top).values()])
    assert drawn[1].token_ids == (77,)
    assert [len(one.logprobs) for one in drawn] == [1, 0, 0] * 2


def test_a_row_of_one_chance_or_none() -> None:
    table = torch.full((4, 300), -math.inf)
    table[0, 3] = table[0, 290] = 1.0
    table[1, 299] = -1e38
    table[2, 5] = 3e38
    hot = [Row(Sampling(temperature=temperature, seed=1)) for temperature in (1.0, 1e-30, 1e-30, 1.0)]
    assert drawer(300).draw(table.clone().numpy(), hot)[1:] == [299, 5, 0]
    many = drawer(300).draw(table[:1].repeat(200, 1).numpy(), [Row(Sampling(seed=1), n) for n in range(200)])
    assert set(many) == {3, 290}


@pytest.mark.parametrize("row", range(3))
def test_a_logit_that_is_not_a_number(row: int) -> None:
    table = logits(3)
    table[row, 1234] = math.nan
    with pytest.raises(FloatingPointError, match="not a number"):
        drawer().draw(table.numpy(), [Row(GREEDY)] * 3)


def test_other_shapes_are_refused() -> None:
    one = drawer(500)
    for table, rows in ((logits(2, vocab=499), 2), (logits(2, vocab=500), 3), (logits(500, vocab=2).T, 2)):
        with pytest.raises(OutOfBounds):
            one.draw(table.numpy(), [Row(GREEDY)] * rows)
    with pytest.raises(OutOfBounds, match="bits"):
        one.draw(logits(1, vocab=500).numpy(), [Row(GREEDY, allowed=bits(480, [1]))])
    assert one.draw(np.empty((0, 500), np.float32), []) == []
