"""What `headrace tune` finds on a slice of the Azure conversation trace, as goodput on the held-out slice: simulated
for an 8B model on one H100, and for real on this machine with a small model and the same trace scaled down.

    python benchmarks/tune_azure.py --trace AzureLLMInferenceTrace_conv.csv --half simulated
    python benchmarks/tune_azure.py --trace AzureLLMInferenceTrace_conv.csv --half live [MODEL] [--calibration FILE]

The live half calibrates this machine (or takes --calibration), tunes in simulation, and plays the held-out slice to the
engine with the settings as given and with those found, in turn, each read from its config file as `headrace serve
--config` reads it. Clients are in the process and read the engine's streams. Run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from accuracy import Life, play

from headrace.cli.assemble import Phases, add_model, token_budget
from headrace.cli.calibrate import Extent, Live, calibrate, open_live
from headrace.cli.tune import MARGIN
from headrace.core import clock, config
from headrace.core.config import EngineSettings
from headrace.core.types import SLO
from headrace.sim import calibration as stored
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.sim.slices import Slice, cut
from headrace.sim.sweep import answer
from headrace.sim.tune import Tuned, space, tune
from headrace.sim.tuned import config_file, gain, goodput, told
from headrace.sim.workers import forked
from headrace.workload import streams
from headrace.workload.settings import WorkloadSettings, parse_slo
from headrace.workload.traces import read_trace

HELD_OUT = 0.4
SPEED, REQUESTS, SLO_H100 = 4.0, 6000, "ttft=1.0,tpot=0.03"  # one H100 is too small for four times the trace
CROWD = 200  # requests that come at once, to see what the machine can do


def search(scenario: Scenario, options: argparse.Namespace, fixed: Sequence[str] = ()) -> tuple[Tuned, str]:
    """What was found, and the config file that says so."""
    axes, slices = space(scenario, fixed), cut(scenario, HELD_OUT)
    each = forked(options.processes)
    found = tune(scenario, axes, slices, each, budget=options.budget, margin=MARGIN, heard=say)
    print(told(found), flush=True)
    return found, config_file(scenario, axes, found)


def simulated(options: argparse.Namespace) -> None:
    traffic = WorkloadSettings(trace=options.trace, speed=SPEED, requests=REQUESTS, slo=SLO_H100)
    scenario = Scenario(SimulateSettings(), EngineSettings(), (traffic,))
    print(f"simulated: {scenario.simulate.model} on {scenario.simulate.hardware}, the trace {SPEED:g} times as fast")
    _, text = search(scenario, options)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


# -- live --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One setting on the held-out slice: good requests per second as simulated, and in each live run."""

    name: str
    simulated: float
    live: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.live) / len(self.live)


def scaled(trace: Path, out: Path, options: argparse.Namespace) -> None:
    """The trace with shorter prompts and answers. Clients ask for as many tokens as they get, as those of the live run
    do: a model that is not the trace's would end its answers elsewhere."""
    rows = streams.longer(read_trace(trace, options.requests), options.scale, options.scale)
    with out.open("w", encoding="utf-8") as file:
        for row in rows:
            tokens = min(row.prompt_tokens, options.longest)
            line = {"at_s": row.at_s, "prompt_tokens": tokens, "output_tokens": row.output_tokens}
            file.write(json.dumps(line | {"max_new_tokens": row.output_tokens}) + "\n")


def scenario_of(live: Live, calibration: Path, trace: Path, options: argparse.Namespace) -> Scenario:
    """The scaled trace at a share of what the engine takes from a crowd."""
    traffic = WorkloadSettings(trace=trace, slo=options.slo)
    scenario = Scenario(SimulateSettings(calibration=calibration), live.settings, (traffic,))
    crowd = replace(scenario, traffic=(replace(traffic, requests=CROWD, speed=1e6),))
    most = answer(crowd).totals.per_second()["requests"]
    speed = options.load * most / scenario.rate()
    say(f"a crowd is served at {most:.2f} requests/s; the trace comes at {options.load:.0%} of that")
    return replace(scenario, traffic=(replace(traffic, speed=speed, seconds=options.seconds),))


def run_live(live: Live, text: str, scenario: Scenario, piece: Slice) -> float:
    """Good requests per second of the held-out slice, with the settings of a config file."""
    settings = config.load(EngineSettings, None, tomllib.loads(text))
    ready = replace(live, settings=settings, token_budget=token_budget(settings, live.loaded.steps))
    arrivals = list(streams.between(scenario.arrivals(), piece.start_s, piece.end_s))
    lives, _, _ = clock.run(play(ready, arrivals, 1))
    promise = parse_slo(scenario.traffic[0].slo) or SLO()
    return sum(kept(life, promise) for life in lives) / piece.seconds


def kept(life: Life, promise: SLO) -> bool:
    in_time = promise.ttft_s is None or life.first_s - life.sent_s <= promise.ttft_s
    if life.tokens < 2 or promise.tpot_s is None:
        return in_time
    return in_time and (life.last_s - life.first_s) / (life.tokens - 1) <= promise.tpot_s


def on_this_machine(options: argparse.Namespace, folder: Path) -> list[Row]:
    live = open_live(options, Phases())
    live = replace(live, settings=replace(live.settings, token_budget=live.token_budget))  # as derived, said aloud
    calibration = options.calibration or folder / "calibration.json"
    if not options.calibration:
        wide = replace(live, token_budget=max(live.token_budget, options.tokens))  # larger steps may be found
        stored.store(clock.run(calibrate(wide, Extent(options.rows, options.longest, 3))), calibration)
    scaled(options.trace, folder / "scaled.jsonl", options)
    scenario = scenario_of(live, calibration, folder / "scaled.jsonl", options)
    found, tuned_text = search(scenario, options)
    last = found.slices.held_out
    given_text = config_file(scenario, (), replace(found, candidate=found.start))
    texts = {"as given": given_text, "found": tuned_text}
    goods: dict[str, list[float]] = {name: [] for name in texts}
    for turn in range(options.runs):
        for name in sorted(texts, reverse=bool(turn % 2)):  # in turn, so that drift of the machine hits both
            goods[name].append(run_live(live, texts[name], scenario, last))
            say(f"live, {name}: {goods[name][-1]:.3f} good requests/s")
    clock.run(live.loaded.executor.close())
    predicted = (goodput(score, last) for score in found.held_out)
    return [Row(name, good, tuple(goods[name])) for name, good in zip(texts, predicted, strict=True)]


def table(given: Row, found: Row) -> str:
    lines = [f"{'held-out goodput, requests/s':30}{'simulated':>12}{'live':>12}   runs"]
    for row in (given, found):
        runs = ", ".join(f"{good:.3f}" for good in row.live)
        lines.append(f"{row.name:30}{row.simulated:>12.3f}{row.mean:>12.3f}   {runs}")
    gains = (gain(given.simulated, found.simulated), gain(given.mean, found.mean))
    return "\n".join([*lines, f"{'found over as given':30}{gains[0]:>12}{gains[1]:>12}"])


def say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(top)
    group = top.add_argument_group("tuning")
    group.add_argument("--trace", type=Path, required=True, help="AzureLLMInferenceTrace_conv.csv")
    group.add_argument("--half", choices=("simulated", "live"), default="simulated")
    group.add_argument("--budget", type=int, default=120)
    group.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    group.add_argument("--out", type=Path, help="keep the config file of the simulated half")
    group = top.add_argument_group("live half")
    group.add_argument("--calibration", type=Path, help="of this machine, by `headrace calibrate`")
    group.add_argument("--rows", type=int, default=48, help="most requests side by side that are calibrated")
    group.add_argument("--tokens", type=int, default=512, help="of the largest step that is calibrated")
    group.add_argument("--scale", type=float, default=1 / 16, help="of prompts and answers")
    group.add_argument("--longest", type=int, default=384, help="tokens of a prompt, after scaling")
    group.add_argument("--requests", type=int, default=5000, help="of the trace, at most")
    group.add_argument("--seconds", type=float, default=400.0, help="of traffic, both slices together")
    group.add_argument("--load", type=float, default=0.7, help="share of what a crowd is served at")
    group.add_argument("--slo", default="ttft=1.5,tpot=0.2", help="of the scaled requests")
    group.add_argument("--runs", type=int, default=2, help="of each setting")
    return top


def main() -> int:
    options = parser().parse_args()
    if options.half == "simulated":
        simulated(options)
        return 0
    with TemporaryDirectory() as folder:
        print(table(*on_this_machine(options, Path(folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
