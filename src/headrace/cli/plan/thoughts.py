"""`headrace plan thoughts`: how many answers of how many tokens a budget buys for a question (Kinetics).

Examples:
  headrace plan thoughts qwen3-32b qwen3-8b --device H100-SXM --usd 0.01
  headrace plan thoughts llama-3.1-70b --device 4xH100-SXM --seconds 5 --prompt-tokens 500 --show-work
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from headrace.cli.plan.out import add_files, give, within

if TYPE_CHECKING:
    from headrace.sim.plan.answer import Answer


def add(questions: Any) -> None:
    from headrace.cli import Formatter

    parser = questions.add_parser(
        "thoughts", help="what a budget buys of test-time compute", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names of the catalogue, side by side")
    group = parser.add_argument_group("thoughts")
    group.add_argument("--device", default="H100-SXM", metavar="HW", help="of one replica (default: H100-SXM)")
    group.add_argument("--weights", default="bf16", help="format of the weights (default: bf16)")
    group.add_argument("--prompt-tokens", type=int, default=500, metavar="N", help="of a question (default: 500)")
    group.add_argument(
        "--beside", type=int, default=16, metavar="N", help="questions served side by side (default: 16)"
    )
    group.add_argument("--seconds", type=float, metavar="S", help="of a replica that a question may take")
    group.add_argument("--usd", type=float, metavar="X", help="that a question may cost (default: 0.01)")
    add_files(group, plan=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    return give(args, lambda: _found(args))


def _found(args: argparse.Namespace) -> Answer:
    from headrace.sim.plan import thoughts
    from headrace.sim.scenario import KVS, Scenario, parse_hardware, placement

    within("prompt-tokens", args.prompt_tokens, 1, 1_000_000)
    within("beside", args.beside, 1, 10_000)
    usd = 0.01 if args.usd is None and args.seconds is None else args.usd
    for name, value in (("usd", usd), ("seconds", args.seconds)):
        if value is not None:
            within(name, value, 1e-9, 1e9)
    topology, found = parse_hardware(args.device), list[thoughts.Thought]()
    price = topology.device.usd_per_hour
    for model in args.models:
        usual = Scenario()
        there = replace(usual.simulate, model=model, hardware=args.device, weights=args.weights)
        site, where = replace(usual, simulate=there).site(), placement(there)
        tokens = site.capacity.blocks * site.capacity.block_tokens
        cost = None if price is None else price * topology.devices
        place = thoughts.Place(model, where.shape, site.cost, site.windows, tokens, KVS[there.kv], cost, args.beside)
        found += thoughts.thoughts(place, args.prompt_tokens, args.seconds, usd)
    words = [] if args.seconds is None else [f"{args.seconds:g} s"]
    words += [] if usd is None else [f"${usd:g}"]
    subject = f"{', '.join(args.models)} on {args.device}"
    return thoughts.answer(found, subject, " and ".join(words) + " a question", args.prompt_tokens)
