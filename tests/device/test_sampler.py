"""Sampling against a slow and obvious implementation, and its independence of the batch."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.types import Sampling
from headrace.device.reference.draws import sample
from headrace.device.sampler import Row, uniform

VOCAB = 3000


def logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def obvious(row: torch.Tensor, sampling: Sampling, position: int) -> int:
    """The definition, one candidate at a time, in double precision."""
    weights = (row.double() / sampling.temperature).softmax(-1)
    order = torch.sort(weights, descending=True, stable=True)
    kept = order.values.clone()
    if sampling.top_k:
        kept[sampling.top_k :] = 0
    kept = kept / kept.sum()
    before = kept.cumsum(-1) - kept
    kept[(before >= sampling.top_p) & (torch.arange(len(kept)) > 0)] = 0
    kept[kept < sampling.min_p * kept[0]] = 0
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        kept, ids = weights, torch.arange(len(weights))
    else:
        ids = order.indices
    sums = (kept / kept.sum()).cumsum(-1)
    found = int(torch.searchsorted(sums, torch.tensor([uniform(sampling.seed, position)]).double(), right=True))
    return int(ids[min(found, len(ids) - 1)])


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.5, 10.0]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 63, 64, 65, 1000, VOCAB, VOCAB + 5]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(samplings, st.integers(0, 50), st.integers(0, 5))
def test_equals_the_definition(sampling: Sampling, position: int, seed: int) -> None:
    table = logits(1, seed)
    got = sample(table.clone(), [Row(sampling, position)])[0].token_ids
    assert got == (obvious(table[0], sampling, position),)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(samplings, min_size=2, max_size=20))
def test_a_row_does_not_see_its_batch(batch: list[Sampling]) -> None:
    table = logits(len(batch))
    rows = [Row(sampling, index) for index, sampling in enumerate(batch)]
    together = sample(table.clone(), rows)
    alone = [sample(table[i : i + 1].clone(), [row])[0] for i, row in enumerate(rows)]
    assert together == alone


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20,000 draws over 12 tokens: under 31.3 with probability 0.999 for 11 degrees of freedom."""
    table = logits(1, vocab=12).mul_(0.4)
    expected = table[0].double().softmax(-1) * 20_000
    rows = [Row(Sampling(temperature=1.0, seed=7), position) for position in range(20_000)]
    drawn = Counter(sampled.token_ids[0] for sampled in sample(table.repeat(len(rows), 1), rows))
    assert sum((drawn[i] - float(n)) ** 2 / float(n) for i, n in enumerate(expected)) < 31.3


def test_penalties_and_bias_touch_what_they_say() -> None:
    row = torch.tensor([[2.0, -2.0, 1.0, 0.5, 0.0, 5.0]])
    sampling = Sampling(
        temperature=0,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        logit_bias=((4, 3.0), (5, -100.0)),
        logprobs=6,
    )
    state = Row.of(sampling, prompt_ids=[0, 1], output_ids=[2, 2])
    table = row.clone()
    result = sample(table, [state])[0]
    assert table[0].tolist() == [1.0, -4.0, 0.5 - 0.25 - 1.0, 0.5, 3.0, -95.0]
    assert result.token_ids == (4,)
    assert result.logprobs[0].logprob == pytest.approx(float(row[0].log_softmax(-1)[4]))  # of the model's own logits
    assert [token for token, _ in result.logprobs[0].top] == [5, 0, 2, 3, 4, 1]


def test_a_draw_never_lands_on_an_impossible_token() -> None:
    table = torch.full((1, 100), -math.inf)
    table[0, 3], table[0, 40] = 1.0, 1.0
    for position in range(200):
        token = sample(table.clone(), [Row(Sampling(seed=1), position)])[0].token_ids[0]
        assert token in (3, 40)


def test_uniform_is_in_range_and_spread() -> None:
    points = [uniform(seed, position) for seed in (-1, 0, 2**63 - 1) for position in range(2000)]
    assert 0 <= min(points) < 0.002 and 0.998 < max(points) < 1
    assert abs(sum(points) / len(points) - 0.5) < 0.02
