"""Laws of numbers: their means, variances and shapes, their text, and that they depend on their generator only."""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from statistics import fmean, pstdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import BadSetting
from headrace.workload.corpora import CORPORA, LEVELS
from headrace.workload.laws import empirical, parse_count, parse_law, parse_pairs

DRAWS = 40_000


@pytest.mark.parametrize(
    ("text", "mean", "std"),
    [
        ("2.5", 2.5, 0.0),
        ("1:4", 2.5, 3 / math.sqrt(12)),
        ("exp:3", 3.0, 3.0),
        ("ln:10:0.5", 10 * math.exp(0.125), 10 * math.exp(0.125) * math.sqrt(math.exp(0.25) - 1)),
        ("gamma:4:0.5", 4.0, 2.0),
        ("gamma:4:2", 4.0, 8.0),
        ("zipf:0:1:9", 5.0, math.sqrt(80 / 12)),
        ("0.1@80+30@20", 6.08, 29.9 * 0.4),
        ("exp:1@1+exp:3@3", 2.5, math.sqrt(0.25 * 2 + 0.75 * 18 - 6.25)),
    ],
)
def test_means_and_deviations(text: str, mean: float, std: float) -> None:
    law, rng = parse_law(text), Random(1)
    drawn = [law(rng) for _ in range(DRAWS)]
    assert fmean(drawn) == pytest.approx(mean, rel=0.03)
    assert pstdev(drawn) == pytest.approx(std, rel=0.06, abs=1e-12)


@pytest.mark.parametrize(("s", "low", "high"), [(1.1, 1, 12), (1.0, 1, 12), (0.5, 3, 9), (2.0, 1, 6), (0.0, 2, 8)])
def test_zipf_has_its_probabilities(s: float, low: int, high: int) -> None:
    law, rng = parse_law(f"zipf:{s}:{low}:{high}"), Random(2)
    counts = Counter(int(law(rng)) for _ in range(DRAWS))
    weights = {k: k**-s for k in range(low, high + 1)}
    total = sum(weights.values())
    assert counts.keys() == weights.keys()
    expected = {k: DRAWS * weight / total for k, weight in weights.items()}
    chi_square = sum((counts[k] - expected[k]) ** 2 / expected[k] for k in expected)
    assert chi_square < len(expected) - 1 + 5 * math.sqrt(2 * len(expected))


def test_zipf_of_burst_gpts_generator_stays_in_its_range() -> None:
    law, rng = parse_law("zipf:1.1:1:10000000"), Random(3)
    drawn = [law(rng) for _ in range(DRAWS)]
    assert all(1 <= k <= 10_000_000 and k == int(k) for k in drawn)
    norm = sum(k**-1.1 for k in range(1, 10_001)) + 10 * (10_000.5**-0.1 - 10_000_000.5**-0.1)
    assert drawn.count(1) / DRAWS == pytest.approx(1 / norm, rel=0.05)


TEXTS = st.sampled_from(
    ["7", "1:90", "exp:30", "ln:40:2", "gamma:30:3", "zipf:1.3:1:500", "zipf:1:2:9", "5@1+ln:9:1@2", "0", "0.2"]
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(TEXTS, st.integers(0, 2**32))
def test_draws_depend_on_the_generator_only_and_are_never_negative(text: str, seed: int) -> None:
    one, other = parse_law(text), parse_law(text)
    a, b = Random(seed), Random(seed)
    drawn = [one(a) for _ in range(20)]
    assert drawn == [other(b) for _ in range(20)]
    assert all(0 <= value < math.inf for value in drawn)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(TEXTS.filter(lambda text: text != "0"), st.integers(0, 2**32))
def test_counts_are_whole_and_within_bounds(text: str, seed: int) -> None:
    count, rng = parse_count(text, 1, 100), Random(seed)
    drawn = [count(rng) for _ in range(50)]
    assert all(isinstance(value, int) and 1 <= value <= 100 for value in drawn)


def test_uniform_counts_reach_both_ends_alike() -> None:
    count, rng = parse_count("10:20"), Random(4)
    counts = Counter(count(rng) for _ in range(DRAWS))
    assert set(counts) == set(range(10, 21))
    assert counts[10] == pytest.approx(DRAWS / 11, rel=0.1)
    assert counts[20] == pytest.approx(DRAWS / 11, rel=0.1)


BAD = ["", "a", "-1", "nan", "inf", "4:1", "1:2:3", "exp", "exp:0", "exp:nan", "ln:5", "ln:0:1", "ln:5:-1", "1e999"]
BAD += ["ln:nan:1", "gamma:1:0", "gamma:1", "zipf:1:0:5", "zipf:1:5:1", "zipf:-1:1:5", "zipf:1:1.5:3", "5@", "@", "+"]
BAD += ["5@1+", "5@0", "5@-1+6@2", "5@nan", "zipf:1:1:1e300", "exp:1:2"]


@pytest.mark.parametrize("text", BAD)
def test_bad_laws_are_named(text: str) -> None:
    with pytest.raises(BadSetting, match="is not a law"):
        parse_law(text)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.text("0123456789.:@+,einaflxpgmz-", max_size=14))
def test_any_text_is_a_law_or_a_bad_setting(text: str) -> None:
    for parse in (parse_law, parse_count, parse_pairs):
        try:
            law = parse(text)
        except BadSetting:
            continue
        law(Random(0))


@pytest.mark.parametrize("text", ["0", "5:4", "99999999", "0:5"])
def test_counts_outside_their_bounds_are_refused(text: str) -> None:
    with pytest.raises(BadSetting, match="not N or LO:HI within"):
        parse_count(text)


@pytest.mark.parametrize("name", CORPORA)
def test_a_corpus_gives_back_what_was_measured(name: str) -> None:
    """Quantiles at every level but the ends, means within 1 %, and ranks that go together as they did."""
    corpus, pair, rng = CORPORA[name], parse_pairs(name), Random(5)
    drawn = [pair(rng) for _ in range(DRAWS)]
    assert len(corpus.prompt) == len(corpus.output) == len(LEVELS)
    for side, quantiles, mean in ((0, corpus.prompt, corpus.mean_prompt), (1, corpus.output, corpus.mean_output)):
        values = sorted(lengths[side] for lengths in drawn)
        assert fmean(values) == pytest.approx(mean, rel=0.02)
        assert quantiles[0] <= values[0] and values[-1] <= quantiles[-1]
        for level, quantile in zip(LEVELS[1:-1], quantiles[1:-1], strict=True):
            spread = 4 * math.sqrt(level * (1 - level) / DRAWS)  # of the level that a sample quantile stands for
            below = values[max(0, int((level - spread) * DRAWS) - 1)]
            above = values[min(DRAWS - 1, int((level + spread) * DRAWS) + 1)]
            assert below <= quantile <= above
    assert rank_correlation(drawn) == pytest.approx(corpus.correlation, abs=0.03)


def rank_correlation(pairs: list[tuple[int, int]]) -> float:
    ranks = []
    for side in (0, 1):
        order = sorted(range(len(pairs)), key=lambda at: pairs[at][side])
        rank = [0.0] * len(pairs)
        for place, at in enumerate(order):
            rank[at] = float(place)
        ranks.append(rank)
    middle = (len(pairs) - 1) / 2
    covariance = sum((x - middle) * (y - middle) for x, y in zip(*ranks, strict=True))
    return covariance / sum((x - middle) ** 2 for x in ranks[0])


def test_reasoning_is_long_heavy_tailed_and_cut() -> None:
    """Mean of 3,000 to 8,000 output tokens; of equal token rate, far more spread than ShareGPT's."""
    rng = Random(6)
    pair = parse_pairs("reasoning")
    outputs = sorted(pair(rng)[1] for _ in range(DRAWS))
    assert 3000 < fmean(outputs) < 8000
    assert outputs[-1] == 32_768
    assert outputs[int(0.99 * DRAWS)] > 5 * outputs[DRAWS // 2]
    thinking = parse_pairs("reasoning:2000:0:1000000")
    assert fmean(thinking(rng)[1] for _ in range(DRAWS)) == pytest.approx(
        2000 + CORPORA["sharegpt"].mean_output, rel=0.02
    )
    with pytest.raises(BadSetting, match="needs a mean"):
        parse_pairs("reasoning:0")


def test_recorded_pairs_stay_together() -> None:
    pair, rng = empirical([1, 2, 3], [10, 20, 30]), Random(7)
    counts = Counter(pair(rng) for _ in range(3000))
    assert counts.keys() == {(1, 10), (2, 20), (3, 30)}
    assert min(counts.values()) > 850
    with pytest.raises(BadSetting, match="no recorded lengths"):
        empirical([], [])


def test_independent_pairs() -> None:
    assert parse_pairs("128,64")(Random(0)) == (128, 64)
    for text in ("128", "1,2,3", "sharegpt:2", "x,y", "128,0"):
        with pytest.raises(BadSetting):
            parse_pairs(text)
