"""The frame of every report: one HTML document with nothing outside it, no script, no font, no image, no link."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, SubElement, tostring

MAX_RUNS = 6  # colours that can be told apart


def document(title: str) -> tuple[Element, Element]:
    """An empty page: its root, and the element that everything goes into."""
    root = Element("html", {"lang": "en"})
    head = SubElement(root, "head")
    SubElement(head, "meta", {"charset": "utf-8"})
    SubElement(head, "meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"})
    SubElement(head, "title").text = title
    SubElement(head, "style").text = _STYLE
    return root, SubElement(SubElement(root, "body"), "main")


def text_of(root: Element) -> str:
    """The page as a file's content."""
    return "<!doctype html>\n" + tostring(root, encoding="unicode", method="html") + "\n"


def figures(parent: Element, pairs: Sequence[tuple[str, str]]) -> None:
    """The numbers people look for first, as (label, value) cards."""
    cards = SubElement(parent, "div", {"class": "figures"})
    for label, value in pairs:
        one = SubElement(cards, "div", {"class": "figure"})
        SubElement(one, "strong").text = value
        SubElement(one, "span").text = label


def table(parent: Element, rows: Sequence[Sequence[str]], kind: str = "numbers") -> None:
    table = SubElement(SubElement(parent, "div", {"class": "scroll"}), "table", {"class": kind})
    for cells, tag in zip(rows, ["th", *["td"] * (len(rows) - 1)], strict=True):
        if any(cells):
            line = SubElement(table, "tr")
            for cell in cells:
                SubElement(line, tag).text = cell


def section(main: Element, title: str, explanation: str) -> Element:
    section = SubElement(main, "section")
    SubElement(section, "h2").text = title
    SubElement(section, "p", {"class": "explanation"}).text = explanation
    return section


def card(parent: Element, title: str | None, svg: Element) -> None:
    card = SubElement(parent, "figure", {"class": "card"})
    if title:
        SubElement(card, "figcaption").text = title
    card.append(svg)


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
.told { margin-right: 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: 10px; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 4px 16px 4px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; color: var(--soft); font-weight: 400; }
table.pairs td { text-align: left; }
summary { cursor: pointer; font-weight: 600; }
""" + "".join(
    f".line.c{i}, .area.c{i} {{ stroke: var(--c{i}); }} .area.c{i} {{ fill: var(--c{i}); }}\n"
    f".dot.c{i} {{ background: var(--c{i}); }} .spot.c{i} {{ fill: var(--c{i}); }}\n"
    for i in range(MAX_RUNS)
)
