"""Metric functions on made-up timestamps, where every number can be worked out by hand."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.client import Failure
from headrace.bench.metrics import Record, cumulative, is_good, percentile, spread, summarise, token_rate, values_of


def record(
    due_s: float = 0.0, times: tuple[float, ...] = (1.0, 1.5, 3.5), output: int | None = None, **other: object
) -> Record:
    values: dict[str, object] = {
        "index": 0, "due_s": due_s, "sent_s": due_s, "ended_s": times[-1] if times else due_s + 1.0, "lag_s": 0.0,
        "prompt_tokens": 10, "output_tokens": len(times) if output is None else output, "asked_tokens": 3,
        "cached_tokens": None, "token_times_s": times, "finish": "length",
    }  # fmt: skip
    return Record(**(values | other))  # type: ignore[arg-type]


def failed(ended_s: float = 2.0) -> Record:
    return record(0.0, (), ended_s=ended_s, failure=Failure("http 429", "full"))


def test_one_request_by_hand() -> None:
    one = record(0.5)
    assert (one.ttft_s, one.e2e_s, one.itl_s, one.max_itl_s) == (0.5, 3.0, (0.5, 2.0), 2.0)
    assert one.tpot_s == (3.0 - 0.5) / 2


def test_events_with_several_tokens_change_tpot_and_not_itl() -> None:
    one = record(0.5, output=6)
    assert one.tpot_s == (3.0 - 0.5) / 5
    assert one.itl_s == (0.5, 2.0)


def test_one_token_has_no_tpot_and_no_gap() -> None:
    one = record(times=(1.0,))
    assert one.tpot_s is None
    assert one.max_itl_s is None


def test_mean_tpot_and_longest_gap_prefer_different_servers() -> None:
    even, bursty = record(times=(1.0, 2.0, 3.0)), record(times=(1.0, 1.1, 2.9))
    assert (even.tpot_s or 0) > (bursty.tpot_s or 0)
    assert (even.max_itl_s or 0) < (bursty.max_itl_s or 0)
    assert not is_good(bursty, {"tpot": 1.0, "itl": 1.0})
    assert is_good(even, {"tpot": 1.0, "itl": 1.0})


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_percentiles_are_the_standard_librarys_inclusive_ones(values: list[float]) -> None:
    ordered = sorted(values)
    expected = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (1, 50, 90, 99):
        assert percentile(ordered, percent) == pytest.approx(expected[percent - 1], rel=1e-9, abs=1e-9)
    found = spread(values)
    assert found is not None
    assert found.p50 <= found.p90 <= found.p99 <= found.max == ordered[-1]
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-6)
    assert found.std == pytest.approx(statistics.pstdev(values), rel=1e-6, abs=1e-6)


def test_percentiles_of_one_value_and_of_none() -> None:
    assert percentile([7.0], 99) == 7.0
    assert spread([]) is None


def test_a_run_by_hand() -> None:
    records = [
        record(0.0, (1.0, 2.0), cached_tokens=4),
        record(1.0, (1.5, 2.0, 2.5, 4.0), cached_tokens=0, lag_s=0.25),
        failed(3.0),
    ]
    summary = summarise(records, {"ttft": 0.75})
    assert (summary.requests, summary.completed, summary.failures) == (3, 2, {"http 429": 1})
    assert (summary.prompt_tokens, summary.output_tokens, summary.cached_tokens, summary.short) == (20, 6, 4, 1)
    assert summary.duration_s == 4.0
    assert (summary.requests_per_s, summary.output_tokens_per_s, summary.total_tokens_per_s) == (0.5, 1.5, 6.5)
    assert (summary.good, summary.goodput_per_s, summary.goodput_fraction) == (1, 0.25, 1 / 3)
    ttft, itl, max_itl = (summary.spreads[name] for name in ("ttft", "itl", "max_itl"))
    assert ttft is not None and itl is not None and max_itl is not None
    assert (ttft.mean, ttft.max) == (0.75, 1.0)
    assert (itl.count, itl.mean, max_itl.mean) == (4, 3.5 / 4, 1.25)


def test_no_promise_no_goodput_and_no_answer_no_numbers() -> None:
    assert summarise([record()], {}).goodput_fraction is None
    nothing = summarise([failed()], {"ttft": 1.0})
    assert (nothing.completed, nothing.goodput_fraction, nothing.requests_per_s) == (0, 0.0, 0.0)
    assert set(nothing.spreads.values()) == {None}
    assert summarise([], {}).duration_s == 0.0


def test_goodput_needs_every_promise_and_an_answer() -> None:
    assert is_good(record(), {"ttft": 1.0, "tpot": 1.25, "itl": 2.0, "e2e": 3.5})
    for slo in ({"ttft": 0.99}, {"tpot": 1.2}, {"itl": 1.9}, {"e2e": 3.4}, {"ttft": 1.0, "e2e": 0.1}):
        assert not is_good(record(), slo)
    assert is_good(record(times=(1.0,)), {"tpot": 1e-9})
    assert not is_good(failed(), {})


def test_values_leave_failures_out() -> None:
    records = [record(), failed(), record(times=(1.0,))]
    assert values_of(records, "ttft") == [1.0, 1.0]
    assert values_of(records, "itl") == [0.5, 2.0]
    assert values_of(records, "tpot") == [1.25]


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=400), st.integers(2, 30))
def test_a_thinned_distribution_is_exact_where_it_is_drawn(values: list[int], points: int) -> None:
    drawn = cumulative(list(map(float, values)), points)
    assert len(drawn) <= points
    assert drawn[-1] == (max(values), 1.0)
    for value, share in drawn:
        assert share == sum(other <= value for other in values) / len(values)


def test_the_token_rate_adds_up_to_all_tokens() -> None:
    records = [record(0.0, (1.0, 2.0, 4.0), output=9), record(0.0, (0.5,), output=1), failed()]
    width_s, rates = token_rate(records, bins=8)
    assert width_s == 0.5
    assert sum(rates) * width_s == pytest.approx(10)
    assert rates[-1] * width_s == pytest.approx(3)
    assert token_rate([]) == (0.0, [])
