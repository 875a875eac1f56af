"""Distributions and courses over time in bounded memory, exact where that costs nothing. They merge, so replicas and
processes may count apart.

A `Sketch` counts values in buckets whose bounds grow by a constant factor (DDSketch, Masson et al., VLDB 2019): a
quantile is off by at most RELATIVE_ERROR of itself; count, sum, least and greatest are exact. A `Course` keeps the
greatest value per interval and doubles the interval when it has too many.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, inf, log

from headrace.core.step import Run

RELATIVE_ERROR = 0.005
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_PER_E = 1 / log(_GAMMA)
_LEAST = 1e-9  # values below count as this; with the greatest below 1e18 there are at most 6,300 buckets
INTERVALS = 512  # of a course, at most twice as many before they are joined


@dataclass(slots=True)
class Sketch:
    count: int = 0
    sum: float = 0.0
    least: float = inf
    greatest: float = -inf
    buckets: dict[int, int] = field(default_factory=dict)

    def add(self, value: float, times: int = 1) -> None:
        if not times:
            return
        self.count += times
        self.sum += value * times
        if value < self.least:
            self.least = value
        if value > self.greatest:
            self.greatest = value
        bucket = _bucket(value)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + times

    def add_run(self, run: Run, times: int = 1) -> None:
        """`times` of each of the durations of a run: as many additions as buckets it passes through."""
        while run.steps and times:
            stretch = _stretch(run)
            last = run.first_s + (stretch - 1) * run.slope_s
            self.add(run.first_s, times)
            if stretch > 1:
                self.add(last, times)
                self.count += (stretch - 2) * times
                self.buckets[_bucket(run.first_s)] += (stretch - 2) * times
                self.sum += (run.until(stretch) - run.first_s - last) * times
            run = run.after(stretch)

    def merge(self, other: Sketch) -> None:
        self.count += other.count
        self.sum += other.sum
        self.least = min(self.least, other.least)
        self.greatest = max(self.greatest, other.greatest)
        for bucket, times in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + times

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The value that this share of all values does not exceed; None if there are none."""
        if not self.count:
            return None
        rank, seen = max(1, ceil(share * self.count)), 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                break
        middle = 2 * _GAMMA**bucket / (_GAMMA + 1)
        return min(max(middle, self.least), self.greatest)


def _bucket(value: float) -> int:
    """Bucket i holds (gamma^(i-1), gamma^i]."""
    return ceil(log(value if value > _LEAST else _LEAST) * _PER_E)


def _stretch(run: Run) -> int:
    """How many durations from the first on share its bucket."""
    bucket = _bucket(run.first_s)
    if not run.slope_s or _bucket(run.first_s + (run.steps - 1) * run.slope_s) == bucket:
        return run.steps
    low, high = 1, run.steps
    while low < high:
        middle = (low + high + 1) // 2
        inside = _bucket(run.first_s + (middle - 1) * run.slope_s) == bucket
        low, high = (middle, high) if inside else (low, middle - 1)
    return low


@dataclass(slots=True)
class Course:
    """The greatest value in each interval of `interval_s` from time 0 on, by number of the interval."""

    interval_s: float = 0.125
    greatest: dict[int, float] = field(default_factory=dict)

    def add(self, at_s: float, value: float) -> None:
        at = int(at_s / self.interval_s)
        if value > self.greatest.get(at, -inf):
            self.greatest[at] = value
            if len(self.greatest) > 2 * INTERVALS:
                self._coarsen()

    def merge(self, other: Course) -> None:
        """The sum of two courses at about the same time, for replicas side by side."""
        while self.interval_s < other.interval_s:
            self._coarsen()
        while other.interval_s < self.interval_s:
            other._coarsen()
        for at, value in other.greatest.items():
            self.greatest[at] = self.greatest.get(at, 0.0) + value

    def points(self) -> list[tuple[float, float]]:
        """(start of the interval in seconds, value), in order."""
        return [(at * self.interval_s, value) for at, value in sorted(self.greatest.items())]

    def _coarsen(self) -> None:
        fine, self.greatest = self.greatest, {}
        self.interval_s *= 2
        for at, value in fine.items():
            self.greatest[at // 2] = max(value, self.greatest.get(at // 2, -inf))
