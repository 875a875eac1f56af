"""One plan against the traffic: simulated whole, unless its first requests already break more promises than all may, or
say that a rival is better in every way.

Bytes to bytes, so that other processes do it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice

import msgspec

from headrace.core.types import FinishReason
from headrace.sim.hardware import Device
from headrace.sim.run import Report, simulate
from headrace.sim.scenario import Scenario, parse_hardware
from headrace.sim.stats import Totals
from headrace.sim.sweep import attained

FIRST = 128  # requests that are looked at first, where there are many more
WORTH_SCREENING = 4 * FIRST  # requests; fewer are simulated at once
CLEARLY = 1.03  # worse than a rival by this in latency, on the same first requests

Rival = tuple[float, float, float]  # (cost, mean end-to-end seconds, joules per token), on the first requests


@dataclass(frozen=True, slots=True)
class Question:
    """A scenario, how many requests it has, and what its devices draw when nothing runs (all together)."""

    scenario: Scenario
    requests: int
    idle_w: float
    cost: float = 0.0
    rivals: tuple[Rival, ...] = ()  # plans that keep the promises


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a plan. Seconds; of a screened plan only `kept`, of the requests it saw."""

    kept: float | None  # of the requests, all promises; None: there were none to keep
    seen: int
    ttft_p99_s: float = 0.0
    tpot_p99_s: float = 0.0
    e2e_s: float = 0.0  # mean
    output_per_s: float = 0.0
    output_tokens: int = 0
    span_s: float = 0.0
    joules_per_token: float = 0.0  # idle devices included; 0: their power is unknown
    busy: float = 0.0  # share of the time in steps
    whole: bool = True  # False: only the first requests were simulated, and were enough
    beaten: bool = False  # by a rival, on these
    first: tuple[float, float] = (0.0, 0.0)  # end-to-end seconds and joules per token of the first requests


def judged(question: bytes) -> bytes:
    """The outcome. Raises what the scenario raises."""
    asked = msgspec.json.decode(question, type=Question, dec_hook=lambda kind, value: kind(value))
    return msgspec.json.encode(outcome(asked))


def encoded(question: Question) -> bytes:
    return msgspec.json.encode(question, enc_hook=str)


def outcome(asked: Question) -> Outcome:
    scenario = asked.scenario
    if asked.requests < WORTH_SCREENING:
        found = _told(asked, _simulated(scenario, None))
        return replace(found, first=(found.e2e_s, found.joules_per_token))
    report = _simulated(scenario, FIRST)
    first = _told(asked, report)
    missed = _missed(report.totals) > (1 - scenario.simulate.attain) * asked.requests
    beaten = any(
        cost <= asked.cost and CLEARLY * e2e_s <= first.e2e_s and joules <= first.joules_per_token
        for cost, e2e_s, joules in asked.rivals
    )
    if missed or beaten:
        return replace(first, whole=False, beaten=beaten and not missed)
    found = _told(asked, _simulated(scenario, None))
    return replace(found, first=(first.e2e_s, first.joules_per_token))


def _simulated(scenario: Scenario, most: int | None) -> Report:
    arrivals = islice(scenario.arrivals(), most)
    return simulate(arrivals, scenario.site(), dispatch=scenario.dispatch, seed=scenario.traffic[0].seed)


def _missed(totals: Totals) -> int:
    """Who had a promise that was not kept. Who comes later only makes it worse for them."""
    gone = totals.finished.get(FinishReason.ABORT, 0)
    return totals.promised + totals.rejected - gone - totals.good


def _told(asked: Question, report: Report) -> Outcome:
    totals, replicas = report.totals, report.replicas
    idle = 1 - totals.busy_s / max(totals.span_s * replicas, 1e-9)
    joules = totals.spent.joules + asked.idle_w * totals.span_s * max(0.0, idle)
    return Outcome(
        kept=attained(totals),
        seen=totals.arrived,
        ttft_p99_s=totals.ttft_s.quantile(0.99) or 0.0,
        tpot_p99_s=totals.tpot_s.quantile(0.99) or 0.0,
        e2e_s=totals.e2e_s.mean or 0.0,
        output_per_s=totals.per_second()["output tokens"],
        output_tokens=totals.output_tokens,
        span_s=totals.span_s,
        joules_per_token=joules / totals.output_tokens if totals.output_tokens and totals.spent.joules else 0.0,
        busy=1 - idle,
    )


def idle_w(hardware: str, replicas: int) -> float:
    """Watts of all devices when nothing runs."""
    topology = parse_hardware(hardware)
    chip: Device = topology.device
    return chip.static_w * topology.devices * replicas
