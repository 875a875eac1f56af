"""What every question of `headrace plan` may write, and the flags for it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.files import check_writable, write
from headrace.core.config import BadSetting

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer


def add_files(group: Any, plan: bool = True) -> None:
    group.add_argument("--show-work", action="store_true", help="the formulas behind the answer, with their numbers")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a report that needs nothing else")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all numbers for a program")
    if plan:
        group.add_argument("--out", type=Path, metavar="FILE", help="write the plan, for simulate and serve --plan")


def give(args: argparse.Namespace, find: Callable[[], Answer]) -> int:
    """Find the answer, print it, and write what was asked for."""
    from headrace.sim.plan import answer

    check_writable(args.html, args.json, getattr(args, "out", None))
    found = find()
    print(answer.told(found, args.show_work), end="")
    write(args.html, lambda: answer.html(found))
    write(args.json, lambda: answer.as_json(found))
    if getattr(args, "out", None):
        if found.plan is None:
            raise BadSetting("this answer is no plan; leave --out out")
        write(args.out, lambda: found.plan or "")
    return 0


def say(what: str) -> None:
    print(what, file=sys.stderr)


def within(name: str, value: float, low: float, high: float) -> float:
    """Raises BadSetting for a number outside its bounds; NaN is outside of all."""
    if not low <= value <= high:
        raise BadSetting(f"--{name} is {value}; it must be between {low:g} and {high:g}")
    return value
