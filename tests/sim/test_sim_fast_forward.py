"""Many steps at once are the same steps: every token at the same time, every block the same, to the end."""

from __future__ import annotations

from dataclasses import astuple, fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_rig import MANY, Linear, Watched, traffic

from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity
from headrace.core.types import SLO, FinishReason
from headrace.engine.policy import ADMISSIONS, BATCHES, ORDERINGS, PREEMPTIONS
from headrace.sim.lives import Lives
from headrace.sim.sketch import Course, Sketch
from headrace.sim.spent import Spent
from headrace.sim.stats import Totals

TOLERANCE = 1e-9  # relative: times are summed in another order


def both(
    capacity: Capacity,
    setting: EngineSettings,
    budget: int,
    line: int = MANY,
    patience_s: tuple[float, ...] = (),
    **traits: float,
) -> list[Watched]:
    runs = []
    for steps in (MANY, 1):
        watched = Watched(setting, replace(capacity, steps=steps), budget, Linear(line), patience_s=patience_s)
        arrivals = enumerate(traffic(**traits))  # type: ignore[arg-type]
        runs.append(
            watched.run(replace(one, slo=SLO(0.1 * (at % 5), 0.01) if at % 3 else None) for at, one in arrivals)
        )
    return runs


def assert_same_totals(fast: Totals, slow: Totals) -> None:
    for name in (one.name for one in fields(slow)):
        mine, value = getattr(fast, name), getattr(slow, name)
        if isinstance(value, Sketch):
            *sums, _ = mine.state()
            assert sums == pytest.approx(value.state()[:-1], rel=TOLERANCE, abs=1e-12), name
            for share in (0.1, 0.5, 0.9, 0.99):
                assert mine.quantile(share) == pytest.approx(value.quantile(share), rel=0.011), name  # the next bucket
        elif isinstance(value, Spent):
            assert astuple(mine) == pytest.approx(astuple(value), rel=TOLERANCE), name
        elif isinstance(value, Lives):
            assert [life[4:] for life in mine.kept] == [life[4:] for life in value.kept]
        elif name != "plans" and not isinstance(value, Course):
            assert mine == pytest.approx(value, rel=TOLERANCE), name


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    blocks=st.integers(40, 160),
    block_tokens=st.sampled_from([1, 4, 16]),
    layers=st.sampled_from([1, 4, 30]),
    budget=st.sampled_from([3, 16, 64, 500]),
    max_running=st.integers(1, 12),
    rate=st.sampled_from([1.0, 8.0, 40.0, 1000.0]),
    seed=st.integers(0, 10**6),
    line=st.sampled_from([1, 3, MANY]),
    ordering=st.sampled_from(list(ORDERINGS)),
    admission=st.sampled_from(list(ADMISSIONS)),
    batch=st.sampled_from(list(BATCHES)),
    preemption=st.sampled_from(list(PREEMPTIONS)),
    prefix_cache=st.booleans(),
    cancels=st.sampled_from([0.0, 0.3]),
    patience_s=st.sampled_from([(), (0.0717, 0.3, 1e9)]),
)
def test_the_same_as_stepping(  # type: ignore[no-untyped-def]
    blocks, block_tokens, layers, budget, max_running, rate, seed, line, cancels, patience_s, **policies
) -> None:
    capacity = Capacity(blocks if block_tokens > 1 else blocks * 3, block_tokens, 140, 100, layers=layers)
    fair = {"tenant_weights": "t1=3,t2=0.7", "max_queue_requests": 20}
    setting = EngineSettings(block_tokens=block_tokens, max_running=max_running, **fair, **policies)
    fast, slow = both(capacity, setting, budget, line, patience_s, seed=seed, count=25, rate=rate, cancels=cancels)
    assert fast.story() == slow.story()
    assert fast.blocks() == slow.blocks()
    assert fast.token_s.keys() == slow.token_s.keys()
    for name, times in slow.token_s.items():
        assert fast.token_s[name] == pytest.approx(times, rel=TOLERANCE)
    assert_same_totals(fast.stats.totals, slow.stats.totals)
    assert len(fast.plans) <= len(slow.plans)


def test_it_does_go_fast() -> None:
    setting = EngineSettings()
    traits = {"seed": 1, "count": 30, "rate": 1.0, "longest": 800}
    fast, slow = both(Capacity(4000, 16, 3000, 100), setting, 500, **traits)
    assert len(slow.plans) > 10 * len(fast.plans), (len(slow.plans), len(fast.plans))
    assert fast.cost.asked < 2 * len(fast.plans)
    assert sum(event.again for event in fast.events if hasattr(event, "again")) == 0


def test_preemptions_and_rejections_are_among_what_was_tested() -> None:
    traits = {"seed": 3, "count": 120, "rate": 60.0, "cancels": 0.2}
    setting = EngineSettings(block_tokens=4, max_queue_requests=15)
    fast, slow = both(Capacity(60, 4, 120, 100), setting, 32, patience_s=(0.5, 1e9, 1e9), **traits)
    totals = fast.stats.totals
    assert totals.preemptions > 5
    assert totals.rejected > 5
    assert totals.finished[FinishReason.ABORT] > 3
    assert totals.finished[FinishReason.DEADLINE] > 3
    assert totals.steps > len(fast.plans) + 20
    assert fast.story() == slow.story()


def test_prompts_on_their_way_through_the_layers_are_stepped() -> None:
    setting = EngineSettings(block_tokens=4, batch="layered")
    fast, slow = both(Capacity(400, 4, 400, 100, layers=12), setting, 16, seed=4, count=40, rate=8.0)
    cut = [plan for plan in fast.plans if any(work.layers for work in plan.others)]
    assert len(cut) > 50
    assert all(plan.steps == 1 for plan in cut)
    assert len(fast.plans) < len(slow.plans)
    assert fast.story() == slow.story()
    assert_same_totals(fast.stats.totals, slow.stats.totals)


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_executors_may_repeat_a_few_times_only(steps: int) -> None:
    runs = []
    for most in (steps, 1):
        capacity = Capacity(400, 4, 400, 100, most)
        runs.append(Watched(EngineSettings(block_tokens=4), capacity).run(traffic(5, 20, 3.0)))
    assert runs[0].story() == runs[1].story()
    assert max(plan.steps for plan in runs[0].plans) == steps
