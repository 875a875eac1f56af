"""`headrace plan MODEL`: the best way to serve a model on some devices: how many, cut how, in which format.

Memory turns most of the space down, bounds turn down more, the simulator judges the rest on your traffic.

Examples:
  headrace plan llama-3.1-70b --devices 8xH100-SXM --arrivals poisson:4 --slo ttft=1.0,tpot=0.05
  headrace plan deepseek-v3 --devices 4x8xH100-SXM@ib-ndr --formats fp8 --trace t.csv --slo ttft=2 --html plan.html
  headrace plan llama-3.1-8b --devices 4xL4 2xA100-80GB --arrivals poisson:2 --slo tpot=0.1 --out plan.toml
  headrace plan --interactive
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.plan.fit import MODEL_HELP
from headrace.core import clock, config
from headrace.core.config import BadSetting, EngineSettings

if TYPE_CHECKING:
    from headrace.sim.plan.space import Pool
    from headrace.sim.scenario import Scenario

REQUESTS = 600  # of made traffic, if nobody says otherwise


def add(questions: Any) -> None:
    from headrace.cli import Formatter
    from headrace.workload.settings import WorkloadSettings

    parser = questions.add_parser(
        "search", help="the best way to serve a model on some devices", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("model", nargs="?", default="llama-3.1-8b", help=MODEL_HELP + " (default: llama-3.1-8b)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file: [engine], [workload]")
    group = parser.add_argument_group("plan")
    group.add_argument(
        "--devices",
        nargs="+",
        default=["8xH100-SXM"],
        metavar="HW",
        help="what may be used: 8xNAME, 4x8xNAME@LINK, ...",
    )
    group.add_argument("--formats", default="bf16,fp8", metavar="LIST", help="of weights (default: bf16,fp8)")
    group.add_argument("--kv-formats", default="bf16", metavar="LIST", help="of keys and values (default: bf16)")
    group.add_argument(
        "--objective", choices=("cost", "latency", "energy", "throughput"), default="cost", help="(default: cost)"
    )
    group.add_argument("--attain", type=float, default=0.99, metavar="X", help="share that must keep --slo (0.99)")
    group.add_argument("--prices", type=Path, metavar="FILE", help="TOML: [usd_per_hour] NAME = PRICE of one device")
    group.add_argument("--simulations", type=int, default=200, metavar="N", help="at most so many (default: 200)")
    group.add_argument("--processes", type=int, metavar="N", help="processor cores to use (default: all)")
    group.add_argument("--interactive", action="store_true", help="ask what is needed, one question at a time")
    group.add_argument("--show-work", action="store_true", help="the formulas behind the answer, with their numbers")
    group.add_argument("--out", type=Path, metavar="FILE", help="write the plan, for simulate --plan and serve --plan")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a report that needs nothing else")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all numbers for a program")
    for settings in (WorkloadSettings, EngineSettings):
        config.add_flags(parser, settings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.cli.files import check_writable, write
    from headrace.sim.plan import told
    from headrace.sim.plan.search import parse_formats, search, swings
    from headrace.sim.settings import FORMATS
    from headrace.sim.workers import forked

    if args.interactive:
        from headrace.cli.plan.ask import answered

        answered(args, input)
    check_writable(args.out, args.html, args.json)
    begun_s, processes = clock.perf(), args.processes or os.cpu_count() or 1
    if not 1 <= args.simulations <= 100_000:
        raise BadSetting(f"--simulations is {args.simulations}; it must be between 1 and 100000")
    found = search(
        scenario_of(args),
        pools(args.devices, args.prices),
        parse_formats(args.formats, args.kv_formats, FORMATS),
        forked(processes),
        at_once=processes,
        objective=args.objective,
        budget=args.simulations,
        heard=_say,
    )
    found.swings = swings(found, forked(processes))
    _say(f"{len(found.judged)} plans simulated in {clock.perf() - begun_s:.1f} s")
    print(told.told(found, args.show_work), end="")
    if found.best is None:
        return 1
    write(args.out, lambda: told.plan_file(found))
    write(args.html, lambda: told.html(found))
    write(args.json, lambda: told.as_json(found))
    return 0


def scenario_of(args: argparse.Namespace, requests: int = REQUESTS) -> Scenario:
    """The traffic and the engine; what it meets is searched. Made traffic has so many requests, if nobody says."""
    from headrace.sim.plan.search import engine_for
    from headrace.sim.scenario import Scenario
    from headrace.sim.settings import SimulateSettings
    from headrace.workload.settings import WorkloadSettings, parse_slo, parts

    toml = config.read_toml(args.config)
    args.__dict__.setdefault("workload.requests", None)
    traffic = []
    for part in parts(toml):
        table = {"requests": requests, **part.get("workload", {})}
        made = config.load(WorkloadSettings, args, {"workload": table})
        traffic.append(config.load(WorkloadSettings, args, part) if made.trace or made.seconds else made)
    slo = parse_slo(traffic[0].slo)
    given = getattr(args, "engine.inter_token_ms", None) is not None or "inter_token_ms" in toml.get("engine", {})
    engine = engine_for(config.load(EngineSettings, args, toml), slo.tpot_s if slo else None, given)
    return Scenario(SimulateSettings(model=args.model, attain=getattr(args, "attain", 0.99)), engine, tuple(traffic))


def pools(devices: list[str], prices: Path | None) -> list[Pool]:
    """What may be used, with the prices of the file over those of the catalogue."""
    from headrace.sim.plan.space import Pool
    from headrace.sim.scenario import parse_hardware

    table = config.read_toml(prices).get("usd_per_hour", {})
    known = {str(name).lower(): price for name, price in table.items()}
    for name, price in known.items():
        if not isinstance(price, int | float) or not 0 <= price < 1e6:
            raise BadSetting(f"the price of {name} is {price!r}; it must be a number of dollars an hour")
    found = []
    for text in devices:
        topology = parse_hardware(text)
        chip = topology.device
        found.append(Pool(topology, known.get(chip.name.lower(), chip.usd_per_hour)))
    return found


def _say(what: str) -> None:
    print(what, file=sys.stderr)
