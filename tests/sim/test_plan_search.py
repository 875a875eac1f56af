"""The space of plans, what turns them down without simulation, and the search against simulating everything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from golden import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.config import BadSetting, EngineSettings
from headrace.sim.hardware import Topology, device, link
from headrace.sim.models import model
from headrace.sim.plan import space, told
from headrace.sim.plan.judge import Outcome, Question, idle_w, outcome
from headrace.sim.plan.limits import hopeless, limits
from headrace.sim.plan.search import Found, engine_for, parse_formats, search, swings
from headrace.sim.plan.space import Pool
from headrace.sim.plan.traffic import demand
from headrace.sim.scenario import Scenario, placement
from headrace.sim.settings import SimulateSettings
from headrace.sim.workers import here
from headrace.workload.settings import WorkloadSettings, parse_slo

BF16 = [("bf16", "bf16")]
GIB = 2**30


def pool(name: str, devices: int, nodes: int = 1) -> Pool:
    chip = device(name)
    return Pool(Topology(chip, devices, nodes, link("ib-ndr") if nodes > 1 else None), chip.usd_per_hour)


def asked(model_name: str, slo: str | None, requests: int = 60, rate: float = 3.0) -> Scenario:
    traffic = WorkloadSettings(arrivals=f"poisson:{rate}", lengths="100:600,20:120", requests=requests, slo=slo)
    return Scenario(SimulateSettings(model=model_name, attain=0.9), EngineSettings(), (traffic,))


# -- the space ---------------------------------------------------------------------------------------------------------


def test_apex_finds_the_same_three_plans() -> None:
    """Llama-3-70B on two H100: count, order of memory and memory of the README's plans. Memory is counted as there:
    decoder blocks against 80 GiB. Steps are not cut into parts there."""
    usual = SimulateSettings(model="llama-3-70b")
    everything = [one for one in space.plans(pool("H100-SXM", 2), usual, BF16) if one.simulate.microbatches == 1]
    fitting = [one for one in everything if _gib(one) < 80]
    assert len(fitting) == 3 and {one.simulate.replicas for one in fitting} == {1}
    published: list[dict[str, Any]] = golden("apex.json")["readme_example"]["plans"]
    ours = {(one.simulate.tensor, one.simulate.attention_copies, one.simulate.pipeline): _gib(one) for one in fitting}
    for plan, key in zip(published, [(2, 1, 1), (2, 2, 1), (1, 1, 2)], strict=True):
        assert ours[key] == pytest.approx(plan["param_gb_per_device"], abs=0.051)


def _gib(plan: space.Plan) -> float:
    return placement(plan.simulate).layer_weights * 2 / GIB


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4]), st.sampled_from(["llama-3.1-70b", "deepseek-v3"]))
@settings(max_examples=12, derandomize=True, deadline=None)
def test_every_plan_fills_its_devices_once(devices: int, nodes: int, name: str) -> None:
    there = pool("H100-SXM", devices, nodes)
    found = list(space.plans(there, SimulateSettings(model=name), BF16))
    assert len({one.simulate for one in found}) == len(found)
    for one in found:
        cut = one.simulate
        assert (cut.tensor or 1) * cut.pipeline == one.devices
        assert cut.replicas * one.devices <= there.topology.devices
        assert (cut.tensor or 1) % cut.attention_copies == 0
        assert not cut.spread_experts or model(name).experts
    assert {one.devices for one in found} == set(space.sizes(there))


def test_a_replica_never_straddles_half_a_node() -> None:
    there = pool("H100-SXM", 8, 4)
    assert [there.hardware(one) for one in (1, 4, 8, 16)] == [
        "H100-SXM",
        "4xH100-SXM",
        "8xH100-SXM",
        "2x8xH100-SXM@ib-ndr",
    ]
    assert there.hardware(12) is None
    assert [there.replicas(one) for one in (1, 4, 8, 16, 32)] == [32, 8, 4, 2, 1]


def test_memory_and_formats_are_refused_with_their_numbers() -> None:
    plans = list(space.plans(pool("A100-80GB", 2), SimulateSettings(model="llama-3.1-70b"), [*BF16, ("fp8", "bf16")]))
    kinds = {(one.devices, one.simulate.weights): space.refused(one, 4000) for one in plans}
    no = kinds[1, "bf16"]
    assert no is not None and no.kind == "weights do not fit" and "141.1 GB of weights" in no.reason
    eight = kinds[2, "fp8"]
    assert eight is not None and "A100-80GB does not multiply fp8" in eight.reason


# -- bounds ------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["A10G", "L40S"]),
    st.floats(0.5, 12.0),
    st.sampled_from(["ttft=0.3", "tpot=0.05", "ttft=1.0,tpot=0.04"]),
)
@settings(max_examples=12, derandomize=True, deadline=None)
def test_bounds_are_never_worse_than_what_is_simulated(name: str, rate: float, slo: str) -> None:
    scenario = asked("llama-3.1-8b", slo, 40, rate)
    needed = demand(scenario.arrivals(), parse_slo(slo))
    for plan in space.plans(pool(name, 2), scenario.simulate, BF16):
        if space.refused(plan, needed.longest):
            continue
        bound = limits(plan, scenario.engine, needed)
        came = _alone(scenario, plan, needed.requests)
        assert bound.e2e_s <= 1.001 * came.e2e_s
        assert bound.joules_per_token <= came.joules_per_token
        assert came.kept is not None
        if hopeless(plan, bound, needed):
            assert came.kept < plan.simulate.attain


def _alone(scenario: Scenario, plan: space.Plan, requests: int) -> Outcome:
    idle = idle_w(plan.simulate.hardware, plan.simulate.replicas)
    return outcome(Question(replace(scenario, simulate=plan.simulate), requests, idle))


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Found:
    return search(asked("llama-3.1-8b", "ttft=1.0,tpot=0.05"), [pool("A10G", 4), pool("L40S", 2)], BF16, here)


def test_the_search_finds_what_simulating_everything_finds(found: Found) -> None:
    """The oracle: every layout with every number of replicas."""
    scenario, best = found.scenario, {}
    for there in found.pools:
        for layout in space.plans(there, scenario.simulate, BF16):
            if space.refused(layout, found.demand.longest):
                continue
            for replicas in range(1, layout.simulate.replicas + 1):
                plan = layout.of(replicas)
                came = _alone(scenario, plan, found.demand.requests)
                if came.kept is not None and came.kept >= 0.9:
                    best[plan.simulate] = (plan.cost, came.e2e_s, came.joules_per_token)
    cheapest = min(cost for cost, *_ in best.values() if cost is not None)
    assert found.best is not None and found.best.plan.cost == cheapest
    for objective, axis in (("latency", 1), ("energy", 2)):
        ours = min(one.score(objective)[0] for one in found.holding)
        assert ours <= 1.001 * min(values[axis] for values in best.values())  # type: ignore[type-var]
    assert found.untried == 0


def test_the_front_holds_nothing_that_another_beats(found: Found) -> None:
    front = found.front
    assert front and front[0] == found.best
    for one in front:
        mine = [one.score(name)[0] for name in ("cost", "latency", "energy")]
        for other in found.holding:
            theirs = [other.score(name)[0] for name in ("cost", "latency", "energy")]
            assert theirs == mine or any(a > b for a, b in zip(theirs, mine, strict=True))


def test_what_is_said_is_what_was_found(found: Found) -> None:
    found.swings = swings(found, here)
    words = told.told(found)
    assert "RECOMMENDED for cost" in words and " refused: " in words
    assert "10 % more traffic" in words and "catalogue" in words
    assert "<table" in told.html(found)
    assert '"recommended"' in told.as_json(found)


def test_no_plan_says_so() -> None:
    scenario = asked("llama-3.1-70b", "ttft=0.001")
    none = search(scenario, [pool("L40S", 8)], BF16, here)
    assert none.best is None and told.told(none).startswith("NO PLAN")
    assert {one.kind for one in none.refused} >= {"weights do not fit", "first tokens too late"}


def test_a_backlog_is_about_throughput() -> None:
    scenario = asked("llama-3.1-8b", None, 40)
    found = search(scenario, [pool("L40S", 2)], BF16, here, objective="throughput")
    assert found.best is not None
    assert found.best.outcome.output_per_s == max(one.outcome.output_per_s for one in found.judged)


def test_a_budget_leaves_the_rest_untried() -> None:
    found = search(asked("llama-3.1-8b", "tpot=0.05"), [pool("L40S", 4)], BF16, here, budget=1)
    assert len(found.judged) == 1 and found.untried > 0


def test_steps_are_as_long_as_a_token_may_take() -> None:
    assert engine_for(EngineSettings(), 0.05, False).inter_token_ms == 50
    assert engine_for(EngineSettings(), 0.05, True).inter_token_ms == 250
    assert parse_formats("bf16,fp8", "bf16", ("bf16", "fp8")) == [("bf16", "bf16"), ("fp8", "bf16")]
    with pytest.raises(BadSetting, match="fp7"):
        parse_formats("fp7", "bf16", ("bf16", "fp8"))
