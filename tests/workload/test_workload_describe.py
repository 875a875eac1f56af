"""Statistics in one pass agree with the textbook's, and count sharing as a cache would find it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, pstdev, quantiles

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.workload.arrival import Arrival, Stretch, block_keys
from headrace.workload.describe import describe, lru_hit_ratio


@settings(derandomize=True, max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9), st.integers(0, 10**9)), min_size=2, max_size=60))
def test_moments_and_quantiles(rows: list[tuple[int, int, int]]) -> None:
    times = sorted(at_us / 1e6 for _, _, at_us in rows)
    made = [Arrival(at_s, (Stretch(row[0]),), row[1]) for at_s, row in zip(times, rows, strict=True)]
    got = describe(made)
    for lengths, values in ((got.prompt, [row[0] for row in rows]), (got.output, [row[1] for row in rows])):
        assert lengths.mean == pytest.approx(fmean(values))
        assert lengths.std == pytest.approx(pstdev(values), abs=1e-9)
        cuts = quantiles(values, n=100, method="inclusive")
        for level in (10, 50, 90, 99):
            assert getattr(lengths, f"p{level}") == pytest.approx(cuts[level - 1])
        assert (lengths.min, lengths.max, lengths.sum) == (min(values), max(values), sum(values))
    gaps = [after - before for before, after in pairwise(times)]
    if times[-1] > times[0]:
        assert got.rate == pytest.approx(len(rows) / (times[-1] - times[0]))
        assert got.gap_cv == pytest.approx(pstdev(gaps) / fmean(gaps), rel=1e-6, abs=1e-9)
    else:
        assert got.rate is None and got.gap_cv is None


NAMES = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.tuples(NAMES, st.sampled_from(["", "a"])), min_size=1, max_size=12))
def test_sharing_is_what_an_endless_cache_of_single_tokens_finds(rows: list[tuple[list[int], str]]) -> None:
    made = [
        Arrival(0.0, tuple(Stretch(1 + 2 * name, name) for name in names), 1, tenant=tenant) for names, tenant in rows
    ]
    keys = [block_keys(arrival.prompt, 1, arrival.tenant.encode()) for arrival in made]
    assert describe(made).shared_fraction == pytest.approx(lru_hit_ratio(keys, 10**9))


def test_a_longer_stretch_shares_what_a_shorter_one_had() -> None:
    made = [Arrival(0.0, (Stretch(tokens, 5), Stretch(10)), 1) for tokens in (30, 50, 50)]
    assert describe(made).shared_fraction == pytest.approx((30 + 50) / (40 + 60 + 60))


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=12), st.integers(1, 6))
def test_the_cache_agrees_with_a_list_that_is_searched(prompts: list[list[int]], capacity: int) -> None:
    assert lru_hit_ratio(prompts, capacity) == pytest.approx(searched(prompts, capacity))


def searched(prompts: Sequence[Sequence[int]], capacity: int) -> float:
    recent: list[int] = []
    found = 0
    for blocks in prompts:
        hits = [block in recent for block in blocks]
        found += hits.index(False) if False in hits else len(hits)
        for block in blocks:
            recent = [other for other in recent if other != block][-capacity + 1 :] if capacity > 1 else []
            recent.append(block)
    return found / sum(map(len, prompts))


def test_traffic_without_times_and_none_at_all() -> None:
    got = describe([Arrival(None, (Stretch(5),), 2), Arrival(None, (Stretch(7),), 4)])
    assert (got.rate, got.span_s, got.gap_cv, got.prompt.mean) == (None, None, None, 6.0)
    with pytest.raises(ValueError, match="no traffic"):
        describe([])


def test_the_table_says_it_in_words() -> None:
    made = [Arrival(float(at), (Stretch(100, 1), Stretch(20, at + 2)), 50, turn=at % 2) for at in range(11)]
    assert describe(made).table().splitlines() == [
        "11 requests (5 follow-ups), 1.1 requests/s over 10.0 s, gaps with CV 0.00",
        "prompt: mean 120.0, p50 120, p90 120, p99 120, max 120 tokens",
        "output: mean 50.0, p50 50, p90 50, p99 50, max 50 tokens",
        "shared: 75.8% of prompt tokens; tenants: 1",
    ]
