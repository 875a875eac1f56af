"""Twelve questions of the form "what is the highest rate that keeps this SLO with these settings?": answered by
the planner from a calibration of this machine, then measured on the live engine by bisection. A table of both.

Run alone on the machine, about 40 minutes: python benchmarks/planner_live.py --rounds 5

    planner   bisection of the rate in virtual time, the same requests coming faster or slower
    live      the same requests through the same scheduler in front of the real executor, bisected between 0.6 and
              1.5 times the planner's answer; the answer is the middle of what held and what did not

Steps are calibrated again before every question, because the speed of shared machines drifts. Bound: 11 of 12 within
15 %, no answer more than 10 % above what the live engine holds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import sqrt

from accuracy import FLAGS, Life, imagine, play, site_of, steps_now

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
LOW, HIGH = 0.6, 1.5  # times the planner's answer: where the live one is looked for
SIM_ROUNDS = 12


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
    "chat, 0.15 s a token": ("16:120,8:48", SLO(ttft_s=4.0, tpot_s=0.15)),
    "long prompts, 3 s": ("64:400,8:24", SLO(ttft_s=3.0)),
}
QUESTIONS = tuple(
    Question(f"{setting}; {what}", SETTINGS[setting], *TRAFFIC[what]) for setting, what in product(SETTINGS, TRAFFIC)
)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: requests per second."""

    name: str
    planned: float
    live: float

    @property
    def error(self) -> float:
        return self.planned / self.live - 1


def requests(asked: Question, count: int) -> list[Arrival]:
    """At one request per second; other rates are the same requests faster."""
    return list(workload(WorkloadSettings(arrivals="poisson:1", lengths=asked.lengths, requests=count, seed=11)))


def at_rate(rows: Sequence[Arrival], rate: float) -> list[Arrival]:
    return list(streams.faster(rows, rate))


def holds(lives: Sequence[Life], slo: SLO, count: int) -> bool:
    """Nine of ten requests within every promise; who was refused is missing and kept none."""
    return sum(kept(life, slo) for life in lives) >= ATTAIN * count


def kept(life: Life, slo: SLO) -> bool:
    token_s = (life.last_s - life.first_s) / max(life.tokens - 1, 1)
    first = slo.ttft_s is None or life.first_s - life.sent_s <= slo.ttft_s
    return first and (slo.tpot_s is None or token_s <= slo.tpot_s)


def bisected(ask: Callable[[float], bool], low: float, high: float, rounds: int) -> float:
    """The geometric middle of the last rate that held and the first that did not; an end if all or none did."""
    if not ask(low):
        return low
    if ask(high):
        return high
    for _ in range(rounds):
        middle = sqrt(low * high)
        low, high = (middle, high) if ask(middle) else (low, middle)
    return sqrt(low * high)


def planned(site: Site, rows: Sequence[Arrival], slo: SLO) -> float:
    """What the planner says."""

    def ask(rate: float) -> bool:
        lives, _ = imagine(site, at_rate(rows, rate), 1)
        return holds(lives, slo, len(rows))

    return bisected(ask, 0.05, 100.0, SIM_ROUNDS)


def measured(live: Live, rows: Sequence[Arrival], slo: SLO, answer: float, rounds: int) -> float:
    """What the engine says."""

    def ask(rate: float) -> bool:
        played = clock.run(play(live, at_rate(rows, rate), 1))
        fine = holds(played.lives, slo, len(rows))
        print(f"    live at {rate:.2f}/s: {'holds' if fine else 'does not hold'}", flush=True)
        return fine

    return bisected(ask, LOW * answer, HIGH * answer, rounds)


def answered(live: Live, asked: Question, count: int, rounds: int) -> Row:
    settings: EngineSettings = replace(live.settings, **asked.engine)  # type: ignore[arg-type]
    there = replace(live, settings=settings, token_budget=settings.token_budget or live.token_budget)
    site, rows = site_of(there, steps_now(live)), requests(asked, count)
    answer = planned(site, rows, asked.slo)
    print(f"  {asked.name}: planned {answer:.2f}/s", flush=True)
    return Row(asked.name, answer, measured(there, rows, asked.slo, answer, rounds))


def table(rows: Sequence[Row]) -> str:
    lines = [f"{'question':44} {'planned/s':>10} {'live/s':>8} {'error':>8}"]
    lines += [f"{row.name:44} {row.planned:10.2f} {row.live:8.2f} {row.error:+8.1%}" for row in rows]
    near = sum(abs(row.error) <= WITHIN for row in rows)
    unsafe = sum(row.error > UNSAFE for row in rows)
    fine = near >= NEEDED * len(rows) / len(QUESTIONS) and not unsafe
    lines.append(
        f"{near} of {len(rows)} within {WITHIN:.0%}, {unsafe} unsafe by more than {UNSAFE:.0%}: "
        f"{'within' if fine else 'NOT within'} the bounds"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_model(parser)
    parser.add_argument("--only", default="", metavar="TEXT", help="only questions whose name has this in it")
    parser.add_argument("--count", type=int, default=120, metavar="N", help="requests of a run (default: 120)")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="live bisections: 4 is to 6 %% (default)")
    args = parser.parse_args([*FLAGS, *sys.argv[1:]])
    live = open_live(args, Phases())
    steps_now(live)  # the first steps touch memory for the first time
    rows = [answered(live, one, args.count, args.rounds) for one in QUESTIONS if args.only in one.name]
    clock.run(live.loaded.executor.close())
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
