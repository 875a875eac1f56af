"""The linear cost model: a + b T + c sum(L ctx) + d sum(ctx) + e rows, coefficients non-negative, fitted or given.

Vidur, DistServe and fleet-sim price steps by special cases of it. Knows the range it was fitted on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headrace.sim.cost.batch import Batch, CostModel, Line, StepCost
from headrace.sim.cost.fit import FEATURES, Range, Sample, checked, features, non_negative


@dataclass(frozen=True, slots=True)
class Linear:
    """seconds = step_s + token_s T + reach_s sum(L ctx) + context_s sum(ctx) + sampled_s rows.

    T counts all tokens, sum(L ctx) is over prefill rows, sum(ctx) over decode rows, rows are those sampled. Outside
    `measured` an estimate is marked, or with `strict` refused.
    """

    step_s: float
    token_s: float = 0.0
    reach_s: float = 0.0
    context_s: float = 0.0
    sampled_s: float = 0.0
    watts: float = 0.0  # drawn during a step
    measured: Range | None = None
    strict: bool = False

    def estimate(self, batch: Batch) -> StepCost:
        outside = self.measured is not None and self.measured.leaves(batch, self.strict)
        compute_s = self.token_s * batch.tokens + self.reach_s * batch.prefill_reach + self.sampled_s * batch.sampled
        memory_s = self.context_s * batch.full.decode_context
        seconds = self.step_s + compute_s + memory_s
        return StepCost(
            seconds,
            compute_s,
            memory_s,
            overhead_s=self.step_s,
            joules=self.watts * seconds,
            extrapolated=outside,
        )

    def line(self, batch: Batch, steps: int) -> Line:
        """Decode steps are one straight line; a strict model's ends where its range does."""
        slope = batch.full.growing
        if self.strict and self.measured is not None and slope:
            context = FEATURES.index("context")
            steps = min(steps, 1 + int((self.measured.high[context] - batch.full.decode_context) / slope))
        return Line(self.estimate(batch).seconds, self.context_s * slope, max(steps, 1))


def fit_linear(samples: Sequence[Sample], *, strict: bool = False) -> Linear:
    """Least squares on relative errors with non-negative coefficients. Raises BadSamples below five samples."""
    checked(samples, len(FEATURES))
    seconds = np.array([sample.seconds for sample in samples])
    matrix = np.array([features(sample.batch) for sample in samples]) / seconds[:, None]
    step_s, token_s, reach_s, context_s, sampled_s = map(float, non_negative(matrix, np.ones(len(samples))))
    return Linear(step_s, token_s, reach_s, context_s, sampled_s, measured=Range.of(samples), strict=strict)


@dataclass(frozen=True, slots=True)
class Regimes:
    """Two models: one for steps that only decode, one for all others. Products of few rows run other kernels."""

    decode: CostModel
    mixed: CostModel

    def estimate(self, batch: Batch) -> StepCost:
        return (self.decode if batch.tokens == batch.decodes else self.mixed).estimate(batch)

    def line(self, batch: Batch, steps: int) -> Line:
        return self.decode.line(batch, steps)


def fit_regimes(samples: Sequence[Sample], *, strict: bool = False) -> Regimes | Linear:
    """A linear model for each regime, or one for both when either has too few samples of its own."""
    decode = [sample for sample in samples if sample.batch.tokens == sample.batch.decodes]
    mixed = [sample for sample in samples if sample.batch.tokens != sample.batch.decodes]
    if min(len(decode), len(mixed)) < len(FEATURES):
        return fit_linear(samples, strict=strict)
    return Regimes(fit_linear(decode, strict=strict), fit_linear(mixed, strict=strict))
