"""The tiled cost model: a step as the kernels run it. Matrix products take a few row counts only, and what lies between
is padded to the next; paged attention walks over tiles of keys, as often as the longest context needs.

    seconds = launches + products(padded rows) + head(padded sampled rows) + attention of decodes + of prefills

Every coefficient is a cost of something and so not negative; fitted to measured steps, it knows the range of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from headrace.sim.cost.batch import Batch, Line, StepCost
from headrace.sim.cost.fit import FEATURES, Range, Sample, checked, non_negative

LAUNCHES = ("step", "head", "prefill", "decode")  # seconds of a step, and of one that samples, prefills, decodes
DECODE = ("decode row", "decode key", "longest key")
PREFILL = ("prefill row", "prefill key", "prefill pair")
_KNOT = 4  # the price of a row changes at most where the row count has grown so many times


@dataclass(frozen=True, slots=True)
class Sizes:
    """The row counts that kernels are called with, ascending; beyond the last, its multiples. None: any count."""

    rows: tuple[int, ...] = ()
    knots: tuple[int, ...] = field(init=False)  # where the price of one more row may change

    def __post_init__(self) -> None:
        knots = [self.rows[0] if self.rows else 1]
        for rows in self.rows or (4, 16, 64, 256):
            if rows >= _KNOT * knots[-1]:
                knots.append(rows)
        object.__setattr__(self, "knots", tuple(knots))

    def padded(self, count: float) -> float:
        if not self.rows or not count:
            return count
        largest = self.rows[-1]
        return -(-ceil(count) // largest) * largest if count > largest else self.rows[bisect_left(self.rows, count)]

    def pieces(self, count: float) -> list[float]:
        """Rows beyond the first knot, cut at the others."""
        padded, ends = self.padded(count), (*self.knots[1:], float("inf"))
        return [min(max(padded - low, 0.0), high - low) for low, high in zip(self.knots, ends, strict=True)]

    @property
    def terms(self) -> tuple[str, ...]:
        """What the coefficients are the seconds of, in order."""
        return (*LAUNCHES, *(f"row after {knot}" for knot in self.knots), "sampled row", *DECODE, *PREFILL)


def terms(batch: Batch, sizes: Sizes) -> list[float]:
    """How much of each term a step has."""
    full, prefills = batch.full, batch.rows - batch.decodes
    return [
        1.0,
        float(batch.sampled > 0),
        float(prefills > 0),
        float(batch.decodes > 0),
        *sizes.pieces(batch.tokens),
        sizes.padded(batch.sampled),
        batch.decodes,
        full.decode_context,
        batch.longest,
        prefills,
        full.prefill_context,
        full.pairs,
    ]


@dataclass(frozen=True, slots=True)
class Tiled:
    """`coefficients` are seconds of `sizes.terms`. Outside `measured` an estimate is marked, with `strict` refused."""

    sizes: Sizes
    coefficients: tuple[float, ...]
    measured: Range | None = None
    strict: bool = False

    def estimate(self, batch: Batch) -> StepCost:
        outside = self.measured is not None and self.measured.leaves(batch, self.strict)
        parts = [price * amount for price, amount in zip(self.coefficients, terms(batch, self.sizes), strict=True)]
        first, last = len(LAUNCHES), len(parts) - len(DECODE) - len(PREFILL)
        overhead_s, pairs_s = sum(parts[:first]), parts[-1]
        compute_s, memory_s = sum(parts[first:last]) + pairs_s, sum(parts[last:]) - pairs_s
        seconds = overhead_s + compute_s + memory_s
        return StepCost(seconds, compute_s, memory_s, overhead_s=overhead_s, extrapolated=outside)

    def line(self, batch: Batch, steps: int) -> Line:
        """Decode steps are one straight line; a strict model's ends where its range does."""
        growing = batch.full.growing
        if self.strict and self.measured is not None and growing:
            most = self.measured.high[FEATURES.index("context")]
            steps = min(steps, 1 + int((most - batch.full.decode_context) / growing))
        first = len(self.coefficients) - len(DECODE) - len(PREFILL)
        _, key_s, longest_s = self.coefficients[first : first + len(DECODE)]
        return Line(self.estimate(batch).seconds, key_s * growing + longest_s * (batch.longest > 0), max(steps, 1))


def fit_tiled(samples: Sequence[Sample], sizes: Sizes, *, strict: bool = False) -> Tiled:
    """Least squares on relative errors with non-negative coefficients. Raises BadSamples when there are fewer samples
    than coefficients."""
    checked(samples, len(sizes.terms))
    seconds = np.array([sample.seconds for sample in samples])
    matrix = np.array([terms(sample.batch, sizes) for sample in samples]) / seconds[:, None]
    found = non_negative(matrix, np.ones(len(samples)))
    return Tiled(sizes, tuple(map(float, found)), Range.of(samples), strict)
