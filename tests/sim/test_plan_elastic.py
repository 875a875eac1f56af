"""Replicas that come and go: cold starts where keep-alive ends, nothing lost, and what a fleet is paid for."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import settings as bounded
from hypothesis import strategies as st

from headrace.cluster.scaling import ColdStart, Scaling
from headrace.core.config import EngineSettings
from headrace.core.types import SLO
from headrace.sim.elastic import served
from headrace.sim.plan import elastic
from headrace.sim.plan.answer import as_json, html, told
from headrace.sim.run import Site
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.workload.arrival import Arrival, Stretch

SCENARIO = Scenario(SimulateSettings(model="llama-3.1-8b", hardware="L40S"), EngineSettings())
SITE: Site = SCENARIO.site()
COLD_S = 10.0


def timer(period_s: float, count: int = 8) -> list[Arrival]:
    return [Arrival(at * period_s, (Stretch(50),), 5, max_new_tokens=5) for at in range(count)]


def test_a_timer_just_beyond_the_keep_alive_starts_cold_every_time() -> None:
    """Of every call (Huawei's timers): answers take well below a second here."""
    beyond, within = (served(timer(61.0 + COLD_S), SITE, Scaling(4, 0, 1, keep), COLD_S) for keep in (60.0, 72.0))
    assert beyond.cold == beyond.starts == 8 and min(beyond.ttft_s) > COLD_S
    assert within.cold == within.starts == 1 and sorted(within.ttft_s)[-2] < 1.0
    assert beyond.paid_s == pytest.approx(7 * (COLD_S + 60) + COLD_S, rel=0.01) and beyond.paid_s < beyond.span_s


def test_a_fixed_fleet_is_paid_all_the_time_and_never_cold() -> None:
    found = served(timer(30.0), SITE, Scaling(4, 2, 2, inf), COLD_S)
    assert found.cold == found.starts == 0 and found.most == 2
    assert found.paid_s == pytest.approx(2 * found.span_s)


def test_a_crowd_brings_more_replicas() -> None:
    crowd = [Arrival(0.01 * at, (Stretch(200),), 200, max_new_tokens=200) for at in range(40)]
    found = served(crowd, SITE, Scaling(8, 1, 4, 60.0), 2.0)
    assert found.most == 4 and found.starts == 3 and len(found.ttft_s) == 40


@given(
    st.lists(st.tuples(st.floats(0, 90), st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=15),
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from([0.0, 5.0, 60.0, inf]),
    st.floats(0.1, 30),
)
@bounded(max_examples=30, derandomize=True, deadline=None)
def test_nobody_is_lost_whatever_the_rule(
    asked: list[tuple[float, int, int]], least: int, more: int, keep_s: float, cold_s: float
) -> None:
    at_s, rows = 0.0, []
    for gap_s, prompt, output in asked:
        at_s += gap_s
        rows.append(Arrival(at_s, (Stretch(prompt),), output, max_new_tokens=output))
    rule = Scaling(3, least, max(1, least + more), keep_s)
    found = served(rows, SITE, rule, cold_s)
    assert len(found.ttft_s) == len(rows) and not found.refused
    assert least <= found.most <= rule.most
    assert least * found.span_s - 1e-6 <= found.paid_s <= rule.most * found.span_s + 1e-6
    assert found.cold <= len(rows) and (found.cold or found.starts >= 0)


def test_the_cheapest_rule_that_keeps_the_promises() -> None:
    start = ColdStart(16e9, 1, 3e9, 25e9)
    found = elastic.elastic(timer(100.0), SITE, start, SLO(ttft_s=60.0), 0.99, 4.0, 1, 2.0)
    best = found.best
    assert best is not None and best.rule.least == 0 and best.kept == 1.0
    assert best.cost == min(one.cost for one in found.tried)
    strict = elastic.elastic(timer(100.0), SITE, start, SLO(ttft_s=0.5), 0.99, 4.0, 1, 2.0)
    assert (
        strict.best is not None and strict.best.rule.fixed and strict.best.usd_per_hour == pytest.approx(2.0, rel=0.01)
    )
    hopeless = elastic.elastic(timer(100.0, 3), SITE, start, SLO(ttft_s=1e-4), 0.99, 4.0, 1, None)
    assert hopeless.best is None
    answers = [elastic.answer(one, "a model", SCENARIO) for one in (found, strict, hopeless)]
    assert [one.headline[0].split()[0] for one in answers] == ["RECOMMENDED:", "RECOMMENDED:", "NO"]
    assert "cheaper than 1 always there" in told(answers[0]) and "Work:" in told(answers[0], show_work=True)
    assert "<table" in html(answers[1]) and '"cold_start_s"' in as_json(answers[2])
    assert answers[0].plan is not None and 'model = "llama-3.1-8b"' in answers[0].plan


def test_rules_go_from_nobody_to_everybody() -> None:
    found = list(elastic.rules(4.0, 3))
    assert any(one.least == 0 for one in found) and any(one.least == one.most == 3 for one in found)
    assert all(one.least <= one.most == 3 for one in found)
    assert len(set(found)) == len(found)
    assert replace(found[0], least=0) == found[0]
