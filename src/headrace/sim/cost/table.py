"""The table cost model: exactly what was measured where it was measured, interpolated in between.

A linear trend is fitted through all points, and what remains (the ratio of measured to trend) is interpolated by
inverse distance (Shepard, 1968), so scattered points will do. Outside the measured box it marks or refuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from headrace.sim.cost.batch import Batch, Line, StepCost
from headrace.sim.cost.fit import Range, Sample, features
from headrace.sim.cost.linear import fit_linear

POWER = 2.0  # of the squared distance: near points dominate, as the fourth power of their nearness


class Table:
    """Measured steps. Needs at least five, as the trend does; of repeated ones it keeps the mean ratio to the trend."""

    def __init__(self, samples: Sequence[Sample], *, strict: bool = False) -> None:
        self.trend = fit_linear(samples)
        self.measured = Range.of(samples)
        self.strict = strict
        ratios: dict[tuple[float, ...], list[float]] = {}
        for sample in samples:
            ratio = sample.seconds / self.trend.estimate(sample.batch).seconds
            ratios.setdefault(features(sample.batch), []).append(ratio)
        spread = np.array(self.measured.high) - np.array(self.measured.low)
        self._scale = np.where(spread > 0, spread, 1.0)
        self._points = np.array(list(ratios)) / self._scale
        self._ratios = np.array([sum(values) / len(values) for values in ratios.values()])

    def estimate(self, batch: Batch) -> StepCost:
        outside = self.measured.leaves(batch, self.strict)
        trend = self.trend.estimate(batch)
        away = self._points - np.array(features(batch)) / self._scale
        squared = np.einsum("ij,ij->i", away, away)
        nearest = int(squared.argmin())
        if squared[nearest] == 0.0:
            ratio = float(self._ratios[nearest])
        else:
            weights = (squared[nearest] / squared) ** POWER
            ratio = float(weights @ self._ratios / weights.sum())
        return StepCost(
            trend.seconds * ratio,
            trend.compute_s * ratio,
            trend.memory_s * ratio,
            overhead_s=trend.overhead_s * ratio,
            extrapolated=outside,
        )

    def line(self, batch: Batch, steps: int) -> Line:
        """One step: between measured points nothing is straight."""
        return Line(self.estimate(batch).seconds, 0.0, 1)
