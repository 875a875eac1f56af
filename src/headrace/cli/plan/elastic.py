"""`headrace plan elastic`: what replicas cost that come and go: cold starts, keep-alive, scale to zero.

Examples:
  headrace plan elastic llama-3.1-8b --device L40S --arrivals poisson:0.02 --requests 300 --slo ttft=60
  headrace plan elastic llama-3.1-70b --device 4xH100-SXM --disk 7 --most 4 --trace traffic.csv --slo ttft=5,tpot=0.1
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.cli.plan.out import question, say, within
from headrace.core.config import BadSetting

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer


def add(questions: Any) -> None:
    question(questions, "elastic", "replicas that come and go: cold starts and cost", __doc__, _own, _found)


def _own(group: Any) -> None:
    group.add_argument("--most", type=int, default=2, metavar="N", help="replicas at a time (default: 2)")
    group.add_argument("--per-replica", type=float, default=16.0, metavar="X", help="requests one should have (16)")
    group.add_argument(
        "--disk", type=float, default=3.0, metavar="GBps", help="that weights are read with (default: 3)"
    )
    group.add_argument("--process-s", type=float, default=6.0, metavar="S", help="container, imports, contexts (6)")
    group.add_argument("--warm-s", type=float, default=4.0, metavar="S", help="memory for KV, first step (4)")
    group.add_argument("--attain", type=float, default=0.99, metavar="X", help="share that must keep --slo (0.99)")


def _found(args: argparse.Namespace) -> Answer:
    from headrace.cli.plan.search import scenario_of
    from headrace.cluster.scaling import ColdStart
    from headrace.sim.plan import elastic
    from headrace.sim.scenario import parse_hardware, placement
    from headrace.workload.settings import parse_slo

    bounds = {
        "most": (1, 200),
        "per_replica": (0.1, 1e5),
        "disk": (1e-3, 1e4),
        "process_s": (0, 1e5),
        "warm_s": (0, 1e5),
    }
    for name, (low, high) in bounds.items():
        within(name.replace("_", "-"), getattr(args, name), low, high)
    scenario = scenario_of(args)
    scenario = replace(scenario, simulate=replace(scenario.simulate, hardware=args.device, weights=args.weights))
    topology, where = parse_hardware(args.device), placement(scenario.simulate)
    arrivals = [replace(one, gap_s=None, session="") for one in scenario.arrivals()]
    if not arrivals or any(one.at_s is None for one in arrivals):
        raise BadSetting("a fleet needs to know when requests come; give --arrivals with a rate, such as poisson:1")
    chip = topology.device
    road = chip.host.bytes_per_s if chip.host else chip.memory_bytes_per_s
    devices = topology.devices
    start = ColdStart(where.weight_bytes * devices, devices, 1e9 * args.disk, road, args.process_s, args.warm_s)
    usd = None if chip.usd_per_hour is None else chip.usd_per_hour * devices
    slo, site = parse_slo(scenario.traffic[0].slo), scenario.site()
    found = elastic.elastic(arrivals, site, start, slo, args.attain, args.per_replica, args.most, usd, say)
    return elastic.answer(found, f"{args.model} on {args.device}", scenario)
