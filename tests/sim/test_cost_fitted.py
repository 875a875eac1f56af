import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, CostModel, Extrapolated, batch_of
from headrace.sim.cost.conventions import IDEAL
from headrace.sim.cost.fewshot import FewShot, Prior, fit_few, learn_prior, reference_batches
from headrace.sim.cost.fit import BadSamples, Sample, cross_validate, non_negative, relative_errors
from headrace.sim.cost.idealized import Idealized, fit_idealized
from headrace.sim.cost.linear import Linear, Regimes, fit_linear, fit_regimes
from headrace.sim.cost.placement import Placement
from headrace.sim.cost.table import Table
from headrace.sim.hardware import Device, Topology, device
from headrace.sim.models import model

TRUE = Linear(2e-3, 5e-5, 1e-9, 3e-8, 1e-4)


def steps(count: int, seed: int) -> list[Batch]:
    """Steps of every kind a server sees: decodes, prefills, both."""
    rng, out = random.Random(seed), []
    for i in range(count):
        rows = [(rng.randrange(10, 4000), 1) for _ in range(rng.randrange(1, 33))] if i % 3 else []
        if i % 3 != 1:
            rows.append((rng.choice([0, 0, 512, 1024]), rng.randrange(2, 1024)))
        out.append(batch_of(rows, len(rows)))
    return out


def measure(truth: CostModel, batches: Sequence[Batch], noise: float = 0.0, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [Sample(batch, truth.estimate(batch).seconds * rng.gauss(1, noise)) for batch in batches]


# ------------------------------------------------------------------------------------------------- least squares


@given(st.lists(st.floats(0, 5), min_size=4, max_size=4), st.integers(0, 1000))
@settings(max_examples=50, derandomize=True, deadline=None)
def test_least_squares_finds_what_made_the_numbers_and_nothing_better_is_near(truth: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.uniform(0.1, 1, (12, 4))
    found = non_negative(matrix, matrix @ np.array(truth))
    assert found == pytest.approx(truth, abs=1e-6)
    target = rng.uniform(-1, 1, 12)
    found = non_negative(matrix, target)
    least = np.linalg.norm(matrix @ found - target)
    for _ in range(20):
        nearby = np.maximum(0, found + rng.normal(0, 0.05, 4))
        assert np.linalg.norm(matrix @ nearby - target) >= least - 1e-9
    assert (found >= 0).all()


# ------------------------------------------------------------------------------------------------------- linear


def test_a_linear_fit_finds_the_coefficients_that_made_the_steps() -> None:
    found = fit_linear(measure(TRUE, steps(30, 1)))
    for name in ("step_s", "token_s", "reach_s", "context_s", "sampled_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-6), name


def test_noise_costs_little_and_cross_validation_says_how_much() -> None:
    samples = measure(TRUE, steps(30, 1), noise=0.03, seed=5)
    errors = cross_validate(fit_linear, samples)
    assert 0.01 < errors.mean < 0.06 and errors.mean <= errors.worst < 0.2
    fresh = relative_errors(fit_linear(samples), measure(TRUE, steps(50, 2)))
    assert max(map(abs, fresh)) < 0.08


def test_coefficients_are_never_negative() -> None:
    samples = [Sample(batch, 0.01 / (1 + batch.tokens / 100)) for batch in steps(30, 3)]
    found = fit_linear(samples)
    assert min(found.step_s, found.token_s, found.reach_s, found.context_s, found.sampled_s) >= 0


def test_a_linear_line_is_exact_and_terms_add_up() -> None:
    batch = batch_of([(10, 1), (500, 1)], 2)
    line = TRUE.line(batch, 1000)
    assert line.steps == 1000
    for i in (0, 1, 999):
        assert line.first_s + i * line.slope_s == pytest.approx(TRUE.estimate(batch.advanced(i)).seconds)
    cost = replace(TRUE, watts=50).estimate(batch)
    assert cost.compute_s + cost.memory_s + cost.overhead_s == pytest.approx(cost.seconds)
    assert cost.joules == pytest.approx(50 * cost.seconds) and cost.bound == "overhead"


FITS: dict[str, Callable[[Sequence[Sample], bool], CostModel]] = {
    "linear": lambda samples, strict: fit_linear(samples, strict=strict),
    "table": lambda samples, strict: Table(samples, strict=strict),
    "few": lambda samples, strict: fit_few(TRUE, samples, strict=strict),
}


@pytest.mark.parametrize("kind", FITS)
def test_outside_the_measured_range_an_estimate_is_marked_or_refused(kind: str) -> None:
    samples = measure(TRUE, steps(30, 1))
    inside, outside = samples[4].batch, batch_of([(10**6, 1)], 1)
    marked = FITS[kind](samples, False)
    assert not marked.estimate(inside).extrapolated and marked.estimate(outside).extrapolated
    strict = FITS[kind](samples, True)
    assert strict.estimate(inside).seconds == marked.estimate(inside).seconds
    with pytest.raises(Extrapolated, match=r"context 1e\+06 \(measured 0 to"):
        strict.estimate(outside)


@pytest.mark.parametrize("kind", FITS)
def test_a_strict_line_stays_inside_what_was_measured(kind: str) -> None:
    samples = [Sample(batch_of([(start, 1)] * 4, 4), 0.01 + start * 1e-6) for start in range(100, 1100, 100)]
    strict, batch = FITS[kind](samples, True), batch_of([(950, 1)] * 4, 4)
    line = strict.line(batch, 500)
    assert 1 <= line.steps <= 51
    strict.estimate(batch.advanced(line.steps - 1))


def test_too_few_or_impossible_samples_are_refused() -> None:
    samples = measure(TRUE, steps(4, 1))
    with pytest.raises(BadSamples, match="at least 5"):
        fit_linear(samples)
    with pytest.raises(BadSamples, match="positive"):
        fit_linear([*samples, Sample(samples[0].batch, 0.0)])
    with pytest.raises(BadSamples, match="without samples"):
        cross_validate(fit_linear, [], folds=0)


def test_two_regimes_are_fitted_apart_and_chosen_by_the_batch() -> None:
    decode, mixed = replace(TRUE, step_s=9e-3, token_s=4e-4), TRUE
    truth = Regimes(decode, mixed)
    samples = measure(truth, steps(60, 1))
    both, one = fit_regimes(samples), fit_linear(samples)
    held = measure(truth, steps(30, 9))
    assert max(map(abs, relative_errors(both, held))) < 1e-6 < max(map(abs, relative_errors(one, held)))
    assert isinstance(fit_regimes(samples[:6]), Linear)
    assert both.line(batch_of([(10, 1)], 1), 50).steps == 50


# -------------------------------------------------------------------------------------------------------- table


def roofline(chip: str = "A100-80GB") -> Analytic:
    return Analytic(Placement(model("llama-3.1-8b"), Topology(device(chip), 1)), host_s=1e-3)


def test_a_table_gives_back_what_it_was_given() -> None:
    samples = measure(roofline(), steps(30, 1), noise=0.05)
    assert max(map(abs, relative_errors(Table(samples), samples))) < 1e-9


def test_a_table_is_closer_than_its_trend_between_points() -> None:
    samples, held = measure(roofline(), steps(150, 1)), measure(roofline(), steps(60, 2))
    table, trend = Table(samples), fit_linear(samples)
    errors = [float(np.mean(np.abs(relative_errors(model, held)))) for model in (table, trend)]
    assert errors[0] < errors[1] and errors[0] < 0.05


def test_repeated_points_are_averaged_and_lines_are_single_steps() -> None:
    samples = measure(TRUE, steps(20, 1))
    twice = [*samples, Sample(samples[3].batch, samples[3].seconds * 1.2)]
    table = Table(twice)
    assert table.estimate(samples[3].batch).seconds == pytest.approx(1.1 * samples[3].seconds)
    assert table.line(batch_of([(5, 1)], 1), 10).steps == 1


# ------------------------------------------------------------------------------------------------------ few-shot


class Silicon:
    """A device nobody wrote a roofline for: its own shares of both peaks, a knee, and a launch time."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        chip = Device(
            f"chip-{seed}", "gpu", 10 ** rng.uniform(13.5, 15), 80e9, 10 ** rng.uniform(11.5, 12.7), max_w=300.0
        )
        self.roofline = Analytic(Placement(model("llama-3.1-8b"), Topology(chip, 1)), IDEAL)
        self.compute, self.memory = 1 / rng.uniform(0.35, 0.85), 1 / rng.uniform(0.5, 0.9)
        self.launch_s, self.knee = rng.uniform(2e-4, 8e-3), rng.uniform(16, 64)

    def estimate(self, batch: Batch) -> float:
        cost = self.roofline.estimate(batch)
        small = 1 + 0.3 / (1 + batch.tokens / self.knee)  # little work fills few units
        return self.compute * small * cost.compute_s + self.memory * cost.memory_s + self.launch_s


def silicon_samples(chip: Silicon, batches: Sequence[Batch], seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [Sample(batch, chip.estimate(batch) * rng.gauss(1, 0.02)) for batch in batches]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def test_ten_samples_and_thirty_known_devices_predict_unseen_ones() -> None:
    """HELP's claim: on 10 unseen devices, 10 samples each, rank correlation >= 0.95 and half the blind error."""
    ten = reference_batches()
    assert len(ten) == 10
    known = [fit_few(chip.roofline, silicon_samples(chip, ten)) for chip in map(Silicon, range(30))]
    prior = learn_prior(known)
    seen = [(batch, [Silicon(s).estimate(batch) for s in range(30)]) for batch in steps(60, 2)]
    blind = [sum(values) / len(values) for _, values in seen]  # the mean over known devices, whatever the device
    ours, theirs, ranks = [], [], []
    for chip in map(Silicon, range(30, 40)):
        model_ = fit_few(chip.roofline, silicon_samples(chip, ten, seed=1), prior)
        truth = [chip.estimate(batch) for batch, _ in seen]
        guesses = [model_.estimate(batch).seconds for batch, _ in seen]
        ours += [abs(g / t - 1) for g, t in zip(guesses, truth, strict=True)]
        theirs += [abs(g / t - 1) for g, t in zip(blind, truth, strict=True)]
        ranks.append(spearman(guesses, truth))
    assert min(ranks) >= 0.95
    assert np.mean(ours) < 0.05 and np.mean(ours) < np.mean(theirs) / 2


def test_a_prior_speaks_where_samples_are_silent() -> None:
    """One measured decode says nothing about arithmetic; other devices do. (Two well-chosen samples need no prior.)"""
    ten = reference_batches()
    prior = learn_prior([fit_few(c.roofline, silicon_samples(c, ten)) for c in map(Silicon, range(30))])
    held = steps(40, 3)
    errors: dict[str, list[float]] = {"prior": [], "neutral": []}
    for chip in map(Silicon, range(30, 40)):
        one = silicon_samples(chip, ten[:1], seed=2)
        for name, belief in (("prior", prior), ("neutral", Prior())):
            fitted = fit_few(chip.roofline, one, belief)
            errors[name] += [abs(fitted.estimate(b).seconds / chip.estimate(b) - 1) for b in held]
    assert np.mean(errors["prior"]) < 0.8 * np.mean(errors["neutral"])


def test_without_surprises_the_roofline_is_left_alone() -> None:
    base = roofline()
    fitted = fit_few(base, measure(base, reference_batches()))
    for batch in steps(20, 4):
        assert fitted.estimate(batch).seconds == pytest.approx(base.estimate(batch).seconds, rel=0.02)


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=5), st.integers(1, 2000))
@settings(max_examples=60, derandomize=True, deadline=None)
def test_a_few_shot_line_is_what_stepping_costs(starts: list[int], count: int) -> None:
    fitted = FewShot(roofline(), (1.5, 1.2, 1.0, 0.8, 1e-3))
    batch = batch_of([(start, 1) for start in starts], len(starts))
    line = fitted.line(batch, count)
    for i in {0, line.steps // 2, line.steps - 1}:
        stepped = fitted.estimate(batch.advanced(i)).seconds
        assert line.first_s + i * line.slope_s == pytest.approx(stepped, rel=1e-9)


# ----------------------------------------------------------------------------------------------------- idealized


def test_an_idealized_fit_predicts_runs_it_has_not_seen() -> None:
    """T(p, o) = F(p) + g (o - 1) from twelve runs of a roofline: held-out median error below 10 %, R2 above 0.99."""
    base = roofline()

    def run(prompt: int, output: int) -> tuple[int, int, float]:
        first = base.estimate(batch_of([(0, prompt)], 1)).seconds
        return prompt, output, first + base.line(batch_of([(prompt, 1)], 1), output).total_s(output - 1)

    fitted = fit_idealized([run(p, o) for p in (32, 256, 512, 1024) for o in (1, 8, 64)])
    held = [run(p, o) for p in (64, 128, 384, 700, 900) for o in (4, 32)]
    guesses = [fitted.runtime_s(p, o) for p, o, _ in held]
    errors = [abs(guess / seconds - 1) for guess, (_, _, seconds) in zip(guesses, held, strict=True)]
    assert float(np.median(errors)) < 0.10
    truth = np.array([seconds for _, _, seconds in held])
    assert 1 - float(((truth - guesses) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()) > 0.99


def test_the_prompt_curve_is_piecewise_linear_and_marked_beyond_its_knots() -> None:
    curve = Idealized((100, 200, 400), (1.0, 2.0, 3.0), 0.1)
    assert [curve.first_token_s(p) for p in (100, 150, 300, 400, 600)] == pytest.approx([1.0, 1.5, 2.5, 3.0, 4.0])
    assert curve.runtime_s(200, 11) == pytest.approx(3.0)
    prefill, decode = curve.estimate(batch_of([(0, 150)], 1)), curve.estimate(batch_of([(7, 1)] * 9, 9))
    assert (prefill.seconds, prefill.extrapolated) == (pytest.approx(1.5), False)
    assert curve.estimate(batch_of([(0, 500)], 1)).extrapolated
    assert decode.seconds == 0.1 and curve.line(batch_of([(7, 1)], 1), 9).total_s(9) == pytest.approx(0.9)
    assert curve.estimate(batch_of([(0, 150), (7, 1)], 2)).seconds == pytest.approx(1.6)
    assert Idealized((64,), (0.5,), 0.1).first_token_s(1000) == 0.5


def test_idealized_fits_that_cannot_be_are_refused() -> None:
    with pytest.raises(BadSamples, match="two output lengths"):
        fit_idealized([(10, 1, 1.0), (20, 1, 2.0)])
    with pytest.raises(BadSamples, match="at most 11"):
        fit_idealized([(p, o, 1.0) for p in range(1, 13) for o in (1, 2)])
