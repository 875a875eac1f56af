"""Numbers and columns for the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def with_ratio(value: float | None, first: float | None, is_first: bool) -> str:
    """'120 (1.50x)'."""
    if value is None:
        return "-"
    return short(value) if is_first or not first else f"{short(value)} ({value / first:.2f}x)"


def short(value: float) -> str:
    """A number in about four digits: 0.01234, 1.234, 123.4, 12,345."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Lines of columns, each column as wide as its widest cell; `sides` has one of < and > for each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{s}{w}}" for cell, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows]


def three(value: float) -> float:
    """Rounded to three digits."""
    return float(f"{value:.3g}")
