"""What a check is: an async function of a setting whose docstring is the goal, in one line, and that tells what it
found. `percentile` and `seconds` are how they say it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Setting:
    """What every check is given."""

    short: bool  # the form for CI: a tiny model, few repeats, at most half a minute
    model: str  # as for `headrace serve`
    folder: Path  # for files, away when all is over
    flags: tuple[str, ...] = ()  # more of them for every server
    slack: float = 1.0  # how many times longer than promised is near enough: where others use the machine


@dataclass(frozen=True, slots=True)
class Found:
    """A figure in words, and whether it keeps the promise."""

    ours: str
    held: bool


Check = Callable[[Setting], Awaitable[Found]]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def s(seconds: float) -> str:
    return f"{seconds:.1f} s"
