"""`headrace plan mix`: the cheapest mix of device types for traffic of many sizes (Mélange), confirmed by simulation.

Examples:
  headrace plan mix llama-3.1-8b --types A10G L40S A100-80GB H100-SXM --arrivals poisson:20 --slo tpot=0.08
  headrace plan mix llama-3.1-70b --types 2xA100-80GB 2xH100-SXM --market prices.toml --trace t.csv --slo tpot=0.1
  headrace plan mix --table measured.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from headrace.cli.plan.fit import MODEL_HELP
from headrace.core import config
from headrace.core.config import BadSetting, EngineSettings


def add(questions: Any) -> None:
    from headrace.cli import Formatter
    from headrace.workload.settings import WorkloadSettings

    parser = questions.add_parser(
        "mix", help="the cheapest mix of device types", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("model", nargs="?", default="llama-3.1-8b", help=MODEL_HELP + " (default: llama-3.1-8b)")
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file: [engine], [workload]")
    group = parser.add_argument_group("mix")
    group.add_argument(
        "--types",
        nargs="+",
        default=["A10G", "L40S", "A100-80GB", "H100-SXM"],
        metavar="HW",
        help="of one replica each",
    )
    group.add_argument(
        "--market", type=Path, metavar="FILE", help="TOML: [usd_per_hour] and [available] of devices, by name"
    )
    group.add_argument("--weights", default="bf16", help="format of the weights (default: bf16)")
    group.add_argument("--attain", type=float, default=0.99, metavar="X", help="share that must keep --slo (0.99)")
    group.add_argument("--slices", type=int, default=8, metavar="N", help="pieces of a bucket (default: 8)")
    group.add_argument("--table", type=Path, metavar="FILE", help="JSON of measured throughputs; nothing is simulated")
    group.add_argument("--html", type=Path, metavar="FILE", help="write a report that needs nothing else")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all numbers for a program")
    for settings in (WorkloadSettings, EngineSettings):
        config.add_flags(parser, settings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.cli.files import check_writable, write
    from headrace.sim.plan import mix_told

    check_writable(args.html, args.json)
    if not 1 <= args.slices <= 64:
        raise BadSetting(f"--slices is {args.slices}; it must be between 1 and 64")
    if args.table:
        from headrace.sim.plan.mix import pack

        types, buckets, slices = mix_told.table(_read(args.table))
        packed = pack(types, buckets, slices)
        print(mix_told.told(packed, buckets), end="")
        write(args.html, lambda: mix_told.html(packed, buckets, ""))
        write(args.json, lambda: mix_told.as_json(packed, buckets))
        return 0
    return _simulated(args)


def _simulated(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from headrace.cli.files import write
    from headrace.cli.plan.search import scenario_of
    from headrace.sim.plan import mix_told
    from headrace.sim.plan.fleet_mix import confirm
    from headrace.workload.settings import parse_slo

    scenario = scenario_of(args)
    slo = parse_slo(scenario.traffic[0].slo)
    if slo is None:
        raise BadSetting("a mix is the cheapest that keeps promises; say which with --slo tpot=0.1")
    sites = [replace(scenario.simulate, hardware=text, weights=args.weights) for text in args.types]
    arrivals = list(scenario.arrivals())
    if any(one.at_s is None for one in arrivals):
        raise BadSetting("a mix needs to know when requests come; give --arrivals with a rate, such as poisson:6")
    types = mix_told.types(args.types, config.read_toml(args.market))
    found = confirm(arrivals, types, sites, scenario, slo, args.slices, _say)
    print(mix_told.confirmed(found), end="")
    write(args.html, lambda: mix_told.html(found.mix, found.buckets, mix_told.confirmed(found)))
    write(args.json, lambda: mix_told.as_json(found.mix, found.buckets))
    return 0


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > 1 << 20:
            raise BadSetting(f"{path} is too large to be a table of throughputs")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadSetting(f"cannot read {path}: {error}") from error


def _say(what: str) -> None:
    print(what, file=sys.stderr)
