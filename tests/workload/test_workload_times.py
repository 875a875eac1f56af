"""Arrival processes: rates, burstiness, seasons; times that never go back and depend on the generator only."""

from __future__ import annotations

import math
from itertools import islice, pairwise, takewhile
from random import Random
from statistics import fmean, pstdev, pvariance

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import BadSetting
from headrace.workload.times import Closed, Times, gamma_gaps, parse_arrivals


def process(text: str) -> Times:
    times = parse_arrivals(text)
    assert not isinstance(times, Closed)
    return times


def until(text: str, end_s: float, seed: int = 1) -> list[float]:
    return list(takewhile(lambda at_s: at_s < end_s, process(text)(Random(seed))))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variance_of_the_gamma_law(burstiness: float) -> None:
    gaps = list(islice(gamma_gaps(20.0, burstiness, Random(1)), 40_000))
    assert fmean(gaps) == pytest.approx(1 / 20, rel=0.04)
    assert pvariance(gaps) == pytest.approx(1 / (burstiness * 20**2), rel=0.12)


def test_the_defaults_of_burst_gpts_generator() -> None:
    """Gamma of shape 0.25 and scale 2 s: half a second on average, coefficient of variation 2."""
    gaps = [after - before for before, after in pairwise(islice(process("gamma:2:0.25")(Random(2)), 100_001))]
    assert fmean(gaps) == pytest.approx(0.5, rel=0.02)
    assert pstdev(gaps) / fmean(gaps) == pytest.approx(2.0, abs=0.1)


def test_poisson_gaps_are_exponential() -> None:
    """Without memory: of the gaps longer than t, a share of exp(-1) is longer than t + 1/rate."""
    gaps = [after - before for before, after in pairwise(islice(process("poisson:1")(Random(2)), 40_000))]
    longer = [gap for gap in gaps if gap > 0.7]
    assert sum(gap > 1.7 for gap in longer) / len(longer) == pytest.approx(math.exp(-1), abs=0.015)


def test_even_is_a_metronome() -> None:
    assert list(islice(process("even:4")(Random(0)), 4)) == [0.0, 0.25, 0.5, 0.75]
    assert set(islice(process("even:inf")(Random(0)), 4)) == {0.0}
    assert set(islice(process("poisson:inf")(Random(0)), 4)) == {0.0}


def test_modulated_has_the_mean_rate_of_its_states_and_comes_in_bursts() -> None:
    end_s = 60_000.0
    times = until("mmpp:1@40,20@10", end_s)
    assert len(times) / end_s == pytest.approx((1 * 40 + 20 * 10) / 50, rel=0.05)
    counts = [0] * int(end_s // 10)
    for at_s in times:
        counts[int(at_s // 10)] += 1
    assert pvariance(counts) / fmean(counts) > 10  # of a Poisson process: 1
    plain = until("mmpp:5@7", 4000.0)
    assert len(plain) == pytest.approx(5 * 4000, rel=0.03)
    assert all(at_s > 0 for at_s in islice(process("mmpp:0@10,5@1")(Random(3)), 100))


def test_diurnal_swings_around_its_mean() -> None:
    """Over whole days the mean; by quarter of a day what the integral of the cosine says."""
    day = 4000.0
    times = until(f"diurnal:5:0.8:{day}", 20 * day)
    assert len(times) / (20 * day) == pytest.approx(5, rel=0.02)
    quarters = [0] * 4
    for at_s in times:
        quarters[int(at_s % day // (day / 4))] += 1
    night = 0.25 - 0.8 / (2 * math.pi)
    for count, share in zip(quarters, (night, 0.5 - night, 0.5 - night, night), strict=True):
        assert count / len(times) == pytest.approx(share, rel=0.03)


def test_hours_follow_their_table_again_and_again() -> None:
    times = until("hours:0,2,6", 6 * 3600.0)
    counts = [sum(hour * 3600 <= at_s < (hour + 1) * 3600 for at_s in times) for hour in range(6)]
    assert counts[0] == counts[3] == 0
    for hour, rate in ((1, 2), (2, 6), (4, 2), (5, 6)):
        assert counts[hour] == pytest.approx(rate * 3600, rel=0.05)


def test_closed_has_clients_and_no_times() -> None:
    closed = parse_arrivals("closed:8:exp:2")
    assert isinstance(closed, Closed)
    assert closed.clients == 8
    assert fmean(closed.think_s(Random(seed)) for seed in range(4000)) == pytest.approx(2, rel=0.08)
    patient = parse_arrivals("closed:3")
    assert isinstance(patient, Closed)
    assert patient.think_s(Random(0)) == 0


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.sampled_from(["even:3", "poisson:3", "gamma:3:0.1", "mmpp:0@1,30@2,1@5", "diurnal:2:1:60", "hours:1,0,4"]),
    st.integers(0, 2**32),
)
def test_times_never_go_back_and_depend_on_the_seed_only(text: str, seed: int) -> None:
    times = list(islice(process(text)(Random(seed)), 200))
    assert times == sorted(times)
    assert times[0] >= 0
    assert times == list(islice(process(text)(Random(seed)), 200))


BAD = ["", "6", "poisson", "poisson:0", "poisson:-1", "poisson:nan", "poisson:a", "gamma:1:0", "gamma:1:2:3", "even:0"]
BAD += [
    "mmpp:",
    "mmpp:1",
    "mmpp:0@5",
    "mmpp:1@0",
    "mmpp:inf@1",
    "diurnal:1",
    "diurnal:1:2",
    "diurnal:inf:0.5",
    "hours:",
]
BAD += [
    "hours:0,0",
    "hours:1,x",
    "hours:-1,3",
    "closed:0",
    "closed:x",
    "closed:2:never",
    "uniform:3",
    "diurnal:1:0.5:0",
]


@pytest.mark.parametrize("text", BAD)
def test_bad_arrivals_are_named(text: str) -> None:
    with pytest.raises(BadSetting, match=r"not a law|none of"):
        parse_arrivals(text)
