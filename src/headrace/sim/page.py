"""What came of simulations, as one HTML page for people who would rather look than read; nothing outside the file.

One simulation or several: every plot draws each in its own colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, SubElement

from headrace.draw import plot
from headrace.draw.page import MAX_RUNS, card, document, figures, section, table, text_of
from headrace.draw.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDE, WIDTH, Point, Scale
from headrace.draw.text import short, three
from headrace.sim import table as tables
from headrace.sim.lives import Life
from headrace.sim.run import Report
from headrace.sim.scenario import Scenario
from headrace.sim.sketch import Course, Sketch
from headrace.sim.spent import TERMS
from headrace.sim.stats import Totals
from headrace.sim.sweep import Point as Load
from headrace.sim.sweep import attained
from headrace.workload.settings import parse_slo

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Named = Sequence[tuple[str, Scenario, Report]]

_LATENCIES = {
    "ttft_s": "Time to first token",
    "tpot_s": "Time per output token",
    "itl_s": "Inter-token latency",
    "e2e_s": "End-to-end latency",
}
_ROWS = 240  # of the timeline


def page(runs: Named, loads: Sequence[Load] = ()) -> str:
    """The whole document; `loads` is the first simulation at other rates. The first MAX_RUNS runs are drawn."""
    runs = runs[:MAX_RUNS]
    root, main = document(f"headrace simulate: {runs[0][1].simulate.model}")
    _header(main, runs)
    _distributions(main, runs)
    if loads:
        _loads(main, runs[0][1], loads)
    _courses(main, runs)
    _terms(main, runs)
    for name, _, report in runs:
        _lives(main, name if len(runs) > 1 else "", report.totals)
    _details(main, runs)
    return text_of(root)


def _header(main: Element, runs: Named) -> None:
    header = SubElement(main, "header")
    SubElement(header, "h1").text = runs[0][1].simulate.model
    for index, (name, scenario, _) in enumerate(runs):
        line = SubElement(header, "p", {"class": "run"})
        SubElement(line, "span", {"class": f"dot c{index}"})
        told = f"{name}: " if len(runs) > 1 else ""
        SubElement(line, "span").text = f"{told}{tables.subject(scenario, scenario.site())}. {tables.load(scenario)}."
    for name, scenario, report in runs:
        for note in tables.notes(scenario, scenario.site(), report):
            SubElement(header, "p", {"class": "note"}).text = f"{name}: {note}" if len(runs) > 1 else note
    if len(runs) > 1:
        table(
            SubElement(main, "div", {"class": "card wide"}),
            tables.compared([(name, report) for name, _, report in runs]),
        )
        return
    totals = runs[0][2].totals
    per_s = totals.per_second()
    shown = [
        ("requests/s", short(three(per_s["requests"]))),
        ("output tokens/s", short(three(per_s["output tokens"]))),
    ]
    for field, label in (("ttft_s", "TTFT p50 / p99"), ("tpot_s", "TPOT p50 / p99"), ("e2e_s", "end to end p50 / p99")):
        sketch: Sketch = getattr(totals, field)
        if sketch.count:
            both = (plot.time_text(three(sketch.quantile(share) or 0.0)) for share in (0.5, 0.99))
            shown.append((label, " / ".join(both)))
    if (share := attained(totals)) is not None:
        shown.append(("kept their SLO", f"{share:.2%}"))
    figures(main, shown)


def _distributions(main: Element, runs: Named) -> None:
    place = section(main, "Latency distributions", "Share of requests (of gaps, for inter-token latency) at or below.")
    plots = SubElement(place, "div", {"class": "plots"})
    slo = parse_slo(runs[0][1].traffic[0].slo)
    promises = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s} if slo else {}
    for field, title in _LATENCIES.items():
        lines = [getattr(report.totals, field).points() for _, _, report in runs]
        card(plots, title, plot.distribution(title, lines, tables.LABELS[field], promises.get(field)))


def _loads(main: Element, scenario: Scenario, loads: Sequence[Load]) -> None:
    place = section(main, "Over load", "The same requests, coming faster or slower. Every dot is a simulation.")
    plots = SubElement(place, "div", {"class": "plots"})
    totals = [(point.rate, point.report.totals) for point in loads]
    if any(attained(one) is not None for _, one in totals):
        goodput = [(rate, one.per_second()["good requests"]) for rate, one in totals]
        card(plots, "Goodput: requests/s that kept their SLO", over_load(goodput, plot.count_text, "requests/s"))
    tokens = [(rate, one.per_second()["output tokens"]) for rate, one in totals]
    card(plots, "Throughput", over_load(tokens, plot.count_text, "output tokens/s"))
    for field, title in (("ttft_s", "p99 time to first token"), ("tpot_s", "p99 time per output token")):
        points = [(rate, getattr(one, field).quantile(0.99) or 0.0) for rate, one in totals]
        card(plots, title, over_load(points, plot.time_text, ""))


def over_load(points: Sequence[Point], show: Callable[[float], str], label: str) -> Element:
    """One number over the rate of requests."""
    svg = plot.frame(f"{label} over load")
    x = Scale(0.0, max(rate for rate, _ in points) * 1.02, LEFT, WIDTH - RIGHT)
    y = Scale(0.0, max(value for _, value in points) * 1.05 or 1.0, HEIGHT - BOTTOM, TOP)
    plot.y_axis(svg, y, show, label)
    plot.x_axis(svg, x, plot.count_text, "requests/s")
    plot.polyline(svg, points, x, y, "c0")
    return svg


def _courses(main: Element, runs: Named) -> None:
    place = section(main, "Over time", "The greatest value in each interval, of all replicas together.")
    for field, title in (
        ("waiting", "Requests in the queue"),
        ("running", "Requests running"),
        ("used_blocks", "KV blocks in use"),
    ):
        courses = [getattr(report.totals, field) for _, _, report in runs]
        card(place, title, over_time(courses, title))


def over_time(courses: Sequence[Course], title: str) -> Element:
    """Courses as outlines of areas."""
    height = 200
    svg = plot.frame(f"{title} over time", height, WIDE)
    drawn = [course.points() for course in courses]
    end_s = max((at_s for points in drawn for at_s, _ in points), default=1.0) or 1.0
    peak = max((value for points in drawn for _, value in points), default=1.0) or 1.0
    x = Scale(0.0, end_s * 1.01, LEFT, WIDE - RIGHT)
    y = Scale(0.0, peak * 1.05, height - BOTTOM, TOP)
    plot.y_axis(svg, y, plot.count_text, "", WIDE)
    plot.x_axis(svg, x, plot.time_text, "virtual time", height=height)
    for index, (course, points) in enumerate(zip(courses, drawn, strict=True)):
        if points:
            plot.area(svg, _filled(points, course.interval_s), course.interval_s, x, y, f"c{index}")
    return svg


def _filled(points: Sequence[Point], interval_s: float) -> list[float]:
    """Heights from time 0 on; an interval without a value, in which no step began, has that before it."""
    heights = [0.0] * round(points[0][0] / interval_s) + [points[0][1]]
    for (before_s, value), (at_s, following) in pairwise(points):
        heights += [value] * (round((at_s - before_s) / interval_s) - 1) + [following]
    return heights


def _terms(main: Element, runs: Named) -> None:
    place = section(
        main, "What the steps spend their time on", "Every operator's time goes to the resource that bounds it."
    )
    legend = SubElement(place, "p", {"class": "legend"})
    seen = {term for _, _, report in runs for term in report.totals.spent.shares()}
    for colour, term in enumerate(term for term in TERMS if term in seen):
        SubElement(legend, "span", {"class": f"dot c{colour}"})
        SubElement(legend, "span", {"class": "told"}).text = term
    height = TOP + 30 * len(runs) + 6
    svg = plot.frame("terms of the step time", height, WIDE)
    for row, (name, _, report) in enumerate(runs):
        left, y = float(LEFT), TOP + 30.0 * row
        for colour, (term, share) in enumerate(report.totals.spent.shares().items()):
            width = share * (WIDE - LEFT - RIGHT)
            one = plot.bar(svg, left, y, width, 22, f"spot c{colour}")
            plot.hint(one, f"{name}: {term} {share:.1%}")
            left += width
    card(place, None, svg)


def _lives(main: Element, name: str, totals: Totals) -> None:
    lives = sorted(totals.lives.kept, key=lambda life: life[0])
    lives = lives[:: max(1, -(-len(lives) // _ROWS))]
    if not lives:
        return
    every = max(1, round(totals.lives.seen / len(lives)))
    shown = "every request" if every == 1 else f"about every {every}th request"
    title = "Requests over time" + (f": {name}" if name else "")
    place = section(main, title, f"One row for {shown}, by arrival.")
    legend = SubElement(place, "p", {"class": "legend"})
    for kind, label in {"wait": "in the queue", "prefill": "until the first token", "decode": "decoding"}.items():
        SubElement(legend, "span", {"class": f"key {kind}"})
        SubElement(legend, "span").text = label
    pitch = min(12.0, max(2.0, 420 / len(lives)))
    height = round(TOP + pitch * len(lives) + BOTTOM)
    svg = plot.frame("what requests did when", height, WIDE)
    x = Scale(0.0, max(life[3] for life in lives) or 1.0, LEFT, WIDE - RIGHT)
    plot.x_axis(svg, x, plot.time_text, "virtual time", height=height)
    for row, life in enumerate(lives):
        _life(svg, life, x, TOP + pitch * row, pitch * 0.82)
    card(place, None, svg)


def _life(svg: Element, life: Life, x: Scale, y: float, height: float) -> None:
    arrival_s, admitted_s, first_s, end_s, prompt, output, cached, reason = life
    row = SubElement(svg, "g")
    begun_s = end_s if admitted_s is None else admitted_s
    drew_s = end_s if first_s is None else first_s
    for start_s, stop_s, kind in (
        (arrival_s, begun_s, "wait"),
        (begun_s, drew_s, "prefill"),
        (drew_s, end_s, "decode"),
    ):
        if stop_s > start_s:
            plot.bar(row, x(start_s), y, x(stop_s) - x(start_s), height, kind)
    found = f" ({cached} cached)" if cached else ""
    plot.hint(
        row, f"{prompt} prompt tokens{found}, {output} output tokens, {reason}, {plot.time_text(end_s - arrival_s)}"
    )


def _details(main: Element, runs: Named) -> None:
    """All numbers and all settings, for whoever wants to repeat it."""
    for name, scenario, report in runs:
        details = SubElement(main, "details", {"class": "card wide"})
        SubElement(details, "summary").text = f"All numbers and settings: {name}"
        pairs = [(key, short(value)) for key, value in tables.numbers(report.totals).items() if value is not None]
        pairs += [("seed", str(report.seed)), ("event log", report.digest)]
        groups: tuple[DataclassInstance, ...] = (scenario.simulate, scenario.engine, *scenario.traffic)
        for settings in groups:
            values = [(field.name, getattr(settings, field.name)) for field in fields(settings)]
            pairs += [(f"--{key.replace('_', '-')}", str(value)) for key, value in values if value is not None]
        table(details, [["", ""], *(list(pair) for pair in pairs)], "pairs")
