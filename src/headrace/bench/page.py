"""The report as one HTML page with nothing outside it: no script, no font, no image, no link.

One run or several: every plot draws each run in its own colour, so a comparison is the same page with more lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement

from headrace.bench.metrics import Record, cumulative, is_good, token_rate, values_of
from headrace.bench.report import (
    LABELS,
    Report,
    compared_keys,
    describe,
    flat,
    headline,
    notes,
    number,
)
from headrace.draw import plot
from headrace.draw.page import MAX_RUNS, card, document, figures, section, table, text_of
from headrace.draw.plot import BOTTOM, LEFT, RIGHT, TOP, WIDE, Scale
from headrace.draw.text import short, three, with_ratio

Named = Sequence[tuple[str, Report]]

MAX_ROWS = 240  # requests drawn in a timeline
_PLOTTED = {
    "ttft": "Time to first token",
    "tpot": "Time per output token",
    "itl": "Inter-token latency",
    "e2e": "End-to-end latency",
}


def page(runs: Named) -> str:
    """The whole document. The first MAX_RUNS runs are drawn."""
    runs = runs[:MAX_RUNS]
    root, main = document(f"headrace bench: {runs[0][1].model}")
    _header(main, runs)
    _figures(main, runs)
    grid = section(main, "Latency distributions", "Share of requests (of gaps, for inter-token latency) at or below.")
    plots = SubElement(grid, "div", {"class": "plots"})
    for metric, title in _PLOTTED.items():
        card(plots, title, cdf(runs, metric))
    card(section(main, "Throughput", "Output tokens per second as they arrived."), None, throughput(runs))
    for index, (name, report) in enumerate(runs):
        _timeline_section(main, name if len(runs) > 1 else "", report, index)
    _details(main, runs)
    return text_of(root)


def cdf(runs: Named, metric: str) -> Element:
    """Empirical distribution functions of one metric, with the promise if there is one."""
    lines = [cumulative(values_of(report.records, metric)) for _, report in runs]
    return plot.distribution(_PLOTTED[metric], lines, LABELS[metric], runs[0][1].slo.get(metric))


def throughput(runs: Named) -> Element:
    """Output tokens per second over the run."""
    svg = plot.frame("output tokens per second over time", 220, WIDE)
    rates = [token_rate(report.records) for _, report in runs]
    peak = max((rate for _, bins in rates for rate in bins), default=0.0) or 1.0
    end_s = max((width_s * len(bins) for width_s, bins in rates), default=0.0) or 1.0
    x = Scale(0.0, end_s, LEFT, WIDE - RIGHT)
    y = Scale(0.0, peak * 1.05, 220 - BOTTOM, TOP)
    plot.y_axis(svg, y, plot.count_text, "tokens/s", WIDE)
    plot.x_axis(svg, x, plot.time_text, "time since the start of the run", height=220)
    for index, (width_s, bins) in enumerate(rates):
        if bins:
            plot.area(svg, bins, width_s, x, y, f"c{index}")
    return svg


def timeline(report: Report) -> Element:
    """One row per request: waiting, reading the prompt, decoding. Rows are sampled evenly beyond MAX_ROWS."""
    every = max(1, -(-len(report.records) // MAX_ROWS))
    rows = report.records[::every]
    pitch = min(12.0, max(2.0, 420 / max(1, len(rows))))
    height = round(TOP + pitch * len(rows) + BOTTOM)
    svg = plot.frame("what every request did when", height, WIDE)
    end_s = max((record.ended_s for record in report.records), default=0.0) or 1.0
    x = Scale(0.0, end_s, LEFT, WIDE - RIGHT)
    plot.x_axis(svg, x, plot.time_text, "time since the start of the run", height=height)
    apart = next(rows_apart for rows_apart in (1, 2, 5, 10, 20) if rows_apart * pitch >= 16)  # numbered rows
    for row, record in enumerate(rows):
        _request_row(svg, record, x, TOP + pitch * row, pitch * 0.82, report)
        if row % apart == 0:
            plot.text(svg, LEFT - 6, TOP + pitch * row + min(9.0, pitch), str(record.index), anchor="end")
    return svg


def _request_row(svg: Element, record: Record, x: Scale, y: float, height: float, report: Report) -> None:
    row = SubElement(svg, "g")
    first_s = record.token_times_s[0] if record.token_times_s else record.ended_s
    spans = [
        (record.due_s, record.sent_s, "wait"),
        (record.sent_s, first_s, "prefill" if record.ok else "failed"),
        (first_s, record.ended_s, "decode" if record.ok else "failed"),
    ]
    for start_s, end_s, kind in spans:
        if end_s > start_s:
            plot.bar(row, x(start_s), y, x(end_s) - x(start_s), height, kind)
    if report.slo and record.ok and not is_good(record, report.slo):
        plot.bar(row, x(record.ended_s) + 1, y, 3, height, "late")
    plot.hint(row, _story(record))


def _story(record: Record) -> str:
    told = f"request {record.index}: {record.prompt_tokens} prompt tokens, {record.output_tokens} output tokens"
    if record.failure:
        return f"{told}, {record.failure.kind}: {record.failure.message}"
    cached = f", {record.cached_tokens} cached" if record.cached_tokens else ""
    gap = f", longest gap {plot.time_text(record.max_itl_s)}" if record.max_itl_s is not None else ""
    return f"{told}{cached}, TTFT {plot.time_text(record.ttft_s)}, end to end {plot.time_text(record.e2e_s)}{gap}"


def _header(main: Element, runs: Named) -> None:
    header = SubElement(main, "header")
    SubElement(header, "h1").text = runs[0][1].model
    for index, (name, report) in enumerate(runs):
        line = SubElement(header, "p", {"class": "run"})
        SubElement(line, "span", {"class": f"dot c{index}"})
        told = f"{name}: " if len(runs) > 1 else ""
        SubElement(line, "span").text = f"{told}{describe(report)}. {report.settings.get('url', '')}, {report.date}"
    for name, report in runs:
        for note in notes(report, report.summary()):
            SubElement(header, "p", {"class": "note"}).text = f"{name}: {note}" if len(runs) > 1 else note


def _figures(main: Element, runs: Named) -> None:
    """The numbers people look for first: cards for one run, a table with ratios for several."""
    if len(runs) > 1:
        _comparison(main, runs)
        return
    report = runs[0][1]
    summary = report.summary()
    shown = [
        ("output tokens/s", short(summary.output_tokens_per_s)),
        ("requests/s", short(summary.requests_per_s)),
        *(
            (f"{LABELS[metric]} p50 / p99", f"{plot.time_text(three(s.p50))} / {plot.time_text(three(s.p99))}")
            for metric in ("ttft", "tpot", "max_itl")
            if (s := summary.spreads[metric])
        ),
    ]
    if summary.goodput_fraction is not None:
        shown.append(("within the SLO", f"{100 * summary.goodput_fraction:.1f} %"))
    shown.append(("answered", f"{summary.completed:,} of {summary.requests:,}"))
    figures(main, shown)


def _comparison(main: Element, runs: Named) -> None:
    values = [flat(report.summary()) for _, report in runs]
    rows = [["", *(name for name, _ in runs)]]
    for label, key in compared_keys():
        cells = [number(value[key]) for value in values]
        if any(cell is not None for cell in cells):
            rows.append([label, *(with_ratio(cell, cells[0], i == 0) for i, cell in enumerate(cells))])
    table(SubElement(main, "div", {"class": "card wide"}), rows)


def _timeline_section(main: Element, name: str, report: Report, index: int) -> None:
    every = max(1, -(-len(report.records) // MAX_ROWS))
    shown = "every request" if every == 1 else f"every {every}th request"
    title = "Requests over time" + (f": {name}" if name else "")
    place = section(main, title, f"One row for {shown}, in the order they were sent.")
    legend = SubElement(place, "p", {"class": "legend"})
    kinds = {"wait": "waiting to be sent", "prefill": "until the first token", "decode": "decoding"}
    if report.slo:
        kinds["late"] = "missed the SLO"
    if any(not record.ok for record in report.records):
        kinds["failed"] = "failed"
    for kind, label in kinds.items():
        SubElement(legend, "span", {"class": f"key {kind}"})
        SubElement(legend, "span").text = label
    card(place, None, timeline(report))


def _details(main: Element, runs: Named) -> None:
    """All numbers and all settings, for whoever wants to repeat the run."""
    for name, report in runs:
        details = SubElement(main, "details", {"class": "card wide"})
        SubElement(details, "summary").text = f"All numbers and settings: {name}"
        summary = report.summary()
        rows = [["milliseconds", "mean", "p50", "p90", "p99", "max"]]
        for metric, values in summary.spreads.items():
            if values:
                cells = (values.mean, values.p50, values.p90, values.p99, values.max)
                rows.append([LABELS[metric], *(f"{cell * 1e3:,.2f}" for cell in cells)])
        table(details, rows)
        pairs = [
            *headline(report, summary),
            *((key.replace("_", "-"), value) for key, value in report.versions.items()),
        ]
        pairs += [(f"--{key.replace('_', '-')}", str(v)) for key, v in report.settings.items() if v is not None]
        table(details, [["", ""], *(list(pair) for pair in pairs)], "pairs")
