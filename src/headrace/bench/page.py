"""The report as one HTML page with nothing outside it: no script, no font, no image, no link.

One run or several: every plot draws each run in its own colour, so a comparison is the same page with more lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

from headrace.bench import plot
from headrace.bench.metrics import Record, cumulative, is_good, token_rate, values_of
from headrace.bench.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDE, WIDTH, Scale
from headrace.bench.report import (
    LABELS,
    Report,
    compared_keys,
    describe,
    flat,
    headline,
    notes,
    number,
    short,
    with_ratio,
)

Named = Sequence[tuple[str, Report]]

MAX_RUNS = 6  # colours that can be told apart
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
    root = Element("html", {"lang": "en"})
    head = SubElement(root, "head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    SubElement(head, "title").text = f"headrace bench: {runs[0][1].model}"
    SubElement(head, "style").text = _STYLE
    main = SubElement(SubElement(root, "body"), "main")
    _header(main, runs)
    _figures(main, runs)
    grid = _section(main, "Latency distributions", "Share of requests (of gaps, for inter-token latency) at or below.")
    plots = SubElement(grid, "div", {"class": "plots"})
    for metric, title in _PLOTTED.items():
        _card(plots, title, cdf(runs, metric))
    _card(_section(main, "Throughput", "Output tokens per second as they arrived."), None, throughput(runs))
    for index, (name, report) in enumerate(runs):
        _timeline_section(main, name if len(runs) > 1 else "", report, index)
    _details(main, runs)
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def cdf(runs: Named, metric: str) -> Element:
    """Empirical distribution functions of one metric, with the promise if there is one."""
    svg = plot.frame(f"cumulative distribution of {_PLOTTED[metric]}")
    drawn = [values_of(report.records, metric) for _, report in runs]
    promise = runs[0][1].slo.get(metric)
    everything = [value for values in drawn for value in values]
    x = plot.value_scale([*everything, *([promise] if promise and everything else [])], LEFT, WIDTH - RIGHT)
    y = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    plot.y_axis(svg, y, plot.percent_text, "share")
    plot.x_axis(svg, x, plot.time_text, LABELS[metric] + (" (logarithmic)" if x.log else ""))
    for index, values in enumerate(drawn):
        if points := cumulative(values):
            plot.steps(svg, points, x, y, f"c{index}")
    if not everything:
        plot.text(svg, WIDTH / 2, HEIGHT / 2, "no values", "label")
    if promise:
        plot.marker(svg, x, promise, f"SLO {plot.time_text(promise)}")
    return svg


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
    cards = SubElement(main, "div", {"class": "figures"})
    figures = [
        ("output tokens/s", short(summary.output_tokens_per_s)),
        ("requests/s", short(summary.requests_per_s)),
        *(
            (f"{LABELS[metric]} p50 / p99", f"{plot.time_text(_round(s.p50))} / {plot.time_text(_round(s.p99))}")
            for metric in ("ttft", "tpot", "max_itl")
            if (s := summary.spreads[metric])
        ),
    ]
    if summary.goodput_fraction is not None:
        figures.append(("within the SLO", f"{100 * summary.goodput_fraction:.1f} %"))
    figures.append(("answered", f"{summary.completed:,} of {summary.requests:,}"))
    for label, value in figures:
        card = SubElement(cards, "div", {"class": "figure"})
        SubElement(card, "strong").text = value
        SubElement(card, "span").text = label


def _comparison(main: Element, runs: Named) -> None:
    values = [flat(report.summary()) for _, report in runs]
    rows = [["", *(name for name, _ in runs)]]
    for label, key in compared_keys():
        cells = [number(value[key]) for value in values]
        if any(cell is not None for cell in cells):
            rows.append([label, *(with_ratio(cell, cells[0], i == 0) for i, cell in enumerate(cells))])
    _table(SubElement(main, "div", {"class": "card wide"}), rows)


def _timeline_section(main: Element, name: str, report: Report, index: int) -> None:
    every = max(1, -(-len(report.records) // MAX_ROWS))
    shown = "every request" if every == 1 else f"every {every}th request"
    title = "Requests over time" + (f": {name}" if name else "")
    section = _section(main, title, f"One row for {shown}, in the order they were sent.")
    legend = SubElement(section, "p", {"class": "legend"})
    kinds = {"wait": "waiting to be sent", "prefill": "until the first token", "decode": "decoding"}
    if report.slo:
        kinds["late"] = "missed the SLO"
    if any(not record.ok for record in report.records):
        kinds["failed"] = "failed"
    for kind, label in kinds.items():
        SubElement(legend, "span", {"class": f"key {kind}"})
        SubElement(legend, "span").text = label
    _card(section, None, timeline(report))


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
        _table(details, rows)
        pairs = [
            *headline(report, summary),
            *((key.replace("_", "-"), value) for key, value in report.versions.items()),
        ]
        pairs += [(f"--{key.replace('_', '-')}", str(v)) for key, v in report.settings.items() if v is not None]
        _table(details, [["", ""], *(list(pair) for pair in pairs)], "pairs")


def _table(parent: Element, rows: Sequence[Sequence[str]], kind: str = "numbers") -> None:
    table = SubElement(SubElement(parent, "div", {"class": "scroll"}), "table", {"class": kind})
    for cells, tag in zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True):
        if any(cells):
            line = SubElement(table, "tr")
            for cell in cells:
                SubElement(line, tag).text = cell


def _section(main: Element, title: str, explanation: str) -> Element:
    section = SubElement(main, "section")
    SubElement(section, "h2").text = title
    SubElement(section, "p", {"class": "explanation"}).text = explanation
    return section


def _card(parent: Element, title: str | None, svg: Element) -> None:
    card = SubElement(parent, "figure", {"class": "card"})
    if title:
        SubElement(card, "figcaption").text = title
    card.append(svg)


def _round(seconds: float) -> float:
    return float(f"{seconds:.3g}")


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2733; --soft: #5b6b7b; --line: #e3e8ee;
  --c0: #1668b8; --c1: #c2571a; --c2: #23835a; --c3: #8a4bb3; --c4: #b3355f; --c5: #6c7413;
  --wait: #b9c3cf; --prefill: #e0a33a; --decode: #3b84cf; --bad: #c62f3b; }
@media (prefers-color-scheme: dark) {
  :root { --page: #11161c; --card: #19212a; --ink: #e4eaf0; --soft: #98a6b5; --line: #2b3642;
    --c0: #62aef2; --c1: #f0935a; --c2: #5cc798; --c3: #c590ea; --c4: #f0809f; --c5: #c3cb5e;
    --wait: #55636f; --prefill: #d9a548; --decode: #4f97dd; --bad: #f2616c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { margin: 0 0 4px; font-size: 26px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 36px 0 0; font-size: 18px; }
.run, .explanation, .legend { margin: 2px 0 12px; color: var(--soft); overflow-wrap: anywhere; }
.run { margin-bottom: 2px; }
.note { margin: 8px 0 0; padding-left: 10px; border-left: 3px solid var(--prefill); }
.dot { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 50%; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px; margin-top: 20px; }
.figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.figure strong { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.figure span { color: var(--soft); font-size: 13px; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
.card { margin: 0; }
.wide { margin-top: 20px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
svg { display: block; width: 100%; height: auto; }
.tick { font-size: 11px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.label { font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.area { fill-opacity: 0.16; stroke-width: 1.3; }
.promise { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 5 4; }
.promise-label { font-size: 11px; fill: var(--bad); }
.wait { fill: var(--wait); background: var(--wait); }
.prefill { fill: var(--prefill); background: var(--prefill); }
.decode { fill: var(--decode); background: var(--decode); }
.late, .failed { fill: var(--bad); background: var(--bad); }
.late { width: 4px; }
.key { display: inline-block; width: 12px; height: 12px; margin: 0 6px 0 14px; border-radius: 2px;
  vertical-align: -1px; }
.key:first-child { margin-left: 0; }
.key.late { width: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 10px; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; color: var(--soft); font-weight: 400; }
table.pairs td { text-align: left; }
summary { cursor: pointer; font-weight: 600; }
""" + "".join(
    f".line.c{i}, .area.c{i} {{ stroke: var(--c{i}); }} .area.c{i} {{ fill: var(--c{i}); }}\n"
    f".dot.c{i} {{ background: var(--c{i}); }}\n"
    for i in range(MAX_RUNS)
)
