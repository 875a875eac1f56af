"""What fitted cost models share: samples, the range they cover, non-negative least squares, cross-validation.

Pure functions of numbers that others measured. Errors are relative: a step of 1 ms counts like one of 1 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
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
    """The x >= 0 that minimises |matrix x - target|. Exact: tries every set of non-zero columns (at most a dozen).

    The optimum's own set is among them, and its unconstrained solution is non-negative and best.
    """
    columns = matrix.shape[1]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
    best, least = np.zeros(columns), float(target @ target)
    for size in range(1, columns + 1):
        for chosen in combinations(range(columns), size):
            some = list(chosen)
            found = np.linalg.lstsq(matrix[:, some] / scale[some], target, rcond=None)[0]
            if (found < 0).any():
                continue
            miss = matrix[:, some] @ (found / scale[some]) - target
            if float(miss @ miss) < least * (1 - 1e-12):
                best, least = np.zeros(columns), float(miss @ miss)
                best[some] = found / scale[some]
    return best


def relative_errors(model: CostModel, samples: Sequence[Sample]) -> list[float]:
    """(estimate - measured) / measured of every sample."""
    return [model.estimate(sample.batch).seconds / sample.seconds - 1 for sample in samples]


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors on steps the fit has not seen."""

    mean: float
    worst: float


def cross_validate(fit: Callable[[Sequence[Sample]], CostModel], samples: Sequence[Sample], folds: int = 5) -> Errors:
    """Fit on all folds but one, predict that one, in turn. Sample i belongs to fold i modulo `folds`."""
    misses: list[float] = []
    for fold in range(folds):
        held = [sample for i, sample in enumerate(samples) if i % folds == fold]
        rest = [sample for i, sample in enumerate(samples) if i % folds != fold]
        misses += map(abs, relative_errors(fit(rest), held))
    if not misses:
        raise BadSamples("There is nothing to cross-validate without samples.")
    return Errors(sum(misses) / len(misses), max(misses))
