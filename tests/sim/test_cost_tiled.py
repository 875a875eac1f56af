"""The tiled model: padding, pieces, fitting its own law back, straight lines, and what it says outside its range."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.sim.cost.batch import Batch, Extrapolated, batch_of
from headrace.sim.cost.fit import BadSamples, Sample, cross_validate, relative_errors
from headrace.sim.cost.linear import fit_regimes
from headrace.sim.cost.tiled import Sizes, Tiled, fit_tiled

SIZES = Sizes((4, 8, 16, 24, 32, 64, 128, 256))
COEFFICIENTS = (0.07, 0.004, 0.015, 0.002, 3e-3, 1.5e-3, 1.7e-3, 2e-3, 4e-4, 5e-4, 4e-6, 3e-5, 1e-3, 2e-6, 3e-8)
LAW = Tiled(SIZES, COEFFICIENTS)


def steps(count: int, seed: int) -> list[Batch]:
    rng, out = random.Random(seed), []
    for i in range(count):
        rows = [(rng.randrange(10, 600), 1) for _ in range(rng.choice([1, 2, 4, 7, 16, 20, 32]))] if i % 3 else []
        if i % 3 != 1:
            rows += [(rng.choice([0, 0, 128, 300]), rng.randrange(2, 300)) for _ in range(rng.randrange(1, 3))]
        out.append(batch_of(rows, rng.choice([len(rows), 0])))
    return out


def measured(count: int, seed: int, noise: float = 0.0) -> list[Sample]:
    rng = random.Random(seed)
    return [Sample(batch, LAW.estimate(batch).seconds * rng.gauss(1, noise)) for batch in steps(count, seed)]


def test_rows_are_padded_to_the_sizes_and_beyond_to_multiples_of_the_largest() -> None:
    padded = {0: 0, 1: 4, 4: 4, 5: 8, 33: 64, 256: 256, 257: 512, 600: 768, 2.5: 4}
    assert {count: SIZES.padded(count) for count in padded} == padded
    assert [Sizes().padded(count) for count in (0, 3, 777)] == [0, 3, 777]


@given(st.integers(0, 2000))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_pieces_add_up_to_the_padded_rows(count: int) -> None:
    for sizes in (SIZES, Sizes()):
        pieces = sizes.pieces(count)
        assert sum(pieces) == max(0, sizes.padded(count) - sizes.knots[0])
        assert len(pieces) == len(sizes.knots) and min(pieces) >= 0
    assert SIZES.knots == (4, 16, 64, 256)


def test_terms_have_names_and_add_up() -> None:
    assert len(SIZES.terms) == len(COEFFICIENTS)
    for batch in steps(20, 3):
        cost = LAW.estimate(batch)
        assert cost.compute_s + cost.memory_s + cost.overhead_s == pytest.approx(cost.seconds)


def test_a_fit_finds_the_law_that_made_the_steps() -> None:
    found = fit_tiled(measured(90, 1), SIZES)
    assert max(map(abs, relative_errors(found, measured(200, 2)))) < 1e-6
    assert min(found.coefficients) >= 0


def test_with_noise_it_predicts_better_than_straight_lines_do() -> None:
    samples = measured(120, 1, noise=0.02)
    tiled = cross_validate(lambda some: fit_tiled(some, SIZES), samples, 10)
    assert tiled.median <= tiled.mean < 0.04 and tiled.p90 <= tiled.worst
    assert cross_validate(fit_regimes, samples, 10).mean > 1.5 * tiled.mean


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(BadSamples, match="measure at least 15 steps"):
        fit_tiled(measured(14, 1), SIZES)


@given(st.lists(st.integers(1, 900), min_size=1, max_size=8), st.integers(1, 60))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_a_line_is_what_stepping_costs(starts: list[int], count: int) -> None:
    batch = batch_of([(start, 1) for start in starts], len(starts))
    line = LAW.line(batch, count)
    assert line.steps == count
    each = sum(LAW.estimate(batch.advanced(at)).seconds for at in range(count))
    assert line.total_s(count) == pytest.approx(each)


def test_outside_what_was_measured_it_marks_or_refuses() -> None:
    samples = measured(60, 1)
    outside = batch_of([(100_000, 1)], 1)
    assert fit_tiled(samples, SIZES).estimate(outside).extrapolated
    assert not fit_tiled(samples, SIZES).estimate(samples[5].batch).extrapolated
    strict = fit_tiled(samples, SIZES, strict=True)
    with pytest.raises(Extrapolated, match="calibrate with such steps"):
        strict.estimate(outside)
    inside = batch_of([(500, 1)] * 4, 4)
    last = inside.advanced(strict.line(inside, 100_000).steps - 1)
    strict.estimate(last)
    with pytest.raises(Extrapolated):
        strict.estimate(last.advanced(1))
