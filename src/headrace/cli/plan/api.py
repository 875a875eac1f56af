"""`headrace plan api`: what an API's latencies say about the model and hardware behind it.

FILE has lines of prompt tokens, output tokens and seconds; repeats of a size are welcome.

Examples:
  headrace plan api latencies.csv
  headrace plan api latencies.csv --model llama-3.1-70b --device 8xH100-SXM --show-work
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.plan.out import add_files, give
from headrace.core.config import BadSetting

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer

MOST_BYTES = 1 << 24


def add(questions: Any) -> None:
    from headrace.cli import Formatter

    parser = questions.add_parser(
        "api", help="what an API's latencies say", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("runs", type=Path, metavar="FILE", help="prompt tokens, output tokens, seconds")
    group = parser.add_argument_group("api")
    group.add_argument("--model", metavar="MODEL", help="that may be behind it (headrace simulate --list models)")
    group.add_argument("--device", default="8xH100-SXM", metavar="HW", help="it may run on (default: 8xH100-SXM)")
    group.add_argument("--weights", default="bf16", help="format of the weights (default: bf16)")
    add_files(group, plan=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return give(args, lambda: _found(args))


def _found(args: argparse.Namespace) -> Answer:
    from headrace.sim.plan import api
    from headrace.sim.scenario import Scenario, parse_hardware

    try:
        if args.runs.stat().st_size > MOST_BYTES:
            raise BadSetting(f"{args.runs} is too large to be a table of latencies")
        runs = api.read(args.runs.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetting(f"cannot read {args.runs}: {error}") from error
    cost, usd = None, None
    windows: tuple[int, ...] = ()
    if args.model:
        usual = Scenario()
        simulate = replace(usual.simulate, model=args.model, hardware=args.device, weights=args.weights)
        site, topology = replace(usual, simulate=simulate).site(), parse_hardware(args.device)
        cost, windows = site.cost, site.windows
        price = topology.device.usd_per_hour
        usd = None if price is None else price * topology.devices
    return api.answer(api.api(runs, cost, windows, usd), f"{args.model} on {args.device}")
