"""Many scenarios at once are the same as one by one; a bisection finds the edge and says what it saw."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.core.config import BadSetting, EngineSettings
from headrace.core.types import SLO, FinishReason
from headrace.sim.run import Report
from headrace.sim.scenario import Scenario
from headrace.sim.settings import SimulateSettings
from headrace.sim.stats import Totals
from headrace.sim.sweep import PRECISION, ROOM, answer, answers, attained, curve, highest
from headrace.sim.table import compare, load, numbers, table, verdict
from headrace.sim.workers import WorkerFailed, forked, here
from headrace.workload.settings import WorkloadSettings


def asked(count: int = 150, *, slo: str | None = "ttft=1.0", arrivals: str = "poisson:4", **words: object) -> Scenario:
    traffic = WorkloadSettings(arrivals=arrivals, requests=count, slo=slo)
    simulated = SimulateSettings(model="llama-3.1-8b", hardware="A10G", **words)  # type: ignore[arg-type]
    return Scenario(simulated, EngineSettings(), (traffic,))


@pytest.fixture(scope="module")
def alone() -> Report:
    return answer(asked())


def test_other_processes_give_the_same(alone: Report) -> None:
    twice = [asked(), asked(count=50), asked()]
    for each in (here, forked(2)):
        reports = answers(twice, each)
        assert reports[0].digest == reports[2].digest == alone.digest
        assert numbers(reports[0].totals) == numbers(alone.totals)
        assert reports[1].totals.completed == 50


def test_fast_forward_gives_the_same_numbers(alone: Report) -> None:
    slow = answer(asked(fast_forward=False))
    assert slow.totals.plans > 2 * alone.totals.plans
    for name, value in numbers(alone.totals).items():
        if value is not None and "p9" not in name and "p5" not in name:
            assert numbers(slow.totals)[name] == pytest.approx(value, rel=1e-5), name


def test_replicas_in_several_processes_and_in_one() -> None:
    scenario = asked(replicas=3)
    assert answer(scenario, 2).digest == answer(scenario, 1).digest
    talking = Scenario(scenario.simulate, traffic=(WorkloadSettings(arrivals="poisson:2", turns="2", requests=30),))
    assert answer(talking, 2).digest == answer(talking, 1).digest


def test_a_worker_that_fails_tells_why() -> None:
    with pytest.raises(WorkerFailed, match="did you mean"):
        answers([Scenario(SimulateSettings(hardware="H1000"))], forked(1))
    with pytest.raises(WorkerFailed, match="without a result"):
        list(forked(1)(lambda item: (_ for _ in ()).throw(SystemExit(0)), [b""]))


def test_the_edge_is_between_what_holds_and_what_does_not() -> None:
    heard: list[float] = []
    scenario = asked()
    sweep = highest(scenario, 0.5, 60.0, here, 2, lambda point: heard.append(point.rate))
    assert sweep.highest is not None
    assert sorted(heard) == [point.rate for point in sweep.points]
    below = [point for point in sweep.points if point.rate <= sweep.highest.rate]
    above = [point for point in sweep.points if point.rate > sweep.highest.rate]
    assert all(point.holds for point in below)
    assert not above[0].holds
    assert above[0].rate - sweep.highest.rate <= 2 * PRECISION * above[0].rate
    words = verdict(scenario, scenario.site(), sweep.points[0].report, sweep)
    assert f"AT MOST {sweep.highest.rate:.3g} requests/s; beyond that" in words
    assert sweep.planned_rate is not None and sweep.planned_rate <= sweep.highest.rate / (1 + ROOM)
    assert f"Plan for {sweep.planned_rate:.3g}: that holds even if every step takes 5% longer." in words
    assert words.startswith("HOLDS: TTFT <= 1.0 s for 0.99 of the requests")


def test_what_to_plan_for_where_the_edge_hangs_by_a_hair() -> None:
    """Steps of eight requests take a little less than is promised a token: any rate holds, on this very machine."""
    few = EngineSettings(max_running=8)
    full = curve(replace(asked(slo="tpot=1.0"), engine=few), [60.0], here)[0].report
    slowest_s = full.totals.tpot_s.quantile(1.0)
    assert slowest_s is not None
    scenario = replace(asked(slo=f"tpot={1.01 * slowest_s}", attain=1.0), engine=few)
    sweep = highest(scenario, 0.05, 60.0, here)
    assert sweep.highest is not None and sweep.highest.rate == 60.0
    assert sweep.planned_rate is not None and sweep.planned_rate < 0.9 * sweep.highest.rate
    [point] = curve(replace(scenario, margin=1 - 1 / (1 + ROOM)), [(1 + ROOM) * sweep.planned_rate], here)
    assert point.holds


@pytest.mark.parametrize(("low", "high", "words"), [(0.1, 0.2, "even the highest"), (500.0, 900.0, "even the lowest")])
def test_an_edge_outside_is_said_to_be_there(low: float, high: float, words: str) -> None:
    scenario = asked(100)
    sweep = highest(scenario, low, high, here)
    assert words in verdict(scenario, scenario.site(), sweep.points[0].report, sweep)


def test_what_cannot_be_swept() -> None:
    with pytest.raises(BadSetting, match="LOW < HIGH"):
        highest(asked(), 3.0, 2.0, here)
    with pytest.raises(BadSetting, match="--slo"):
        highest(asked(slo=None), 1.0, 2.0, here)
    with pytest.raises(BadSetting, match="no rate"):
        highest(asked(arrivals="closed:4"), 1.0, 2.0, here)


def test_who_went_away_does_not_count_and_who_was_refused_does() -> None:
    totals = Totals(promised=8, rejected=2, good=6)
    assert attained(totals) == 0.6
    totals.finished = {FinishReason.ABORT: 2, FinishReason.DEADLINE: 1}
    assert attained(totals) == 0.75
    assert attained(Totals(rejected=3)) is None
    assert attained(answer(asked(20, slo=None)).totals) is None
    assert SLO(ttft_s=1.0).ttft_s == 1.0


def test_tables_name_what_matters(alone: Report) -> None:
    scenario = asked()
    told = table(scenario, scenario.site(), alone)
    for words in ("llama-3.1-8b", "A10G", "poisson:4", "TTFT", "assumed, not measured", "seed 0", alone.digest):
        assert words in told
    assert "a p99 of 150 requests is that of 1" in told
    side_by_side = compare([("a", alone), ("b", curve(scenario, [1.0], here)[0].report)])
    assert "x)" in side_by_side
    assert "poisson:4" in load(scenario.faster(2.0))


def test_a_full_house_is_named() -> None:
    scenario = Scenario(asked().simulate, EngineSettings(max_running=2), asked(arrivals="poisson:20").traffic)
    sweep = highest(scenario, 0.01, 20.0, here)
    assert "--max-running 2" in verdict(scenario, scenario.site(), sweep.points[0].report, sweep)
