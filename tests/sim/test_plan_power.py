"""POLCA in the simulator: caps act late and in order, joules are those of the steps, and more servers fit with caps
than without."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from headrace.cluster.power import BASE, BRAKED, FREE
from headrace.core.config import BadSetting, EngineSettings
from headrace.sim.cost.batch import Batch, Line, StepCost, batch_of
from headrace.sim.cost.clocked import FULL_MHZ, Clocked
from headrace.sim.plan import power, power_told
from headrace.sim.power import Row, drawn
from headrace.sim.run import Site
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.sim.workers import here
from headrace.workload.arrival import Arrival, Stretch

STATIC_W, REST_W = 100.0, 50.0


class Priced:
    """40 ms of memory a step, 0.1 ms of arithmetic a token; 100 W static, 300 W at work."""

    def estimate(self, batch: Batch) -> StepCost:
        compute_s = 1e-4 * batch.tokens
        seconds = 0.04 + compute_s
        return StepCost(seconds, compute_s, 0.04, joules=300.0 * seconds)

    def line(self, batch: Batch, steps: int) -> Line:
        return Line(self.estimate(batch).seconds, 0.0, steps)


def site() -> Site:
    usual = Scenario(SimulateSettings(model="llama-3.1-8b", hardware="L40S"), EngineSettings()).site()
    return replace(usual, cost=Priced(), windows=())


ASKED = [Arrival(0.0, (Stretch(1000),), 25, max_new_tokens=25)] * 4


def row(servers: int, budget_w: float = inf, control: bool = False) -> Row:
    return Row(site(), servers, servers // 2, STATIC_W, REST_W, budget_w, control)


def test_a_clock_slows_arithmetic_and_saves_power() -> None:
    batch, cost = batch_of([(0, 1000)], 1), Clocked(Priced(), STATIC_W)
    assert cost.estimate(batch) == Priced().estimate(batch)
    cost.mhz = FULL_MHZ / 2
    slow = cost.estimate(batch)
    assert slow.seconds == pytest.approx(0.04 + 0.2) and slow.memory_s == 0.04
    assert slow.joules / slow.seconds == pytest.approx(100 + 200 * 0.5**1.7)
    beat = batch_of([(99, 1)] * 10, 10)
    assert cost.line(beat, 5).first_s == pytest.approx(cost.estimate(beat).seconds)


def test_published_power_of_a_low_clock() -> None:
    """1110 MHz take a fifth off the peak power when three tenths of it are static."""
    cost = Clocked(Priced(), 90.0, mhz=1110)
    full, low = (Priced().estimate, cost.estimate)
    batch = batch_of([(0, 4000)], 1)
    saved = 1 - (low(batch).joules / low(batch).seconds) / (full(batch).joules / full(batch).seconds)
    assert saved == pytest.approx(0.20, abs=0.05)


def test_joules_are_those_of_steps_and_of_idling() -> None:
    rows = power.rising(ASKED, 2, 0.5, 60.0)
    found = drawn(rows, row(2))
    assert found.requests == len(rows) and not found.lost
    assert min(found.watts) >= 2 * (STATIC_W + REST_W) - 1e-6
    steps_s = sum(0.1 + 25 * 0.04 for _ in rows)  # at most: steps are shared
    above = found.joules - 2 * (STATIC_W + REST_W) * 2.0 * len(found.watts)
    assert 0 < above <= 200 * 1.1 * steps_s


def test_a_row_over_its_budget_is_braked_five_seconds_later() -> None:
    tight = 2 * (STATIC_W + REST_W) * 0.99
    found = drawn(power.rising(ASKED, 2, 0.5, 60.0), row(2, tight, control=True))
    assert found.brakes == 1 and found.over == len(found.shares)
    assert found.caps[0] == FREE and found.caps[:6].count(FREE) <= 4 and found.caps[5] == BRAKED
    free = drawn(power.rising(ASKED, 2, 0.5, 60.0), row(2, tight))
    assert not free.brakes and set(free.caps) == {FREE}
    assert sum(found.e2e_s[True]) > 1.3 * sum(free.e2e_s[True])


def test_a_cap_takes_forty_seconds_and_spares_high_priority() -> None:
    rows = power.rising(ASKED, 4, 1.0, 240.0)
    watts = drawn(rows, row(4)).watts
    budget = max(watts) / 0.86
    found = drawn(rows, row(4, budget, control=True))
    first = next(at for at, share in enumerate(found.shares) if share > 0.80)
    assert set(found.caps[: first + 20]) == {FREE} and BASE in found.caps
    assert not found.brakes
    assert {caps.high_mhz for caps in found.caps} == {FULL_MHZ}


def test_more_servers_fit_with_caps() -> None:
    """POLCA's question in small: some more fit, far more do not."""
    found = power.power(ASKED, site(), 0.7, 6, (0.15, 1.0), 120.0, STATIC_W, REST_W, here)
    assert [one.servers for one in found.more] == [7, 12]
    assert found.fitting is not None and found.fitting.servers == 7
    assert found.more[1].free.peak_share > 1 and found.more[1].broken
    assert found.base.peak_w / found.budget_w == pytest.approx(power.PEAK_SHARE)
    slow, fast = found.clocks[-1], found.clocks[0]
    assert slow.watts < fast.watts and slow.tokens_per_s < fast.tokens_per_s
    told = power_told.answer(found, "a row", 120.0)
    assert told.headline[0].startswith("1 MORE SERVERS") and len(told.rejected) == 1
    assert dict(found.swings).keys() == told.numbers["ten_percent_off"].keys()  # type: ignore[attr-defined]


def test_bad_lists_of_extras() -> None:
    from headrace.cli.plan.power import _extras

    assert _extras("30,10") == [0.1, 0.3]
    for text in ("", "ten", "-5", "nan"):
        with pytest.raises(BadSetting):
            _extras(text)
