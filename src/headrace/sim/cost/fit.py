"""What fitted cost models share: samples, the range they cover, non-negative least squares, cross-validation.

Pure functions of numbers that others measured. Errors are relative: a step of 1 ms counts like one of 1 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from headrace.core.types import HeadraceError
from headrace.sim.cost.batch import Batch, CostModel, Extrapolated

Array = NDArray[np.float64]
T = TypeVar("T")


class BadSamples(HeadraceError):
    """Too few measurements, or impossible ones, to fit a model."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured step."""

    batch: Batch
    seconds: float


FEATURES = ("step", "tokens", "reach", "context", "sampled")


def features(batch: Batch) -> tuple[float, float, float, float, float]:
    """1, tokens, sum of tokens times context over prefill rows, sum of contexts over decode rows, sampled rows."""
    return 1.0, batch.tokens, batch.prefill_reach, batch.full.decode_context, float(batch.sampled)


@dataclass(frozen=True, slots=True)
class Range:
    """The box of features that was measured."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @staticmethod
    def of(samples: Sequence[Sample]) -> Range:
        columns = tuple(zip(*(features(sample.batch) for sample in samples), strict=True))
        return Range(tuple(map(min, columns)), tuple(map(max, columns)))

    def __contains__(self, batch: Batch) -> bool:
        return all(low <= x <= high for low, x, high in zip(self.low, features(batch), self.high, strict=True))

    def leaves(self, batch: Batch, strict: bool) -> bool:
        """Whether the batch lies outside; raises Extrapolated instead of saying yes when `strict`."""
        outside = batch not in self
        if outside and strict:
            which = [
                f"{name} {x:g} (measured {low:g} to {high:g})"
                for name, low, x, high in zip(FEATURES, self.low, features(batch), self.high, strict=True)
                if not low <= x <= high
            ]
            raise Extrapolated(f"The step is outside what was measured: {', '.join(which)}; calibrate with such steps.")
        return outside


def checked(samples: Sequence[Sample], least: int) -> None:
    """Raises BadSamples when there are fewer than `least`, or one took no time."""
    if len(samples) < least:
        raise BadSamples(f"{len(samples)} samples cannot fix {least} coefficients; measure at least {least} steps.")
    if not all(0 < sample.seconds < 1e6 for sample in samples):
        raise BadSamples("A sample took no time, or more than 11 days; its seconds must be positive.")


def non_negative(matrix: Array, target: Array) -> Array:
    """The x >= 0 that minimises |matrix x - target|: the active sets of Lawson and Hanson (1974), exact.

    Columns enter one by one, the steepest first; when one would turn negative, x stops where it is zero and it leaves.
    """
    columns = matrix.shape[1]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    scaled = matrix / scale
    x, inside = np.zeros(columns), np.zeros(columns, dtype=bool)
    for _ in range(10 * columns):
        slope = np.where(inside, -np.inf, scaled.T @ (target - scaled @ x))
        steepest = int(slope.argmax())
        if slope[steepest] <= 1e-11 * float(np.abs(target).sum()):
            break
        inside[steepest] = True
        x = _solved(scaled, target, x, inside)
    result: Array = x / scale
    return result


def _solved(matrix: Array, target: Array, x: Array, inside: NDArray[np.bool_]) -> Array:
    """Least squares over the columns `inside`, from which those leave that would be negative."""
    while True:
        found = np.zeros(len(x))
        found[inside] = np.linalg.lstsq(matrix[:, inside], target, rcond=None)[0]
        falling = inside & (found <= 0)
        if not falling.any():
            return found
        share = (x[falling] / np.maximum(x[falling] - found[falling], 1e-300)).min()
        x = np.where(inside, x + share * (found - x), 0.0)
        inside &= x > 1e-14
        x[~inside] = 0.0


def relative_errors(model: CostModel, samples: Sequence[Sample]) -> list[float]:
    """(estimate - measured) / measured of every sample."""
    return [model.estimate(sample.batch).seconds / sample.seconds - 1 for sample in samples]


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors on steps the fit has not seen, without their signs."""

    mean: float
    worst: float
    median: float = 0.0
    p90: float = 0.0


def cross_validate(fit: Callable[[Sequence[Sample]], CostModel], samples: Sequence[Sample], folds: int = 5) -> Errors:
    """Fit on all folds but one, predict that one, in turn. Sample i belongs to fold i modulo `folds`."""
    misses: list[float] = []
    for fold in range(folds):
        held = [sample for i, sample in enumerate(samples) if i % folds == fold]
        rest = [sample for i, sample in enumerate(samples) if i % folds != fold]
        misses += map(abs, relative_errors(fit(rest), held))
    if not misses:
        raise BadSamples("There is nothing to cross-validate without samples.")
    median, p90 = map(float, np.quantile(misses, (0.5, 0.9)))
    return Errors(sum(misses) / len(misses), max(misses), median, p90)
