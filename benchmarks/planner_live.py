"""Twelve questions of the form "what is the highest rate that keeps this SLO with these settings?": answered by
the planner from a calibration of this machine, then measured on the live engine. A table of both.

Run alone on the machine, 11 to 15 minutes: python benchmarks/planner_live.py

    calibration | pulse | question | pulse | question | ... | pulse | calibration      see benchmarks/accuracy.py
                   '---- level ----'

    planner   bisection of the rate in virtual time, the same requests coming faster or slower
    live      the same requests through the same scheduler in front of the real executor, first at the planner's rate,
              then at rates beside it until one holds and one does not, then where the line between them says. A run's
              stress is the 90th percentile of "what it took over what was promised"; the answer is the median of the
              rates at which the lines through a run that held and one that did not pass 1

The planner sees steps that were measured by themselves and nothing of any question. Shared machines drift, so a
few steps are measured between questions (a pulse): those on both sides of a question say how fast the machine was,
which the table tells as its level. Bound: 11 of 12 within 15 %, no answer more than 10 % above what the live engine
holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil, exp, inf, log, sqrt
from statistics import median

from accuracy import EXTENT, FLAGS, PULSE, Life, Prices, Used, imagine, play, steps_now

from headrace.cli.assemble import Phases, add_model
from headrace.cli.calibrate import Live, open_live
from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.types import SLO
from headrace.sim.run import Site
from headrace.workload import streams
from headrace.workload.arrival import Arrival
from headrace.workload.settings import WorkloadSettings, workload

ATTAIN, WITHIN, UNSAFE, NEEDED = 0.9, 0.15, 0.10, 11
LOW, HIGH = 0.05, 200.0  # requests per second, between which the planner looks
SIM_ROUNDS = 11
BESIDE = 1.13  # from one live rate to the next, until one holds and one does not
RUNS, LATE_RUNS = 4, 3  # live ones of a question, and when time is short
LEAST, MOST = 50, 240  # requests of a run


@dataclass(frozen=True, slots=True)
class Question:
    """Settings, traffic and promises."""

    name: str
    engine: dict[str, object]  # what differs from the engine that was loaded
    lengths: str
    slo: SLO


SETTINGS: dict[str, dict[str, object]] = {
    "chunked 128": {},
    "chunked 64": {"token_budget": 64},
    "prompts first": {"batch": "prefill-first"},
    "8 at most": {"max_running": 8},
}
TRAFFIC: dict[str, tuple[str, SLO]] = {
    "chat, first token 1.5 s": ("16:120,8:48", SLO(ttft_s=1.5)),
    "chat, 0.08 s a token": ("16:120,8:48", SLO(ttft_s=4.0, tpot_s=0.08)),
    "long prompts, 3 s": ("64:400,8:24", SLO(ttft_s=3.0)),
}
QUESTIONS = tuple(
    Question(f"{setting}; {what}", SETTINGS[setting], *TRAFFIC[what]) for setting, what in product(SETTINGS, TRAFFIC)
)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the live engine said of one question."""

    rate: float  # the highest that holds, requests per second
    runs: tuple[tuple[float, float], ...]  # (rate, stress)
    found: str  # "", or which way it lies outside of what was tried


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: requests per second."""

    name: str
    planned: float
    live: Measured
    level: float  # of the machine, 1 on average: its steps took so many times as long
    others: float  # of the machine, meanwhile

    @property
    def error(self) -> float:
        return self.planned / self.live.rate - 1


def requests(asked: Question, count: int) -> list[Arrival]:
    """At one request per second; other rates are the same requests faster."""
    return list(workload(WorkloadSettings(arrivals="poisson:1", lengths=asked.lengths, requests=count, seed=11)))


def at_rate(rows: Sequence[Arrival], rate: float) -> list[Arrival]:
    return list(streams.faster(rows, rate))


def stress(lives: Sequence[Life], slo: SLO, count: int) -> float:
    """What nine of ten requests took at most of their promises; a run holds up to 1. Who was refused took for ever."""
    took = sorted(taken(life, slo) for life in lives)
    at = ceil(ATTAIN * count) - 1
    return took[at] if at < len(took) else inf


def taken(life: Life, slo: SLO) -> float:
    """Of the tightest promise."""
    token_s = (life.last_s - life.first_s) / max(life.tokens - 1, 1)
    first = 0.0 if slo.ttft_s is None else (life.first_s - life.sent_s) / slo.ttft_s
    return max(first, 0.0 if slo.tpot_s is None else token_s / slo.tpot_s)


# -- the two answers ---------------------------------------------------------------------------------------------------


def planned(priced: Site, live: Live, rows: Sequence[Arrival], slo: SLO) -> float:
    """What the planner says, with these prices."""
    site, low, high = replace(priced, settings=live.settings, token_budget=live.token_budget), LOW, HIGH
    for _ in range(SIM_ROUNDS):
        middle = sqrt(low * high)
        lives, _ = imagine(site, at_rate(rows, middle), 1)
        low, high = (middle, high) if stress(lives, slo, len(rows)) <= 1 else (low, middle)
    return sqrt(low * high)


def measured(ask: Callable[[float], float], first: float, most: int) -> Measured:
    """What the engine says, in at most so many runs. `ask` is the stress at a rate."""
    runs: list[tuple[float, float]] = []
    rate = first
    for _ in range(most):
        runs.append((rate, ask(rate)))
        held = max((at for at, took in runs if took <= 1), default=None)
        missed = min((at for at, took in runs if took > 1), default=None)
        if missed is None:
            rate = max(at for at, _ in runs) * BESIDE
        elif held is None:
            rate = missed / BESIDE
        else:
            rate = crossing(runs)
    if missed is None or held is None:
        return Measured(rate, tuple(runs), "at least" if missed is None else "at most")
    return Measured(crossing(runs), tuple(runs), "")


def crossing(runs: Sequence[tuple[float, float]]) -> float:
    """Where stress is 1, by lines on logarithmic axes through each run that held and each that did not: their median.
    A run that held at a higher rate than one that did not tells nothing but noise: their middle."""
    held = [run for run in runs if run[1] <= 1]
    missed = [run for run in runs if run[1] > 1]
    return median(_between(low, high) for low, high in product(held, missed))


def _between(held: tuple[float, float], missed: tuple[float, float]) -> float:
    (low, under), (high, over) = held, missed
    if low >= high:
        return sqrt(low * high)
    below, above = -log(max(under, 0.05)), log(min(over, 20.0))
    return exp(log(low) + log(high / low) * below / (below + above))


# -- all of them -------------------------------------------------------------------------------------------------------


def under(live: Live, asked: Question) -> Live:
    """The loaded model with the settings of a question."""
    settings: EngineSettings = replace(live.settings, **asked.engine)  # type: ignore[arg-type]
    return replace(live, settings=settings, token_budget=settings.token_budget or live.token_budget)


def played(live: Live, asked: Question, priced: Site, seconds: float, most: int) -> tuple[list[Arrival], Measured]:
    """The requests of a question, as many as come in about so many seconds, and what the live engine makes of them."""
    there = under(live, asked)
    guess = planned(priced, there, requests(asked, 100), asked.slo)
    rows = requests(asked, min(max(round(guess * seconds), LEAST), MOST))
    first = planned(priced, there, rows, asked.slo)
    print(f"  {asked.name}: {len(rows)} requests, planned {first:.2f}/s", flush=True)

    def ask(rate: float) -> float:
        took = stress(clock.run(play(there, at_rate(rows, rate), 1))[0], asked.slo, len(rows))
        print(f"    live at {rate:.2f}/s: {took:.2f} of the promise", flush=True)
        return took

    return rows, measured(ask, first, most)


def answers(live: Live, questions: Sequence[Question], args: argparse.Namespace) -> list[Row]:
    """All of them. The planner's answers rest on the calibrations and on the pulses on both sides of each."""
    steps_now(live, PULSE)  # the first steps touch memory for the first time
    begun_s, found = clock.perf(), []
    calibrations, pulses = [steps_now(live, EXTENT)], [steps_now(live, PULSE)]
    for number, one in enumerate(questions):
        late = clock.perf() - begun_s > 60 * args.minutes * (number + 0.5) / len(questions)
        prices, used = Prices.of(live, calibrations, pulses), Used.now()
        said = played(live, one, prices.site(live, prices.levels[-1]), args.seconds, LATE_RUNS if late else RUNS)
        found.append((one, *said, Used.now().others_since(used)))
        pulses.append(steps_now(live, PULSE))
    calibrations.append(steps_now(live, EXTENT))
    prices, rows = Prices.of(live, calibrations, pulses), []
    for number, (one, asked, said_live, others) in enumerate(found):
        level = sum(prices.levels[number : number + 2]) / 2
        rate = planned(prices.site(live, level), under(live, one), asked, one.slo)
        rows.append(Row(one.name, rate, said_live, level, others))
    return rows


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'question':44} {'planned/s':>10} {'live/s':>8} {'error':>8}  {'level':>5} {'others':>6}  runs"]
    lines += [
        f"{row.name:44} {row.planned:10.2f} {row.live.rate:8.2f} {row.error:+8.1%}  {row.level:5.2f} "
        f"{row.others:6.1%}  {len(row.live.runs)}"
        f"{' (live ' + row.live.found + ' that)' if row.live.found else ''}"
        for row in rows
    ]
    near = sum(abs(row.error) <= WITHIN for row in rows)
    unsafe = sum(row.error > UNSAFE for row in rows)
    fine = near >= NEEDED * len(rows) / len(QUESTIONS) and not unsafe
    lines.append(
        f"{near} of {len(rows)} within {WITHIN:.0%}, {unsafe} unsafe by more than {UNSAFE:.0%}: "
        f"{'within' if fine else 'NOT within'} the bounds"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(parser)
    parser.add_argument("--only", default="", metavar="TEXT", help="only questions whose name has this in it")
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals in a live run (default: 12)")
    parser.add_argument(
        "--minutes", type=float, default=14.0, help="that all may take, with fewer live runs if need be"
    )
    args = parser.parse_args([*FLAGS, *sys.argv[1:]])
    begun_s, live = clock.perf(), open_live(args, Phases())
    rows = answers(live, [one for one in QUESTIONS if args.only in one.name], args)
    clock.run(live.loaded.executor.close())
    print(f"{table(rows)}\n{(clock.perf() - begun_s) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
