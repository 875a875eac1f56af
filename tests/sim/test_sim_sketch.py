"""Distributions and courses against all their values."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.step import Run
from headrace.sim.sketch import INTERVALS, RELATIVE_ERROR, Course, Sketch

values = st.lists(st.tuples(st.floats(1e-8, 1e9), st.integers(1, 5)), min_size=1, max_size=1500)
QUICK = settings(derandomize=True, deadline=None, max_examples=40)


@QUICK
@given(values, st.floats(0.0, 1.0))
def test_quantiles_are_within_the_stated_error(pairs: list[tuple[float, int]], share: float) -> None:
    sketch = Sketch()
    for value, times in pairs:
        sketch.add(value, times)
    everything = sorted(value for value, times in pairs for _ in range(times))
    exact = everything[max(1, math.ceil(share * len(everything))) - 1]
    assert sketch.quantile(share) == pytest.approx(exact, rel=RELATIVE_ERROR * 1.0001)
    assert (sketch.count, sketch.least, sketch.greatest) == (len(everything), everything[0], everything[-1])
    assert sketch.mean == pytest.approx(math.fsum(everything) / len(everything))


@QUICK
@given(values, values)
def test_two_halves_make_a_whole(left: list[tuple[float, int]], right: list[tuple[float, int]]) -> None:
    whole, first, second = Sketch(), Sketch(), Sketch()
    for part, pairs in ((first, left), (second, right)):
        for value, times in pairs:
            part.add(value, times)
            whole.add(value, times)
    first.merge(Sketch.of(second.state()))
    *sums, buckets = first.state()
    assert sums == pytest.approx(whole.state()[:-1])
    assert buckets == whole.state()[-1]


@QUICK
@given(st.integers(1, 3000), st.floats(1e-4, 1.0), st.floats(-1.0, 1.0), st.integers(1, 9))
def test_a_run_counts_as_its_durations(steps: int, first_s: float, slope: float, times: int) -> None:
    run = Run(steps, first_s, slope * first_s / steps * 0.9)
    at_once, stepped = Sketch(), Sketch()
    at_once.add_run(run, times)
    for step in range(steps):
        stepped.add(run.first_s + step * run.slope_s, times)
    *sums, buckets = at_once.state()
    assert sums == pytest.approx(stepped.state()[:-1])
    assert sum(buckets.values()) == steps * times
    for share in (0.01, 0.5, 0.99):
        assert at_once.quantile(share) == pytest.approx(stepped.quantile(share), rel=2.1 * RELATIVE_ERROR)


def test_an_empty_sketch_knows_nothing() -> None:
    assert Sketch().mean is None
    assert Sketch().quantile(0.5) is None


@QUICK
@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 100)), min_size=1, max_size=3000))
def test_a_course_shows_the_greatest_of_each_interval(points: list[tuple[float, float]]) -> None:
    course = Course()
    for at_s, value in sorted(points):
        course.add(at_s, value)
    shown = course.points()
    assert len(shown) <= 2 * INTERVALS
    assert max(value for _, value in shown) == max(value for _, value in points)
    for start_s, value in shown:
        inside = [one for at_s, one in points if start_s <= at_s < start_s + course.interval_s]
        assert value == max(inside)


def test_courses_side_by_side_add_up() -> None:
    fine, coarse = Course(0.125), Course(0.5)
    for step in range(16):
        fine.add(step / 8, step)
        coarse.add(step / 8, 1.0)
    fine.merge(coarse)
    assert fine.points() == [(0.0, 4.0), (0.5, 8.0), (1.0, 12.0), (1.5, 16.0)]
    assert Course.of(fine.state()).points() == fine.points()


def test_points_are_the_distribution_function() -> None:
    sketch = Sketch()
    for value in (3.0, 1.0, 2.0, 2.0):
        sketch.add(value)
    points = sketch.points()
    assert [share for _, share in points] == [0.25, 0.75, 1.0]
    assert [value for value, _ in points] == pytest.approx([1.0, 2.0, 3.0], rel=0.011)
    assert Sketch().points() == []
