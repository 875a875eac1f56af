"""Plots as SVG elements: scales, axes, lines, areas and the timeline. Knows coordinates, not what is measured.

Elements are `xml.etree` trees, so whatever a server wrote is escaped. Colours are CSS classes that the page defines
for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement

Point = tuple[float, float]

WIDTH, HEIGHT = 520, 250
WIDE = 1080
LEFT, RIGHT, TOP, BOTTOM = 54, 26, 14, 42  # margins inside a plot


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values in [low, high] to pixels, evenly or by their logarithm."""

    low: float
    high: float
    start: float  # pixel of low
    end: float  # pixel of high
    log: bool = False

    def __call__(self, value: float) -> float:
        inside = min(self.high, max(self.low, value))
        if self.log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else even_ticks(self.low, self.high)


def even_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(decades) <= 3 else (1,)
    return [f * 10.0**d for d in decades for f in factors if low * 0.999 <= f * 10.0**d <= high * 1.001]


def value_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """For non-negative values: even from 0, logarithmic when the largest is far above the middle one."""
    ordered = sorted(value for value in values if value > 1e-9)
    if not ordered:
        return Scale(0.0, 1.0, start, end)
    middle, high = ordered[len(ordered) // 2], ordered[-1] * 1.02
    if high > 20 * middle:
        return Scale(max(ordered[0], high * 1e-6) * 0.9, high, start, end, log=True)
    return Scale(0.0, high, start, end)


def time_text(seconds: float) -> str:
    """2.5 as '2.5 s', 0.0025 as '2.5 ms'."""
    if seconds == 0:
        return "0"
    return f"{seconds:.4g} s" if abs(seconds) >= 1 else f"{seconds * 1e3:.4g} ms"


def count_text(value: float) -> str:
    return f"{value:,.10g}"


def percent_text(share: float) -> str:
    return f"{100 * share:.0f} %"


def frame(label: str, height: int = HEIGHT, width: int = WIDTH) -> Element:
    """An empty plot; `label` is read by screen readers."""
    return Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label})


def text(parent: Element, x: float, y: float, content: str, kind: str = "tick", anchor: str = "middle") -> None:
    attributes = {"x": f"{x:g}", "y": f"{y:g}", "class": kind, "text-anchor": anchor}
    SubElement(parent, "text", attributes).text = content


def distribution(title: str, lines: Sequence[Sequence[Point]], label: str, promise: float | None = None) -> Element:
    """Distribution functions of times, each as rising (value, share at or below) points, with the promise if any."""
    svg = frame(f"cumulative distribution of {title}")
    values = [value for points in lines for value, _ in points]
    x = value_scale([*values, *([promise] if promise and values else [])], LEFT, WIDTH - RIGHT)
    y = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    y_axis(svg, y, percent_text, "share")
    x_axis(svg, x, time_text, label + (" (logarithmic)" if x.log else ""))
    for index, points in enumerate(lines):
        if points:
            steps(svg, points, x, y, f"c{index}")
    if not values:
        text(svg, WIDTH / 2, HEIGHT / 2, "no values", "label")
    if promise:
        marker(svg, x, promise, f"SLO {time_text(promise)}")
    return svg


def x_axis(svg: Element, scale: Scale, show: Callable[[float], str], label: str, height: int = HEIGHT) -> None:
    base = height - BOTTOM
    for tick in scale.ticks():
        x = scale(tick)
        _line(svg, x, TOP, x, base, "grid")
        text(svg, x, base + 16, show(tick))
    _line(svg, scale.start, base, scale.end, base, "axis")
    text(svg, (scale.start + scale.end) / 2, height - 6, label, "label")


def y_axis(svg: Element, scale: Scale, show: Callable[[float], str], label: str, width: int = WIDTH) -> None:
    for tick in scale.ticks():
        y = scale(tick)
        _line(svg, LEFT, y, width - RIGHT, y, "grid")
        text(svg, LEFT - 6, y + 4, show(tick), anchor="end")
    middle = (scale.start + scale.end) / 2
    attributes = {"transform": f"translate(12 {middle:g}) rotate(-90)", "class": "label", "text-anchor": "middle"}
    SubElement(svg, "text", attributes).text = label


def steps(svg: Element, points: Sequence[Point], x: Scale, y: Scale, kind: str, floor: float = 0.0) -> None:
    """A staircase through the points: each value holds until the next one, as a distribution function does."""
    path = f"M{x(points[0][0])} {y(floor)}"
    path += "".join(f"H{x(value)}V{y(height)}" for value, height in points)
    SubElement(svg, "path", {"d": path + f"H{x(x.high)}", "class": f"line {kind}"})


def polyline(svg: Element, points: Sequence[Point], x: Scale, y: Scale, kind: str) -> None:
    """Straight lines from point to point, each with a dot that tells its numbers."""
    path = "M" + "L".join(f"{x(across)} {y(up)}" for across, up in points)
    SubElement(svg, "path", {"d": path, "class": f"line {kind}"})
    for across, up in points:
        place = {"cx": f"{x(across):g}", "cy": f"{y(up):g}", "r": "3.5", "class": f"spot {kind}"}
        hint(SubElement(svg, "circle", place), f"{across:.4g}: {up:.4g}")


def area(svg: Element, heights: Sequence[float], width: float, x: Scale, y: Scale, kind: str) -> None:
    """Bars without gaps, each `width` wide, as one outline."""
    path = f"M{x(0)} {y(0)}"
    path += "".join(f"V{y(height)}H{x((i + 1) * width)}" for i, height in enumerate(heights))
    SubElement(svg, "path", {"d": path + f"V{y(0)}", "class": f"area {kind}"})


def marker(svg: Element, scale: Scale, value: float, label: str, height: int = HEIGHT) -> None:
    """A vertical line for a promise; left out where it would lie outside the plot."""
    if not scale.low <= value <= scale.high:
        return
    x = scale(value)
    _line(svg, x, TOP, x, height - BOTTOM, "promise")
    near_end = x > (scale.start + scale.end) / 2
    text(svg, x - 5 if near_end else x + 5, height - BOTTOM - 8, label, "promise-label", "end" if near_end else "start")


def bar(svg: Element, x: float, y: float, width: float, height: float, kind: str) -> Element:
    attributes = {
        "x": f"{x:g}",
        "y": f"{y:g}",
        "width": f"{max(0.0, width):.2f}",
        "height": f"{height:g}",
        "class": kind,
    }
    return SubElement(svg, "rect", attributes)


def hint(element: Element, content: str) -> None:
    """Shown by browsers while the pointer rests on the element."""
    SubElement(element, "title").text = content


def _line(svg: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
    ends = {"x1": f"{x1:g}", "y1": f"{y1:g}", "x2": f"{x2:g}", "y2": f"{y2:g}"}
    SubElement(svg, "line", ends | {"class": kind})
