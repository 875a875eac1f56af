"""What every question of the planner is answered with, and its three forms: words for a terminal, a page, JSON. Decides
nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from xml.etree.ElementTree import SubElement

from headrace.draw import page
from headrace.draw.text import aligned


@dataclass(frozen=True, slots=True)
class Part:
    """A table under a heading. The first row names the columns."""

    title: str
    explanation: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """The recommendation first, then why, then how sure it is."""

    title: str
    headline: Sequence[str]
    parts: Sequence[Part]
    rejected: Sequence[str]  # with the reason of each
    sure: Sequence[str]  # what it rests on, and how it moves if that is 10 % off
    work: Sequence[str]  # formulas, with their numbers
    numbers: Mapping[str, object]  # for a program
    plan: str | None = None  # TOML that `simulate --plan` and `serve --plan` read


def told(answer: Answer, show_work: bool = False) -> str:
    """For the terminal."""
    lines = [*answer.headline]
    for part in answer.parts:
        lines += ["", f"{part.title}:", *(f"  {line}" for line in table(part.rows))]
    for title, some in (("Turned down", answer.rejected), ("How sure", answer.sure)):
        lines += ["", f"{title}:", *(f"  {line}" for line in some)] if some else []
    lines += ["", "Work:", *(f"  {line}" for line in answer.work)] if show_work else []
    return "\n".join(lines) + "\n"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    return aligned(rows, "<" + ">" * (len(rows[0]) - 1))


def html(answer: Answer) -> str:
    """A page that needs nothing else."""
    root, main = page.document(answer.title)
    SubElement(main, "h1").text = answer.title
    for line in answer.headline:
        SubElement(main, "p", {"class": "run"}).text = line.strip()
    for part in answer.parts:
        page.table(page.section(main, part.title, part.explanation), part.rows)
    told_of = (
        ("What was turned down, and why", "", answer.rejected),
        ("How sure is this?", "What the answer rests on, and what if that is 10 % off.", answer.sure),
        ("Work", "Formulas with their numbers.", answer.work),
    )
    for title, explanation, some in told_of:
        if some:
            page.table(page.section(main, title, explanation), [[""], *([line.strip()] for line in some)], "pairs")
    if answer.plan:
        details = SubElement(main, "details", {"class": "card wide"})
        SubElement(details, "summary").text = "The plan file"
        SubElement(details, "pre").text = answer.plan
    return page.text_of(root)


def as_json(answer: Answer) -> str:
    """All numbers, with the words beside them."""
    words = {"question": answer.title, "answer": list(answer.headline), "sure": list(answer.sure)}
    return json.dumps({**words, **answer.numbers}, indent=2, default=str) + "\n"


def section(name: str, settings: object, always: Sequence[str] = ()) -> list[str]:
    """Settings that are not as usual as a section of a plan file."""
    usual = type(settings)()
    values = [(one.name, getattr(settings, one.name)) for one in fields(settings)]  # type: ignore[arg-type]
    return [
        "",
        f"[{name}]",
        *(
            f"{key} = {toml(value)}"
            for key, value in values
            if value is not None and (key in always or value != getattr(usual, key))
        ),
    ]


def toml(value: object) -> str:
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(str(value), ensure_ascii=False)
