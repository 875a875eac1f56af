"""The cheapest mix of device types for traffic of many sizes (Mélange): buckets of request sizes, how many of each a
device serves within the promises, and an integer program that packs slices of buckets onto devices.

    min sum price_j y_j    with  sum_j x_bj = slices of b,   sum_b x_bj load_bj <= y_j,   0 <= y_j <= available_j

x counts slices of equal buckets instead of naming each, which is the same program without its symmetries. Packing knows
no queues: `confirm` simulates the mix and packs less tightly until the promises hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf

from headrace.core.types import HeadraceError


class NoMix(HeadraceError):
    """No mix of the available devices serves the traffic, or the solver is not installed."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Requests of about one size."""

    name: str
    rate: float  # requests per second
    most: tuple[float, ...]  # that one device of each type serves alone within the promises; 0: it cannot


@dataclass(frozen=True, slots=True)
class Type:
    """A kind of device (or of replica of several) and what one costs."""

    name: str
    usd_per_hour: float
    available: int | None = None  # None: as many as one likes


@dataclass(frozen=True, slots=True)
class Mix:
    """How many of each type, and which slices of which bucket go where."""

    types: tuple[Type, ...]
    counts: tuple[int, ...]  # by type
    slices: tuple[tuple[int, ...], ...]  # by bucket and type
    loads: tuple[float, ...]  # devices' worth of work, by type

    @property
    def usd_per_hour(self) -> float:
        return sum(one.usd_per_hour * count for one, count in zip(self.types, self.counts, strict=True))

    def share(self, bucket: int, kind: int) -> float:
        """Of a bucket's requests, those that go to a type."""
        return self.slices[bucket][kind] / sum(self.slices[bucket])


def pack(types: Sequence[Type], buckets: Sequence[Bucket], slices: int = 8, slack: float = 1.0) -> Mix:
    """The cheapest mix; `slack` above 1 makes every request heavier, so that devices are filled less. Raises NoMix."""
    try:
        import highspy
    except ImportError as error:
        raise NoMix("a mix needs HiGHS; install it with: pip install 'headrace[plan]'") from error
    loads = [[_load(bucket, kind, slices, slack) for kind in range(len(types))] for bucket in buckets]
    _check(types, buckets, loads)
    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("mip_rel_gap", 0.0)
    devices = [solver.addIntegral(lb=0, ub=_most(one, at, loads, slices)) for at, one in enumerate(types)]
    pieces = [[solver.addIntegral(lb=0, ub=slices if load < inf else 0) for load in row] for row in loads]
    for row in pieces:
        solver.addConstr(sum(row[1:], row[0]) == slices)
    for kind, device in enumerate(devices):
        mine = [(row[kind], load[kind]) for row, load in zip(pieces, loads, strict=True) if load[kind] < inf]
        if mine:
            work = sum((piece * load for piece, load in mine[1:]), mine[0][0] * mine[0][1])
            solver.addConstr(work <= device)
    prices = [device * one.usd_per_hour for device, one in zip(devices, types, strict=True)]
    solver.minimize(sum(prices[1:], prices[0]))
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        raise NoMix(_too_few(types))
    chosen = tuple(tuple(round(solver.val(piece)) for piece in row) for row in pieces)
    work = tuple(
        sum(row[kind] * load[kind] for row, load in zip(chosen, loads, strict=True) if row[kind])
        for kind in range(len(types))
    )
    return Mix(tuple(types), tuple(ceil(one - 1e-6) for one in work), chosen, work)


def single(kind: int, types: Sequence[Type], buckets: Sequence[Bucket], slack: float = 1.0) -> int | None:
    """How many of one type alone would do; None if it cannot serve every size. Nothing is packed: a bucket is divided
    as one likes."""
    loads = [_load(bucket, kind, 1, slack) for bucket in buckets]
    return None if inf in loads else ceil(sum(loads) - 1e-9)


def _load(bucket: Bucket, kind: int, slices: int, slack: float) -> float:
    """Devices' worth of work of one slice."""
    most = bucket.most[kind]
    return slack * bucket.rate / slices / most if most > 0 else inf


def _most(one: Type, kind: int, loads: Sequence[Sequence[float]], slices: int) -> int:
    """More devices of a type than would serve everything are never needed."""
    needed = ceil(sum(slices * row[kind] for row in loads if row[kind] < inf))
    return needed if one.available is None else min(one.available, needed)


def _check(types: Sequence[Type], buckets: Sequence[Bucket], loads: Sequence[Sequence[float]]) -> None:
    if not types or not buckets:
        raise NoMix("a mix needs at least one device type and one bucket of traffic")
    for bucket, row in zip(buckets, loads, strict=True):
        if min(row) == inf:
            raise NoMix(f"none of {', '.join(one.name for one in types)} keeps the promises for {bucket.name}")


def _too_few(types: Sequence[Type]) -> str:
    there = ", ".join(f"{one.available} {one.name}" for one in types if one.available is not None)
    return f"there are too few devices for the traffic: only {there or 'those named'} are available"
