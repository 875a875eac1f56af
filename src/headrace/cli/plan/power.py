"""`headrace plan power`: how many more servers fit under a row's power budget with capped clocks (POLCA), and what a
token costs in joules.

--arrivals is what ONE server gets in its busiest minutes.

Examples:
  headrace plan power llama-2-70b --device 8xA100-80GB --arrivals poisson:0.6 --lengths 1500:3500,100:400
  headrace plan power llama-3.1-70b --device 8xH100-SXM --servers 20 --extra 10,20,30 --arrivals poisson:2
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.cli.plan.out import question, within
from headrace.core.config import BadSetting

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer


def add(questions: Any) -> None:
    question(
        questions,
        "power",
        "how many more servers under a power budget",
        __doc__,
        _own,
        _found,
        model="llama-2-70b",
        device="8xA100-80GB",
        of="of one server",
        plan=False,
    )


def _own(group: Any) -> None:
    group.add_argument("--servers", type=int, default=40, metavar="N", help="of the row, as provisioned (default: 40)")
    group.add_argument("--extra", default="10,20,30,40,50", metavar="LIST", help="per cent more (10,20,30,40,50)")
    group.add_argument(
        "--minutes", type=float, default=10.0, metavar="X", help="of the rise and the peak (default: 10)"
    )
    group.add_argument(
        "--rest-w", type=float, default=1400.0, metavar="W", help="of a server beside its devices (1400)"
    )
    group.add_argument("--processes", type=int, metavar="N", help="processor cores to use (default: all)")


def _found(args: argparse.Namespace) -> Answer:
    from headrace.cli.plan.search import scenario_of
    from headrace.sim.plan import power, power_told
    from headrace.sim.scenario import parse_hardware
    from headrace.sim.workers import forked

    within("servers", args.servers, 1, 1000)
    within("minutes", args.minutes, 0.5, 600)
    within("rest-w", args.rest_w, 0, 1e6)
    scenario = scenario_of(args)
    simulate = replace(scenario.simulate, hardware=args.device, weights=args.weights)
    scenario = replace(scenario, simulate=simulate)
    topology, asked, site = parse_hardware(args.device), list(scenario.arrivals()), scenario.site()
    if not topology.device.max_w:
        raise BadSetting(f"nobody published what {topology.device.name} draws; take another device")
    static_w, each = topology.device.static_w * topology.devices, forked(args.processes or os.cpu_count() or 1)
    seconds, extras = 60 * args.minutes, _extras(args.extra)
    found = power.power(asked, site, scenario.rate(), args.servers, extras, seconds, static_w, args.rest_w, each)
    return power_told.answer(found, f"{args.servers} servers of {args.device} with {args.model}", seconds)


def _extras(text: str) -> list[float]:
    try:
        found = sorted({float(word) / 100 for word in text.split(",") if word.strip()})
    except ValueError as error:
        raise BadSetting(f"--extra {text!r} is not a list of per cents such as 10,20,30") from error
    if not found or not 0 < found[0] <= found[-1] <= 5 or len(found) > 20:
        raise BadSetting("--extra needs 1 to 20 numbers above 0 and up to 500")
    return found
