"""What a search for settings came to, in words: a table with the reasons for the terminal, and a config file whose
comments say where it comes from. Decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields

from headrace.core.config import EngineSettings
from headrace.draw.text import aligned, short
from headrace.sim.scenario import Scenario
from headrace.sim.slices import Slice
from headrace.sim.table import subject
from headrace.sim.tune import Axis, Change, Score, Tuned, Value
from headrace.workload.settings import WorkloadSettings

FULL = 0.999  # share of the requests: where so many keep their SLO, there is little to gain


def told(tuned: Tuned) -> str:
    """For the terminal: both slices, by how much, and why."""
    return "\n".join([*_table(tuned), "", *verdict(tuned), *_reasons(tuned)]) + "\n"


def goodput(score: Score, piece: Slice) -> float:
    """Requests per second of the slice that kept their SLO."""
    return score.good / piece.seconds


def gain(before: float, after: float) -> str:
    """'+12.3 %'."""
    return f"{100 * (after / before - 1):+.1f} %" if before else f"{after:+.3g} from nothing"


def verdict(tuned: Tuned) -> list[str]:
    """What was found, and whether it is any good."""
    last, (given, found) = tuned.slices.held_out, tuned.held_out
    before, after = (goodput(score, last) for score in (given, found))
    words = f"{_rate(after)} instead of {_rate(before)} requests/s keep their SLO, {gain(before, after)}"
    lines = []
    if not tuned.changes:
        lines.append("NOTHING FOUND that is better than what was given; that is what is written.")
    elif tuned.better:
        lines.append(f"BETTER on the held-out slice: {words}.")
    else:
        lines.append(f"NOT BETTER on the held-out slice: {words}. What was given is written, not what was found.")
    if min(given.kept, tuned.train[0].kept) >= FULL:
        lines.append("What was given keeps nearly every promise at this load; tune at one that it cannot: --speed 2.")
    return lines


def config_file(scenario: Scenario, axes: Sequence[Axis], tuned: Tuned) -> str:
    """TOML for `serve --config` and `simulate --config`: what was searched, and what is not at its default."""
    reasons = {change.field: _why(tuned, change) for change in tuned.changes} if tuned.better else {}
    searched, usual = {axis.field for axis in axes}, EngineSettings()
    lines = []
    for field in fields(EngineSettings):
        value = getattr(tuned.chosen, field.name)
        if field.name in searched or value != getattr(usual, field.name):
            reason = f"  # {reasons[field.name]}" if field.name in reasons else ""
            lines.append(f"{_assigned(field.name, value)}{reason}")
    return "\n".join([*_comments(_origin(scenario, tuned)), "[engine]", *lines]) + "\n"


def _assigned(name: str, value: object) -> str:
    """TOML has no None: what is not there is at its default."""
    return f"# {name} is derived, as by default" if value is None else f"{name} = {_toml(value)}"


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)


def _comments(lines: Sequence[str]) -> list[str]:
    """No text from outside ends a comment."""
    return [f"# {part}".rstrip() for line in lines for part in (line.splitlines() or [""])]


def _origin(scenario: Scenario, tuned: Tuned) -> list[str]:
    return [
        "Written by `headrace tune`.",
        subject(scenario, scenario.site()),
        *(f"traffic: {_said(part, WorkloadSettings())}" for part in scenario.traffic),
        f"{tuned.simulations} simulations",
        "",
        *_table(tuned),
        "",
        *verdict(tuned),
    ]


def _said(settings: WorkloadSettings, usual: WorkloadSettings) -> str:
    """What is not as usual, enough to make the same traffic again."""
    given = ((field.name, getattr(settings, field.name)) for field in fields(settings))
    return ", ".join(f"{name} {value}" for name, value in given if value != getattr(usual, name)) or "as usual"


def _table(tuned: Tuned) -> list[str]:
    """As given and found, on both slices."""
    pairs = ((tuned.slices.train, tuned.train), (tuned.slices.held_out, tuned.held_out))
    columns = [_numbers(score, piece) for piece, scores in pairs for score in scores]
    rows = [["", "as given", "found", "held out: as given", "found"]]
    rows += [[name, *(column[name] for column in columns)] for name in columns[0]]
    return aligned(rows, "<>>>>")


def _numbers(score: Score, piece: Slice) -> dict[str, str]:
    return {
        "seconds": f"{piece.seconds:,.0f}",
        "goodput, requests/s": _rate(goodput(score, piece)),
        "kept their SLO": f"{score.kept:.2%}",
        "p99 TTFT ms": _ms(score.ttft_p99_s),
        "p99 TPOT ms": _ms(score.tpot_p99_s),
        "answered": f"{score.completed:,}",
        "refused": f"{score.refused:,}",
        "preemptions": f"{score.preemptions:,}",
    }


def _reasons(tuned: Tuned) -> list[str]:
    return [f"  {change.field} = {_shown(change.after)}: {_why(tuned, change)}" for change in tuned.changes]


def _why(tuned: Tuned, change: Change) -> str:
    """What a change is worth: the held-out slice with all changes but this one."""
    found, without, last = tuned.held_out[1], change.without, tuned.slices.held_out
    was = f"was {_shown(change.before)}; with that alone undone"
    if without.failed:
        return f"{was}, it does not run: {without.failed}"
    lost = gain(goodput(found, last), goodput(without, last))
    moved = [
        f"p99 {name} {_ms(after)} instead of {_ms(before)} ms"
        for name, before, after in (
            ("TTFT", found.ttft_p99_s, without.ttft_p99_s),
            ("TPOT", found.tpot_p99_s, without.tpot_p99_s),
        )
        if before and after and not 0.95 < after / before < 1.05
    ]
    return ", ".join([f"{was}, goodput {lost}", *moved])


def _shown(value: Value) -> str:
    return "derived" if value is None else str(value)


def _rate(rate: float) -> str:
    return short(float(f"{rate:.4g}"))


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.0f}"
