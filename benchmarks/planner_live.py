"""Twelve questions of the form "what is the highest rate that keeps this SLO with these settings?": answered by
the planner from a calibration of this machine, then measured on the live engine. A table of both.

Run alone on the machine, some 25 minutes: python benchmarks/planner_live.py

    calibration | pulse | question 4 | pulse | question 9 | ... | pulse | calibration      one run of each, five times
                   '----- level -----'                                                     see benchmarks/accuracy.py

    planner   bisection of the rate in virtual time, the same requests coming faster or slower, with the room that
              `headrace simulate --sweep` leaves when it says what to plan for: every step might take 5 % longer
    live      the same requests through the same scheduler in front of the real executor, first at the planner's rate,
              then at rates beside it until one holds and one does not, then where the line between them says. A run's
              stress is the 90th percentile of "what it took over what was promised"; the answer is the median of the
              rates at which the lines through a run that held and one that did not pass 1

The planner sees steps that were measured by themselves and nothing of any question. Shared machines are slow for
seconds and for minutes: so the runs of a question lie far apart, and a few steps are measured between any two (a
pulse). Those on both sides of the runs of a question say how fast the machine was, which the table tells as its level.
Bound: 11 of 12 within 15 %, no answer more than 10 % above what the live engine holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import ceil, exp, inf, log, sqrt
from random import Random
from statistics import mean, median

from accuracy import EXTENT, FLAGS, PULSE, Life, Prices, Used, imagine, play, steps_now

from headrace.cli.assemble import Phases, add_model
from headrace.cli.calibrate import Live, open_live
from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.types import SLO
from headrace.sim.run import Site
from headrace.sim.sweep import ROOM
from headrace.workload import streams
from headrace.workload.arrival import Arrival
from headrace.workload.settings import WorkloadSettings, workload

ATTAIN, WITHIN, UNSAFE, NEEDED = 0.9, 0.15, 0.10, 11
LOW, HIGH = 0.05, 200.0  # requests per second, between which the planner looks
SIM_ROUNDS = 11
BESIDE = 1.13  # from one live rate to the next, until one holds and one does not
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
    """What the planner says, with these prices: see `sim.sweep`."""
    site, low, high = replace(priced, settings=live.settings, token_budget=live.token_budget), LOW, HIGH
    for _ in range(SIM_ROUNDS):
        middle = sqrt(low * high)
        lives, _ = imagine(site, at_rate(rows, middle), 1)
        low, high = (middle, high) if stress(lives, slo, len(rows)) <= 1 / (1 + ROOM) else (low, middle)
    return sqrt(low * high) / (1 + ROOM)


def next_rate(first: float, runs: Sequence[tuple[float, float]]) -> float:
    """Where the engine is asked next."""
    held, missed = _bounds(runs)
    if not runs:
        return first
    if missed is None:
        return max(rate for rate, _ in runs) * BESIDE
    return missed / BESIDE if held is None else crossing(runs)


def measured(runs: Sequence[tuple[float, float]]) -> Measured:
    """What the engine says, of all runs."""
    held, missed = _bounds(runs)
    if held is None or missed is None:
        return Measured(next_rate(0.0, runs), tuple(runs), "at least" if missed is None else "at most")
    return Measured(crossing(runs), tuple(runs), "")


def _bounds(runs: Sequence[tuple[float, float]]) -> tuple[float | None, float | None]:
    """The highest rate that held, and the lowest that did not."""
    held = max((rate for rate, took in runs if took <= 1), default=None)
    return held, min((rate for rate, took in runs if took > 1), default=None)


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


@dataclass(slots=True)
class Asked:
    """A question, its requests, and what became of them so far."""

    question: Question
    live: Live  # with the settings of the question
    rows: list[Arrival]
    first: float
    runs: list[tuple[float, float]] = field(default_factory=list)
    pulses: list[int] = field(default_factory=list)  # the one before each run; the next comes after it
    others: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, live: Live, question: Question, priced: Site, seconds: float) -> Asked:
        """As many requests as come in about so many seconds."""
        there = under(live, question)
        guess = planned(priced, there, requests(question, 100), question.slo)
        rows = requests(question, min(max(round(guess * seconds), LEAST), MOST))
        return cls(question, there, rows, planned(priced, there, rows, question.slo))

    def run(self, pulse: int) -> None:
        rate, used = next_rate(self.first, self.runs), Used.now()
        took = stress(clock.run(play(self.live, at_rate(self.rows, rate), 1))[0], self.question.slo, len(self.rows))
        self.runs.append((rate, took))
        self.pulses.append(pulse)
        self.others.append(Used.now().others_since(used))
        print(f"  {self.question.name}: {len(self.rows)} at {rate:.2f}/s, {took:.2f} of the promise", flush=True)

    def row(self, live: Live, prices: Prices) -> Row:
        level = mean(mean(prices.levels[pulse : pulse + 2]) for pulse in self.pulses)
        rate = planned(prices.site(live, level), self.live, self.rows, self.question.slo)
        return Row(self.question.name, rate, measured(self.runs), level, mean(self.others))


def answers(live: Live, questions: Sequence[Question], runs: int, seconds: float) -> list[Row]:
    """All of them. The planner's answers rest on the calibrations and on the pulses on both sides of each run."""
    steps_now(live, PULSE)  # the first steps touch memory for the first time
    calibrations, pulses = [steps_now(live, EXTENT)], [steps_now(live, PULSE)]
    priced = Prices.of(live, calibrations, pulses).site(live)
    asked = [Asked.of(live, one, priced, seconds) for one in questions]
    order = Random(0)
    for _ in range(runs):
        for one in order.sample(asked, len(asked)):
            one.run(len(pulses) - 1)
            pulses.append(steps_now(live, PULSE))
    calibrations.append(steps_now(live, EXTENT))
    prices = Prices.of(live, calibrations, pulses)
    return [one.row(live, prices) for one in asked]


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
    parser.add_argument("--runs", type=int, default=5, help="live ones of each question (default: 5)")
    args = parser.parse_args([*FLAGS, *sys.argv[1:]])
    begun_s, live = clock.perf(), open_live(args, Phases())
    rows = answers(live, [one for one in QUESTIONS if args.only in one.name], args.runs, args.seconds)
    clock.run(live.loaded.executor.close())
    print(f"{table(rows)}\n{(clock.perf() - begun_s) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
