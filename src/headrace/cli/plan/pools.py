"""`headrace plan pools`: how many replicas for a rate, in one pool or in two by length; formulas, then simulation.

Examples:
  headrace plan pools llama-3.1-70b --device 8xH100-SXM --rate 2000 --lengths azure-chat --slo ttft=1.0
  headrace plan pools llama-3.1-8b --device A100-80GB --trace traffic.csv --rate 100 --slo ttft=0.5,tpot=0.05
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.plan.fit import MODEL_HELP
from headrace.cli.plan.out import add_files, give, say
from headrace.core import config
from headrace.core.config import BadSetting, EngineSettings

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer


def add(questions: Any) -> None:
    from headrace.cli import Formatter
    from headrace.workload.settings import WorkloadSettings

    parser = questions.add_parser(
        "pools", help="how many replicas for a rate, in one pool or two", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("model", nargs="?", default="llama-3.1-8b", help=MODEL_HELP + " (default: llama-3.1-8b)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file: [engine], [workload]")
    group = parser.add_argument_group("pools")
    group.add_argument("--device", default="H100-SXM", metavar="HW", help="of one replica (default: H100-SXM)")
    group.add_argument("--weights", default="bf16", help="format of the weights (default: bf16)")
    group.add_argument("--rate", type=float, metavar="X", help="requests per second, if not those of the traffic")
    group.add_argument("--attain", type=float, default=0.99, metavar="X", help="share that must keep --slo (0.99)")
    add_files(group)
    for settings in (WorkloadSettings, EngineSettings):
        config.add_flags(parser, settings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return give(args, lambda: _found(args))


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
