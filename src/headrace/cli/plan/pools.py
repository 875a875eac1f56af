"""`headrace plan pools`: how many replicas for a rate, in one pool or in two by length; formulas, then simulation.

Examples:
  headrace plan pools llama-3.1-70b --device 8xH100-SXM --rate 2000 --lengths azure-chat --slo ttft=1.0
  headrace plan pools llama-3.1-8b --device A100-80GB --trace traffic.csv --rate 100 --slo ttft=0.5,tpot=0.05
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.cli.plan.out import question, say
from headrace.core.config import BadSetting

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer


def add(questions: Any) -> None:
    question(questions, "pools", "how many replicas for a rate, in one pool or two", __doc__, _own, _found)


def _own(group: Any) -> None:
    group.add_argument("--rate", type=float, metavar="X", help="requests per second, if not those of the traffic")
    group.add_argument("--attain", type=float, default=0.99, metavar="X", help="share that must keep --slo (0.99)")


def _found(args: argparse.Namespace) -> Answer:
    from headrace.cli.plan.search import scenario_of
    from headrace.sim.plan import fleet
    from headrace.workload.settings import parse_slo

    scenario = scenario_of(args)
    slo = parse_slo(scenario.traffic[0].slo)
    slo_s = fleet.needs_slo(slo.ttft_s if slo else None)
    scenario = replace(scenario, simulate=replace(scenario.simulate, hardware=args.device, weights=args.weights))
    rate = args.rate if args.rate is not None else scenario.rate()
    if not 0 < rate < 1e7:
        raise BadSetting(f"--rate is {rate}; it must be above 0 and below ten million requests per second")
    found = fleet.fleet(scenario, rate, slo_s, say)
    say("the same with one thing at a time 10 % worse ...")
    return fleet.answer(found, rate, scenario, fleet.swings_of(scenario, rate, found))
