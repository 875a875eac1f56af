"""`headrace plan fit`: does a model fit, how many requests fit beside it, and how fast would it be?

Examples:
  headrace plan fit llama-3.1-70b --device 4xH100-SXM
  headrace plan fit qwen3-30b-a3b --device L40S --weights fp8 --show-work
  headrace plan fit ./config.json --device RTX-4090 --prompt-tokens 2000 --output-tokens 300 --json fit.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headrace.core import config

MODEL_HELP = "a name of the catalogue (headrace simulate --list models), or a config.json of Hugging Face"


def add(questions: Any) -> None:
    from headrace.cli import Formatter
    from headrace.sim.plan.settings import FitSettings

    parser = questions.add_parser(
        "fit", help="does a model fit, and how fast would it be", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with a section [fit]")
    parser.add_argument("--show-work", action="store_true", help="every number with its formula")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report that needs nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers for a program")
    config.add_flags(parser, FitSettings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.cli.files import check_writable, write
    from headrace.sim.plan import fit_told
    from headrace.sim.plan.fit import fit
    from headrace.sim.plan.settings import FitSettings

    check_writable(args.html, args.json)
    found = fit(args.model, config.load(FitSettings, args, config.read_toml(args.config)))
    print(fit_told.told(found, args.show_work), end="")
    write(args.html, lambda: fit_told.html(found))
    write(args.json, lambda: fit_told.as_json(found))
    return 0
