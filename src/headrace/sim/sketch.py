"""Distributions and courses over time in bounded memory, exact where that costs nothing. They merge, so replicas and
processes may count apart.

A `Sketch` counts values in buckets whose bounds grow by a constant factor (DDSketch, Masson et al., VLDB 2019): a
quantile is off by at most RELATIVE_ERROR of itself; count, sum, least and greatest are exact. A `Course` keeps the
greatest value per interval and doubles the interval when it has too many.
"""

from __future__ import annotations

from math import ceil, inf, log

import numpy as np

from headrace.core.step import Run

RELATIVE_ERROR = 0.005
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_PER_E = 1 / log(_GAMMA)
_LEAST = 1e-9  # values below count as this; with the greatest below 1e18 there are at most 6,300 buckets
_AT_ONCE = 512  # values counted at a time
INTERVALS = 512  # of a course, at most twice as many before they are joined


class Sketch:
    """Values are kept as they come and counted many at a time, because counting one costs more than all the rest."""

    __slots__ = ("_buckets", "_count", "_greatest", "_least", "_sum", "_times", "_values")

    def __init__(self) -> None:
        self._count = 0
        self._sum = 0.0
        self._least, self._greatest = inf, -inf
        self._buckets: dict[int, int] = {}
        self._values: list[float] = []  # not counted yet
        self._times: list[int] = []

    def add(self, value: float, times: int = 1) -> None:
        """`times` is at least 1."""
        self._values.append(value)
        self._times.append(times)
        if len(self._values) >= _AT_ONCE:
            self._fold()

    def add_run(self, run: Run, times: int = 1) -> None:
        """`times` of each of the durations of a run, by the stretches of it that share a bucket."""
        while run.steps:
            stretch = _stretch(run)
            last = run.first_s + (stretch - 1) * run.slope_s
            self.add(run.first_s, times)
            if stretch > 1:
                self.add(last, times)
            if stretch > 2:
                self.add((run.first_s + last) / 2, (stretch - 2) * times)
            run = run.after(stretch)

    def merge(self, other: Sketch) -> None:
        self._fold()
        count, total, least, greatest, buckets = other.state()
        self._take(count, total, least, greatest, buckets)

    def state(self) -> tuple[int, float, float, float, dict[int, int]]:
        """Count, sum, least, greatest and buckets: what `of` makes the same sketch from, in any process."""
        self._fold()
        return self._count, self._sum, self._least, self._greatest, self._buckets

    @classmethod
    def of(cls, state: tuple[int, float, float, float, dict[int, int]]) -> Sketch:
        sketch = cls()
        sketch._take(*state)
        return sketch

    @property
    def count(self) -> int:
        return self.state()[0]

    @property
    def sum(self) -> float:
        return self.state()[1]

    @property
    def least(self) -> float:
        """Infinite without values, as `greatest` is negatively."""
        return self.state()[2]

    @property
    def greatest(self) -> float:
        return self.state()[3]

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """The value that this share of all values does not exceed; None if there are none."""
        count, _, least, greatest, buckets = self.state()
        if not count:
            return None
        rank, seen = max(1, ceil(share * count)), 0
        for bucket in sorted(buckets):
            seen += buckets[bucket]
            if seen >= rank:
                break
        middle = 2 * _GAMMA**bucket / (_GAMMA + 1)
        return min(max(middle, least), greatest)

    def points(self) -> list[tuple[float, float]]:
        """The distribution function as (value, share of all at or below it), rising."""
        count, _, least, greatest, buckets = self.state()
        seen, points = 0, []
        for bucket in sorted(buckets):
            seen += buckets[bucket]
            points.append((min(max(_GAMMA**bucket, least), greatest), seen / count))
        return points

    def _fold(self) -> None:
        if not self._values:
            return
        values, times = np.array(self._values), np.array(self._times)
        self._values, self._times = [], []
        buckets = np.ceil(np.log(np.maximum(values, _LEAST)) * _PER_E).astype(np.int64)
        found, places = np.unique(buckets, return_inverse=True)
        counts = np.zeros(len(found), dtype=np.int64)
        np.add.at(counts, places, times)
        counted = dict(zip(found.tolist(), counts.tolist(), strict=True))
        self._take(int(times.sum()), float(values @ times), float(values.min()), float(values.max()), counted)

    def _take(self, count: int, total: float, least: float, greatest: float, buckets: dict[int, int]) -> None:
        self._count += count
        self._sum += total
        self._least, self._greatest = min(self._least, least), max(self._greatest, greatest)
        for bucket, times in buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + times


def _bucket(value: float) -> int:
    """Bucket i holds (gamma^(i-1), gamma^i]."""
    return ceil(log(value if value > _LEAST else _LEAST) * _PER_E)


def _stretch(run: Run) -> int:
    """How many durations from the first on share its bucket."""
    if not run.slope_s or run.steps == 1:
        return run.steps
    bucket = _bucket(run.first_s)
    if _bucket(run.first_s + (run.steps - 1) * run.slope_s) == bucket:
        return run.steps
    low, high = 1, run.steps
    while low < high:
        middle = (low + high + 1) // 2
        inside = _bucket(run.first_s + (middle - 1) * run.slope_s) == bucket
        low, high = (middle, high) if inside else (low, middle - 1)
    return low


class Course:
    """The greatest value in each interval of `interval_s` from time 0 on. Values of one interval come together, but for
    a few: the interval under way is kept apart."""

    __slots__ = ("_ends_s", "_greatest", "_value", "interval_s")

    def __init__(self, interval_s: float = 0.125) -> None:
        self.interval_s = interval_s
        self._greatest: dict[int, float] = {}  # by number of the interval
        self._ends_s = 0.0  # of the interval under way
        self._value = -inf  # the greatest in it

    def add(self, at_s: float, value: float) -> None:
        """Times do not fall."""
        if at_s >= self._ends_s:
            self._close()
            self._ends_s = (at_s // self.interval_s + 1) * self.interval_s
        if value > self._value:
            self._value = value

    def merge(self, other: Course) -> None:
        """The sum of two courses at about the same time, for replicas side by side. Where one has no value, it counts
        as none."""
        interval_s, theirs = other.state()
        while self.interval_s < interval_s:
            self._coarsen()
        while interval_s < self.interval_s:
            interval_s, theirs = 2 * interval_s, _halved(theirs)
        self._close()
        for at, value in theirs.items():
            self._greatest[at] = self._greatest.get(at, 0.0) + value

    def state(self) -> tuple[float, dict[int, float]]:
        """The interval and the values by its number: what `of` makes the same course from, in any process."""
        self._close()
        return self.interval_s, self._greatest

    @classmethod
    def of(cls, state: tuple[float, dict[int, float]]) -> Course:
        course = cls(state[0])
        course._greatest = dict(state[1])
        return course

    def points(self) -> list[tuple[float, float]]:
        """(start of the interval in seconds, value), in order."""
        interval_s, greatest = self.state()
        return [(at * interval_s, value) for at, value in sorted(greatest.items())]

    def _close(self) -> None:
        """Enter the interval under way."""
        if self._value > -inf:
            at = round(self._ends_s / self.interval_s) - 1
            self._greatest[at] = max(self._value, self._greatest.get(at, -inf))
            self._value, self._ends_s = -inf, 0.0
            while len(self._greatest) > 2 * INTERVALS:
                self._coarsen()

    def _coarsen(self) -> None:
        self._close()
        self.interval_s, self._greatest = 2 * self.interval_s, _halved(self._greatest)


def _halved(fine: dict[int, float]) -> dict[int, float]:
    coarse: dict[int, float] = {}
    for at, value in fine.items():
        coarse[at // 2] = max(value, coarse.get(at // 2, -inf))
    return coarse
