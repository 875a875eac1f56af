"""Plots: scales that keep order and never divide by nothing, ticks that are round, pages that need nothing else."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.draw import page, plot
from headrace.draw.plot import Scale, even_ticks, value_scale


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.floats(1e-6, 1e9), st.floats(0, 0.9))
def test_ticks_are_round_few_and_inside(high: float, share: float) -> None:
    low = high * share
    ticks = even_ticks(low, high)
    assert 1 <= len(ticks) <= 9
    assert all(low - 1e-9 * high <= tick <= high * (1 + 1e-9) for tick in ticks)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=50))
def test_scales_keep_order_and_stay_inside(values: list[float]) -> None:
    scale = value_scale(values, 10.0, 110.0)
    placed = [scale(value) for value in sorted(values)]
    assert placed == sorted(placed)
    assert all(10 <= x <= 110 for x in placed)
    assert all(10 <= scale(tick) <= 110 for tick in scale.ticks())


def test_a_heavy_tail_gets_a_logarithmic_scale() -> None:
    assert value_scale([1.0, 1.0, 1.0, 100.0], 0, 1).log
    assert not value_scale([1.0, 2.0, 3.0], 0, 1).log
    assert Scale(1.0, 100.0, 0.0, 100.0, log=True)(10.0) == 50.0


def test_a_distribution_without_values_says_so() -> None:
    svg = plot.distribution("nothing", [[], []], "TTFT", 1.0)
    assert "no values" in [element.text for element in svg.iter("text")]


def test_what_others_wrote_is_escaped() -> None:
    root, main = page.document("<b>")
    page.figures(main, [("<script>", "&amp;")])
    page.table(main, [["a", "<i>"], ["b", "c"]])
    text = page.text_of(root)
    assert "<script>" not in text
    assert "<i>" not in text
    assert "&amp;amp;" in text
