"""A published claim as a value: who says what, in which setting it is asked again, what would count as the same, and
why the answer may differ. Judges numbers; runs nothing by itself.

A setting is written down before anybody sees what comes of it, and mended only where it measured something else than it
said, which the claim then tells: one that does not come out is told as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import NamedTuple


class Band(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    low: float = -inf
    high: float = inf

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high  # NaN is nowhere


@dataclass(frozen=True, slots=True)
class Number:
    """One number of a claim. `counts` is where it must lie to be the same, `direction` where it at least points the
    same way. Without `counts` it is shown beside the others and judged by nobody."""

    what: str
    claimed: float | None = None  # None: only bounds were published
    counts: Band | None = None
    direction: Band = Band()
    form: str = "{:.2f}"  # how it is printed, unit included

    def shown(self, value: float) -> str:
        return self.form.format(value)

    @property
    def told(self) -> str:
        """What was claimed, in words."""
        return "-" if self.claimed is None else self.shown(self.claimed)

    @property
    def bounds(self) -> str:
        """What counts, in words."""
        if self.counts is None:
            return "shown only"
        low, high = self.counts
        if low == -inf:
            return f"at most {self.shown(high)}"
        if high == inf:
            return f"at least {self.shown(low)}"
        return self.shown(low) if low == high else f"{self.shown(low)} to {self.shown(high)}"


class Verdict(Enum):
    REPRODUCED = "reproduced"
    PARTLY = "partly reproduced"  # the direction, not the size
    NOT = "not reproduced"


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim and the way to ask it again. `obtain` gives a number for each of `numbers`, always the same ones."""

    name: str
    system: str
    paper: str
    says: str  # what is claimed, in one sentence
    source: str  # where the claimed numbers were read, or remembered
    setting: str  # what is run here
    fair: str  # what was scaled down or left out, and why that is fair
    numbers: tuple[Number, ...]
    obtain: Callable[[], Sequence[float]]
    because: tuple[str, ...]  # known reasons why what is obtained may differ from what is claimed

    def judge(self, values: Sequence[float]) -> Verdict:
        """All numbers where they count, all at least in the right direction, or not."""
        judged = [(number, value) for number, value in zip(self.numbers, values, strict=True) if number.counts]
        if all(number.counts and number.counts.holds(value) for number, value in judged):
            return Verdict.REPRODUCED
        right = all(number.direction.holds(value) for number, value in judged)
        return Verdict.PARTLY if right else Verdict.NOT


@dataclass(frozen=True, slots=True)
class Missing:
    """A claim that nobody can judge here, and what is missing."""

    system: str
    says: str
    missing: str


def times(factor: float, spread: float = 1.5) -> Band:
    """Within a factor `spread` of a claimed ratio: what a roofline that knows no kernel can be asked for."""
    return Band(factor / spread, factor * spread)


MORE = Band(1.0)  # the direction of a claimed gain
LESS = Band(high=1.0)
