"""`headrace simulate`: what would happen, and how much it would hold. The same scheduler as `serve`, in virtual time.

Examples:
  headrace simulate --model llama-3.1-70b --hardware 4xH100-SXM --arrivals poisson:6 --slo ttft=1.0 --sweep rate=1:40
  headrace simulate --model qwen3-30b-a3b --hardware 2xL40S --weights fp8 --trace trace.jsonl --html report.html
  headrace simulate --compare chunked.toml prefill-first.toml --arrivals poisson:4
  headrace simulate --list models
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.core import clock, config
from headrace.core.config import BadSetting, EngineSettings

if TYPE_CHECKING:
    from headrace.sim.run import Report
    from headrace.sim.scenario import Scenario
    from headrace.sim.sweep import Point, Sweep
    from headrace.sim.workers import Each
    from headrace.workload.arrival import Arrival

CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the load that was asked about, for the page


def add(commands: Any) -> None:
    from headrace.cli import Formatter
    from headrace.sim.settings import SimulateSettings
    from headrace.workload.settings import WorkloadSettings

    parser = commands.add_parser(
        "simulate", help="what a model on some hardware would do", description=__doc__, formatter_class=Formatter
    )
    parser.add_argument(
        "--config", "--plan", type=Path, metavar="FILE", help="TOML file: [simulate], [engine], [workload]"
    )
    parser.add_argument("--sweep", metavar="rate=LOW:HIGH", help="also find the highest rate that keeps the --slo")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="config files, one simulation each")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report with plots that needs nothing else")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers for a program")
    parser.add_argument("--processes", type=int, metavar="N", help="processor cores to use (default: all)")
    parser.add_argument("--ray", metavar="ADDRESS", help="simulate on a Ray cluster: auto, local or its address")
    parser.add_argument("--list", choices=("models", "devices", "links"), help="list the catalogue and stop")
    for settings in (SimulateSettings, WorkloadSettings, EngineSettings):
        config.add_flags(parser, settings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from headrace.sim import sweep as sweeping
    from headrace.sim import table

    if args.list:
        return _list(args.list)
    for path in filter(None, (args.html, args.json)):
        if not path.parent.is_dir():  # said before minutes of simulating, not after
            raise BadSetting(f"cannot write {path}: there is no folder {path.parent}")
    files = args.compare or [args.config]
    scenarios = [scenario_of(args, path) for path in files]
    processes = args.processes or os.cpu_count() or 1
    bounds = parse_sweep(args.sweep) if args.sweep else None
    reports = _answers(args, scenarios, processes)
    each = _each(args, processes)
    sweep = None
    if bounds:
        sweep = sweeping.highest(scenarios[0], *bounds, each, processes, lambda point: _say(_tried(point)))
    print(_told(scenarios, reports, sweep, files), end="")
    if args.html:
        _write(args.html, _page(scenarios, reports, sweep, files, each))
    if args.json:
        named = zip(_names(files), reports, strict=True)
        _write(args.json, table.as_json([(name, report) for name, report in named], sweep))
    return 0


def scenario_of(args: argparse.Namespace, path: Path | None) -> Scenario:
    """Flags over environment over this file."""
    from headrace.sim.scenario import Scenario
    from headrace.sim.settings import SimulateSettings
    from headrace.workload.settings import WorkloadSettings, parts

    toml: Mapping[str, Any] = config.read_toml(path)
    return Scenario(
        config.load(SimulateSettings, args, toml),
        config.load(EngineSettings, args, toml),
        tuple(config.load(WorkloadSettings, args, part) for part in parts(toml)),
    )


def parse_sweep(text: str) -> tuple[float, float]:
    """'rate=1:40'. Raises BadSetting."""
    name, _, bounds = text.partition("=")
    low, _, high = bounds.partition(":")
    try:
        if name != "rate":
            raise ValueError(name)
        return float(low), float(high)
    except ValueError as error:
        raise BadSetting(f"--sweep {text!r} is not rate=LOW:HIGH, such as rate=1:40") from error


def _answers(args: argparse.Namespace, scenarios: list[Scenario], processes: int) -> list[Report]:
    from headrace.sim import sweep as sweeping

    begun_s = clock.perf()
    if len(scenarios) == 1:
        _say("simulating ...")
        reports = [sweeping.answer(scenarios[0], processes, _progress)]
    else:
        _say(f"simulating {len(scenarios)} scenarios ...")
        reports = sweeping.answers(scenarios, _each(args, processes))
    requests = sum(report.totals.arrived for report in reports)
    _say(f"{requests:,} requests simulated in {clock.perf() - begun_s:.1f} s")
    return reports


def _progress(arrivals: Iterator[Arrival]) -> Iterator[Arrival]:
    """Says how far the simulation is, if somebody looks: arrivals are read as their time comes."""
    begun_s = shown_s = clock.perf()
    shown = sys.stderr.isatty()
    for number, arrival in enumerate(arrivals):
        yield arrival
        if shown and number % 64 == 0 and clock.perf() - shown_s > 0.2:
            shown_s = clock.perf()
            at_s = "" if arrival.at_s is None else f", {arrival.at_s:,.0f} s of virtual time"
            print(
                f"\r\x1b[K  {number:,} requests{at_s} in {shown_s - begun_s:.0f} s", end="", file=sys.stderr, flush=True
            )
    if shown_s > begun_s:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _each(args: argparse.Namespace, processes: int) -> Each:
    if args.ray:
        from headrace.cluster.ray import on_ray

        return on_ray(args.ray)
    from headrace.sim.workers import forked

    return forked(processes)


def _told(scenarios: list[Scenario], reports: list[Report], sweep: Sweep | None, files: list[Path | None]) -> str:
    from headrace.sim import table

    if len(reports) > 1:
        return table.compare(list(zip(_names(files), reports, strict=True)))
    scenario, report = scenarios[0], reports[0]
    site = scenario.site()
    words = table.verdict(scenario, site, report, sweep)
    return table.table(scenario, site, report) + (f"\n{words}" if words else "")


def _page(
    scenarios: list[Scenario], reports: list[Report], sweep: Sweep | None, files: list[Path | None], each: Each
) -> str:
    from headrace.sim.page import page
    from headrace.sim.sweep import curve

    first = scenarios[0]
    points = sweep.points if sweep else ()
    if not points and first.traffic[0].clients is None:
        _say("the same requests at other loads, for the page ...")
        natural = first.rate()
        points = curve(first, [natural * factor for factor in CURVE], each, lambda point: _say(_tried(point)))
    return page(list(zip(_names(files), scenarios, reports, strict=True)), points)


def _names(files: list[Path | None]) -> list[str]:
    return [path.stem if path else "simulation" for path in files]


def _tried(point: Point) -> str:
    from headrace.sim.sweep import attained

    totals = point.report.totals
    share = attained(totals)
    kept = "" if share is None else f", {share:7.2%} kept the SLO{'' if point.holds else ': too many'}"
    return f"  {point.rate:8.3g} requests/s: p99 TTFT {1e3 * (totals.ttft_s.quantile(0.99) or 0):8,.0f} ms{kept}"


def _list(what: str) -> int:
    from headrace.sim import hardware, models

    if what == "models":
        rows = [(name, models.model_entry(name)) for name in models.model_names()]
        print("\n".join(f"{name:24} {entry.shape.weights / 1e9:8.1f} B  {entry.source}" for name, entry in rows))
    elif what == "devices":
        for name in hardware.device_names():
            one = hardware.device(name)
            memory = f"{one.memory_bytes / 1e9:6.0f} GB at {one.memory_bytes_per_s / 1e9:6.0f} GB/s"
            print(f"{name:14} {memory}, {one.bf16_flops_per_s / 1e12:7.1f} bf16 TFLOP/s")
    else:
        for name in hardware.link_names():
            link = hardware.link(name)
            print(f"{name:14} {link.bytes_per_s / 1e9:8.1f} GB/s, {link.latency_s * 1e6:.2f} us")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadSetting(f"cannot write {path}: {error}") from error
    _say(f"written: {path}")


def _say(what: str) -> None:
    print(what, file=sys.stderr)
