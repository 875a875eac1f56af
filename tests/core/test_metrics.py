"""Events in, numbers out: the intervals are those of the events' own clock."""

from __future__ import annotations

import pytest

from headrace.core.events import (
    Admitted,
    Arrived,
    Decoded,
    Drew,
    Finished,
    Planned,
    Preempted,
    Rejected,
    StepDone,
    Verified,
)
from headrace.core.metrics import Histogram, Metrics
from headrace.core.step import Decode, Run
from headrace.core.types import FinishReason, Usage


def life(metrics: Metrics) -> None:
    """Two requests that decode together, one of which is preempted for a while."""
    for name in ("a", "b"):
        metrics.observe(Arrived(0.0, name, 100, 8))
        metrics.observe(Admitted(1.0, name, 64, 1.0, again=False))
    metrics.observe(Planned(1.0, 0, 2, 72, 2, 0, 10, 100))
    metrics.observe(StepDone(2.0, 0, 1.0, 72, Run(1, 1.0), 10, 10.0))
    metrics.observe(Drew(2.0, ("a", "b"), (1, 1), ("a", "b")))
    metrics.observe(Drew(2.5, ("a", "b"), (1, 1), ()))
    metrics.observe(Preempted(2.5, "b", 101, "memory"))
    metrics.observe(Drew(2.75, ("a",), (2,), ()))
    metrics.observe(Verified(2.75, ("a",), (4,), (1,)))
    metrics.observe(Admitted(3.0, "b", 96, 0.5, again=True))
    metrics.observe(Drew(3.5, ("b",), (1,), ()))
    metrics.observe(Finished(2.75, "a", FinishReason.STOP, Usage(100, 4, 64), 0.0, 1.0, 2.0, 8))
    metrics.observe(Finished(3.5, "b", FinishReason.LENGTH, Usage(100, 3, 64, 1), 0.0, 1.0, 2.0, 8))


def test_counters() -> None:
    metrics = Metrics()
    life(metrics)
    metrics.observe(Rejected(4.0, "c", "full"))
    assert (metrics.prompt_tokens, metrics.output_tokens, metrics.preemptions) == (200, 7, 1)
    assert (metrics.prefix_queries, metrics.prefix_hits, metrics.rejected) == (200, 128, 1)
    assert (metrics.drafts, metrics.drafted_tokens, metrics.accepted_tokens) == (1, 4, 1)
    assert metrics.finished == {"stop": 1, "length": 1}


def test_inter_token_latency_is_between_two_draws_of_one_request() -> None:
    metrics = Metrics()
    life(metrics)
    gaps = metrics.histograms["inter_token_latency_seconds"]
    assert sum(gaps.counts) == 5  # a and b once together, a two tokens at once, b once after its preemption
    assert gaps.sum == 0.5 + 0.5 + 2 * (0.25 / 2) + 1.0


def test_intervals_of_a_request() -> None:
    metrics = Metrics()
    life(metrics)
    sums = {name: histogram.sum for name, histogram in metrics.histograms.items()}
    assert sums["time_to_first_token_seconds"] == 2.0 + 2.0
    assert sums["request_queue_time_seconds"] == 1.0 + 1.0
    assert sums["request_decode_time_seconds"] == 0.75 + 1.5
    assert sums["request_time_per_output_token_seconds"] == 0.75 / 3 + 1.5 / 2
    assert sums["e2e_request_latency_seconds"] == 2.75 + 3.5


def test_nothing_is_remembered_of_the_finished() -> None:
    metrics = Metrics()
    life(metrics)
    assert not metrics._prompts
    assert not metrics._last_token_s


def test_a_request_that_never_drew_has_no_first_token() -> None:
    metrics = Metrics()
    metrics.observe(Arrived(0.0, "a", 10, 8))
    metrics.observe(Finished(5.0, "a", FinishReason.DEADLINE, Usage(10, 0, 0), 0.0, None, None, 8))
    assert metrics.finished == {"deadline": 1}
    assert sum(metrics.histograms["time_to_first_token_seconds"].counts) == 0
    assert metrics.histograms["e2e_request_latency_seconds"].sum == 5.0


def test_a_histogram_counts_bounds_inclusively_and_cumulates() -> None:
    histogram = Histogram("", (1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 1)):
        histogram.add(value, times)
    assert list(histogram.cumulative()) == [("1.0", 3), ("2.0", 4), ("+Inf", 5)]
    assert histogram.sum == 13.0


def test_repetitions_count_as_if_they_were_told_one_by_one() -> None:
    run = Run(50, 0.02, 0.0013)
    ends = [run.until(steps) for steps in range(1, 51)]
    at_once, stepped = Metrics(), Metrics()
    for metrics in (at_once, stepped):
        metrics.observe(Drew(-0.5, ("a", "b"), (1, 1), ("a", "b")))
        metrics.observe(Drew(0.0, ("b",), (1,), ()))
    rows = (Decode("a", 7), Decode("b", 9), Decode("gone", 2))
    at_once.observe(StepDone(ends[-1], 3, ends[-1], 3, run, 7, 1.0))
    at_once.observe(Decoded(ends[-1], rows, (), 2, run))
    for begin, end in zip([0.0, *ends], ends, strict=False):
        stepped.observe(StepDone(end, 3, end - begin, 3, Run(1, end - begin), 7, 1.0))
        stepped.observe(Decoded(end, rows, (), 2, Run(1, end - begin)))
    assert at_once.output_tokens == stepped.output_tokens == 103
    for name, histogram in at_once.histograms.items():
        assert histogram.counts == stepped.histograms[name].counts, name
        assert histogram.sum == pytest.approx(stepped.histograms[name].sum, rel=1e-12)
    assert sum(at_once.histograms["inter_token_latency_seconds"].counts) == 101
    assert at_once._last_token_s == pytest.approx(stepped._last_token_s)
