"""What the questions of `headrace plan` have in common: their flags, and what they may write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.files import check_writable, write
from headrace.cli.plan.fit import MODEL_HELP
from headrace.core import config
from headrace.core.config import BadSetting, EngineSettings

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer


Group = Any  # of flags; argparse has no public name for it


def question(
    questions: Any,
    name: str,
    about: str,
    description: str | None,
    own: Callable[[Group], None],
    find: Callable[[argparse.Namespace], Answer],
    *,
    model: str = "llama-3.1-8b",
    device: str = "H100-SXM",
    of: str = "of one replica",
    plan: bool = True,
) -> None:
    """Add a question about a model, a device and traffic. `own` adds the flags that only this one has."""
    from headrace.cli import Formatter
    from headrace.workload.settings import WorkloadSettings

    parser = questions.add_parser(name, help=about, description=description, formatter_class=Formatter)
    parser.add_argument("model", nargs="?", default=model, help=f"{MODEL_HELP} (default: {model})")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file: [engine], [workload]")
    group = parser.add_argument_group(name)
    group.add_argument("--device", default=device, metavar="HW", help=f"{of} (default: {device})")
    group.add_argument("--weights", default="bf16", help="format of the weights (default: bf16)")
    own(group)
    add_files(group, plan)
    for settings in (WorkloadSettings, EngineSettings):
        config.add_flags(parser, settings)
    parser.set_defaults(run=lambda args: give(args, lambda: find(args)))


def add_files(group: Group, plan: bool = True) -> None:
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
