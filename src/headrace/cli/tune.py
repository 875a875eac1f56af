"""`headrace tune`: settings that keep more promises on your traffic, searched with the simulator as judge.

The first part of the traffic trains, the last is held out: it says by how much what was found is better, and why.
Engine flags fix a setting and take it out of the search; [engine] of --config is where the search starts. While it
searches, promises are tighter by --margin, so that what is found also holds on a machine a little slower than priced.

Examples:
  headrace tune --trace traffic.csv --slo ttft=1.0,tpot=0.05 --model llama-3.1-8b --hardware H100-SXM
  headrace tune --trace traffic.jsonl --slo ttft=2 --calibration smollm2.calibration.json --out tuned.toml
  headrace serve smollm2 --config tuned.toml
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from headrace.core import clock, config
from headrace.core.config import BadSetting, EngineSettings

BUDGET, HELD_OUT, MARGIN = 120, 0.4, 0.15


def add(commands: Any) -> None:
    from headrace.cli import Formatter
    from headrace.sim.settings import SimulateSettings
    from headrace.workload.settings import WorkloadSettings

    parser = commands.add_parser(
        "tune", help="find settings that keep more promises", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file: [simulate], [engine], [workload]")
    group = parser.add_argument_group("search")
    group.add_argument("--out", type=Path, default=Path("tuned.toml"), metavar="FILE", help="(default: tuned.toml)")
    group.add_argument(
        "--budget", type=int, default=BUDGET, metavar="N", help=f"simulations to search with (default: {BUDGET})"
    )
    group.add_argument(
        "--held-out", type=float, default=HELD_OUT, metavar="X", help=f"last share of the time (default: {HELD_OUT})"
    )
    group.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        metavar="X",
        help=f"search for promises tighter by this part, as machines may be slower than priced (default: {MARGIN})",
    )
    group.add_argument(
        "--stated", action="store_true", help="clients state their SLO, so orderings by due date may be searched"
    )
    group.add_argument("--processes", type=int, metavar="N", help="processor cores to use (default: all)")
    for settings in (SimulateSettings, WorkloadSettings, EngineSettings):
        config.add_flags(parser, settings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.cli.simulate import scenario_of
    from headrace.sim import tune, tuned
    from headrace.sim.slices import cut
    from headrace.sim.workers import forked

    _check(args)
    begun_s = clock.perf()
    scenario = scenario_of(args, args.config)
    axes = tune.space(scenario, fixed(args), stated=args.stated)
    if not axes:
        raise BadSetting("every setting is fixed by a flag; leave out those that may be searched")
    slices = cut(scenario, args.held_out)
    processes = args.processes or os.cpu_count() or 1
    seed = scenario.traffic[0].seed
    found = tune.tune(
        scenario, axes, slices, forked(processes), budget=args.budget, seed=seed, margin=args.margin, heard=_say
    )
    print(tuned.told(found), end="")
    _write(args.out, tuned.config_file(scenario, axes, found))
    _say(f"{found.simulations} simulations in {clock.perf() - begun_s:.0f} s; written: {args.out}")
    return 0


def fixed(args: argparse.Namespace) -> set[str]:
    """Engine settings that were given as flags."""
    names = (field.name for field in fields(EngineSettings))
    return {name for name in names if getattr(args, f"engine.{name}") is not None}


def _check(args: argparse.Namespace) -> None:
    """Before minutes of simulating, not after. NaN fails too."""
    if not 10 <= args.budget <= 100_000:
        raise BadSetting(f"--budget is {args.budget}; it must be between 10 and 100000 simulations")
    if not 0.1 <= args.held_out <= 0.9:
        raise BadSetting(f"--held-out is {args.held_out}; it must be between 0.1 and 0.9 of the time")
    if not 0 <= args.margin <= 0.9:
        raise BadSetting(f"--margin is {args.margin}; it must be between 0 and 0.9 of the promises")
    if args.processes is not None and not 1 <= args.processes <= 1024:
        raise BadSetting(f"--processes is {args.processes}; it must be between 1 and 1024")
    if not args.out.parent.is_dir():
        raise BadSetting(f"cannot write {args.out}: there is no folder {args.out.parent}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadSetting(f"cannot write {path}: {error}") from error


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
