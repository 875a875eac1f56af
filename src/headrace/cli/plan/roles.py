"""`headrace plan roles`: prompts and answers on replicas of their own (DistServe), or both on one? Which sizes, how
many of each, and whether it pays, by two metrics.

Examples:
  headrace plan roles --published --slo ttft=0.2,tpot=0.1
  headrace plan roles llama-3.1-70b --device 8xH100-SXM --lengths azure-chat --slo ttft=1.0,tpot=0.05 --rate 20
  headrace plan roles llama-3.1-8b --device 4xA100-80GB --link eth-100g --slo ttft=0.5,tpot=0.05
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.cli.plan.out import question, say, within
from headrace.core.config import BadSetting

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer

REQUESTS = 400  # more than run side by side on an instance, or its queue never shows


def add(questions: Any) -> None:
    question(
        questions,
        "roles",
        "prompts and answers on replicas of their own?",
        __doc__,
        _own,
        _found,
        device="8xH100-SXM",
        of="one node; instances are parts of it",
    )


def _own(group: Any) -> None:
    group.add_argument("--link", metavar="NAME", help="KV's way between instances; by default the node's fabric")
    group.add_argument("--rate", type=float, metavar="X", help="requests per second to serve: says how many of each")
    group.add_argument("--attain", type=float, default=0.9, metavar="X", help="share within each promise (0.9)")
    group.add_argument(
        "--published", action="store_true", help="OPT-13B on A100-80GB by the coefficients of DistServe's artifact"
    )


def _found(args: argparse.Namespace) -> Answer:
    from headrace.cli.plan.search import scenario_of
    from headrace.sim.hardware import link
    from headrace.sim.plan import roles, roles_told
    from headrace.workload.settings import parse_slo

    within("attain", args.attain, 0.01, 1.0)
    if args.rate is not None:
        within("rate", args.rate, 1e-3, 1e7)
    scenario = scenario_of(args, REQUESTS)
    slo = parse_slo(scenario.traffic[0].slo)
    ttft_s, token_s = roles_told.slo_of(slo.ttft_s if slo else None, slo.tpot_s if slo else None)
    simulate = replace(scenario.simulate, hardware=args.device, weights=args.weights)
    scenario = replace(scenario, simulate=simulate)
    arrivals = [replace(one, gap_s=None, session="") for one in scenario.arrivals()]
    if any(one.at_s is None for one in arrivals) or len(arrivals) < 2:
        raise BadSetting("roles need to know when requests come; give --arrivals with a rate, such as poisson:1")
    asked = roles.at_rate(arrivals, 1 / scenario.rate())
    road = link(args.link) if args.link else None
    if args.published:
        asked = [replace(one, output_tokens=min(one.output_tokens, 1024)) for one in asked if one.prompt_tokens <= 2048]
        sizes, subject = roles_told.published(road or link("nvlink3")), "OPT-13B on A100-80GB, published coefficients"
    else:
        longest = max(one.prompt_tokens for one in asked)
        sizes, subject = list(roles_told.sizes(scenario, road, longest)), f"{args.model} on {args.device}"
    found = roles.roles(asked, sizes, roles.Promise(ttft_s, token_s, args.attain), args.rate, say)
    best = f"{found.together.devices}x{args.device.split('x')[-1]}" if found.together.devices > 1 else ""
    one = replace(simulate, hardware=best or args.device.split("x")[-1])
    return roles_told.answer(found, subject, None if args.published else replace(scenario, simulate=one))
