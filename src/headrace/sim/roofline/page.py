"""The roofline as one HTML page with nothing outside it: limits as lines, what was reached below them."""

from __future__ import annotations

from xml.etree.ElementTree import Element, SubElement

from headrace.draw import plot
from headrace.draw.page import MAX_RUNS, card, document, figures, section, table, text_of
from headrace.draw.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale
from headrace.sim.roofline.report import (
    Decode,
    Roofline,
    decode_rows,
    machine,
    part_rows,
    peaks,
    prefill_rows,
)


def page(found: Roofline) -> str:
    """The whole document."""
    root, main = document(f"headrace bench roofline: {found.model}")
    header = SubElement(main, "header")
    SubElement(header, "h1").text = found.model
    told = f"weights {found.stored.weights}, KV {found.stored.kv}, {machine(found)}"
    SubElement(header, "p", {"class": "run"}).text = told
    figures(main, peaks(found))
    place = section(main, "Decoding", "The upper line of each plot is the limit, the lower one what was reached.")
    plots = SubElement(place, "div", {"class": "plots"})
    for context in sorted({one.limit.context for one in found.decodes})[:MAX_RUNS]:
        card(plots, f"At a context of {context:,} tokens", _curves(found, context))
    table(place, decode_rows(found))
    if found.prefills:
        table(section(main, "Prompts", "One step that computes the whole prompt."), prefill_rows(found))
    parts = part_rows(found)
    if len(parts) > 1:
        told = "Milliseconds of a decode step, in brackets those of the limit."
        table(section(main, "Where the time goes", told), parts)
    return text_of(root)


def _curves(found: Roofline, context: int) -> Element:
    """Tokens per second over requests side by side, both logarithmic."""
    here = [one for one in found.decodes if one.limit.context == context]
    svg = plot.frame(f"tokens per second at a context of {context}")
    most = max(one.limit.tokens_per_s for one in here)
    least = min(_least(one) for one in here)
    x = Scale(1.0, max(2.0, *(float(one.limit.rows) for one in here)), LEFT, WIDTH - RIGHT, log=True)
    y = Scale(least * 0.8, most * 1.2, HEIGHT - BOTTOM, TOP, log=True)
    plot.y_axis(svg, y, plot.count_text, "tokens/s")
    plot.x_axis(svg, x, plot.count_text, "requests side by side")
    plot.polyline(svg, [(one.limit.rows, one.limit.tokens_per_s) for one in here], x, y, "c0")
    reached = [(float(one.limit.rows), one.tokens_per_s) for one in here if one.tokens_per_s is not None]
    if reached:
        plot.polyline(svg, reached, x, y, "c1")
    return svg


def _least(one: Decode) -> float:
    return min(one.limit.tokens_per_s, one.tokens_per_s or one.limit.tokens_per_s)
