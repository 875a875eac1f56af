"""Two lanes in virtual time: steps that meet, requests that pass from one lane to the other."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_rig import Linear, Watched, traffic

from headrace.core import clock
from headrace.core.config import EngineSettings
from headrace.core.events import Decoded, Drew, Finished
from headrace.core.ports import Capacity
from headrace.core.types import FinishReason
from headrace.engine.policies.lanes import LANES
from headrace.engine.policy import BATCHES, ORDERINGS
from headrace.sim.beside import Beside
from headrace.sim.cost.analytic import Analytic
from headrace.sim.cost.batch import Batch, StepCost, batch_of
from headrace.sim.cost.divided import BANDWIDTH, COMPUTE, Divided, Knee, price_of
from headrace.sim.cost.placement import Parallel, Placement
from headrace.sim.hardware import Topology, device
from headrace.sim.models import model

SEVERAL = [name for name in LANES if name not in ("one", "nexus")]  # nexus is told what steps take, see below


# -- steps that meet ---------------------------------------------------------------------------------------------------


class Fixed:
    """Prices by hand: a step alone takes its share's inverse, two together as long again each."""

    def beside(self, steps: list[tuple[float, float]]) -> list[StepCost]:
        return [StepCost(seconds * len(steps) / share) for seconds, share in steps]


def ends(*steps: tuple[float, float, float]) -> list[float]:
    """When steps (begun_s, seconds, share) end."""

    async def run() -> list[float]:
        going, over = Beside(Fixed(), None), [0.0] * len(steps)  # type: ignore[arg-type]

        async def one(at: int, begun_s: float, seconds: float, share: float) -> None:
            await clock.sleep_until(begun_s)
            await going.run(seconds, share)  # type: ignore[arg-type]
            over[at] = clock.now()

        await asyncio.gather(*(one(at, *step) for at, step in enumerate(steps)))
        return over

    return clock.run(run(), virtual=True)


def test_a_step_is_slower_only_while_another_runs() -> None:
    assert ends((0.0, 1.0, 1.0)) == [1.0]
    assert ends((0.0, 1.0, 0.5)) == [2.0]
    # 1 s alone, then 1 s at half speed beside the other, which needs 1 s of half speed, then alone again
    assert ends((0.0, 3.0, 1.0), (1.0, 0.5, 1.0)) == pytest.approx([3.5, 2.0])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.01, 3), st.just(1.0)), min_size=1, max_size=2))
def test_the_work_of_two_takes_what_both_take(steps: list[tuple[float, float, float]]) -> None:
    """At equal shares two halve each other, so nothing is lost: busy time is the sum of the work."""
    over = ends(*steps)
    if len(steps) == 1:
        assert over == pytest.approx([steps[0][0] + steps[0][1]])
        return
    (a_s, a, _), (b_s, b, _) = steps
    meets = a_s < b_s + 2 * b and b_s < a_s + 2 * a and max(over) - min(a_s, b_s) < a + b + 1e-9
    if meets:
        assert max(over) == pytest.approx(min(a_s, b_s) + a + b)
    assert all(end >= begun + seconds - 1e-9 for end, (begun, seconds, _) in zip(over, steps, strict=True))
    assert all(end <= begun + 2 * seconds + 1e-9 for end, (begun, seconds, _) in zip(over, steps, strict=True))


# -- prices ------------------------------------------------------------------------------------------------------------

A100 = Analytic(Placement(model("llama-3.1-8b"), Topology(device("A100-80GB"), 1), Parallel()), host_s=5e-4)
PROMPTS, DECODES = batch_of([(0, 2000)], 1), batch_of([(800, 1)] * 32, 32)


def seconds(*steps: tuple[Batch, float]) -> list[float]:
    return [cost.seconds for cost in Divided(A100).beside([(price_of(batch), share) for batch, share in steps])]


def test_knees_rise_to_one() -> None:
    for knee in (COMPUTE, BANDWIDTH, Knee(1.0, 0.0)):
        speeds = [knee.speed(percent / 100) for percent in range(1, 101)]
        assert speeds == sorted(speeds)
        assert speeds[-1] == 1.0
        assert all(speed >= percent / 100 - 1e-12 for percent, speed in enumerate(speeds, 1))
    assert BANDWIDTH.speed(0.4) == 1.0 > BANDWIDTH.speed(0.39)


def test_the_whole_device_is_the_model_itself() -> None:
    for batch in (PROMPTS, DECODES):
        assert seconds((batch, 1.0)) == pytest.approx([A100.estimate(batch).seconds])


def test_prompts_want_units_and_decodes_want_bandwidth() -> None:
    """A compute-bound step slows down with its share, a memory-bound one hardly, until it has too few units."""
    prompts = {share: seconds((PROMPTS, share))[0] for share in (0.25, 0.5, 1.0)}
    decodes = {share: seconds((DECODES, share))[0] for share in (0.1, 0.5, 1.0)}
    assert prompts[0.5] / prompts[1.0] == pytest.approx(1 / COMPUTE.speed(0.5), rel=0.05)
    assert prompts[0.25] > 1.9 * prompts[0.5]
    assert decodes[0.5] == pytest.approx(decodes[1.0], rel=0.02)
    assert decodes[0.1] > 2 * decodes[1.0]


def test_two_steps_are_slower_together_and_never_slower_than_one_after_the_other() -> None:
    for x in (0.2, 0.5, 0.7):
        together = seconds((PROMPTS, x), (DECODES, 1 - x))
        assert all(
            one >= alone
            for one, (alone,) in zip(together, (seconds((PROMPTS, x)), seconds((DECODES, 1 - x))), strict=True)
        )
    twice = seconds((DECODES, 1.0), (DECODES, 1.0))
    assert twice[0] == twice[1]
    assert twice[0] == pytest.approx(2 * seconds((DECODES, 0.5))[0], rel=0.1)  # the bandwidth is shared
    assert seconds((PROMPTS, 1.0), (PROMPTS, 1.0)) == seconds((PROMPTS, 0.5), (PROMPTS, 0.5))  # promised twice


def test_any_model_can_be_divided() -> None:
    halves = Divided(Linear()).beside([(price_of(PROMPTS), 0.5)])[0]
    whole = Linear().estimate(PROMPTS)
    assert halves.seconds == pytest.approx(whole.overhead_s + whole.compute_s / COMPUTE.speed(0.5))
    assert halves.joules == whole.joules


# -- a replica ---------------------------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    blocks=st.integers(40, 120),
    block_tokens=st.sampled_from([1, 4, 16]),
    layers=st.sampled_from([1, 4]),
    budget=st.sampled_from([16, 64, 500]),
    max_running=st.integers(1, 12),
    rate=st.sampled_from([8.0, 40.0, 1000.0]),
    seed=st.integers(0, 10**6),
    lanes=st.sampled_from(SEVERAL),
    lane_shares=st.sampled_from(["50,50", "80,100", "20,80"]),
    ordering=st.sampled_from(list(ORDERINGS)),
    batch=st.sampled_from(list(BATCHES)),
    cancels=st.sampled_from([0.0, 0.3]),
    patience_s=st.sampled_from([(), (0.3, 1e9)]),
)
def test_everybody_is_answered_in_full(  # type: ignore[no-untyped-def]
    blocks, block_tokens, layers, budget, max_running, rate, seed, cancels, patience_s, **policies
) -> None:
    capacity = Capacity(blocks if block_tokens > 1 else blocks * 3, block_tokens, 140, 100, layers=layers)
    setting = EngineSettings(block_tokens=block_tokens, max_running=max_running, **policies)
    arrivals = list(traffic(seed=seed, count=25, rate=rate, cancels=cancels))
    watched = Watched(setting, capacity, budget, patience_s=patience_s).run(arrivals)
    assert {plan.lane for plan in watched.plans} == {0, 1}
    assert all(plan.beat is None for plan in watched.plans if plan.lane == 0)
    for event in watched.events:
        if isinstance(event, Finished) and event.reason in (FinishReason.STOP, FinishReason.LENGTH):
            wanted = min(arrivals[int(event.request_id)].output_tokens, event.max_new_tokens)
            context = 140 - event.usage.prompt_tokens
            assert event.usage.output_tokens == min(wanted, context)
            times = watched.token_s[event.request_id]
            assert len(times) == event.usage.output_tokens
            assert times == sorted(times)
            assert times[-1] == event.at_s
    gaps = watched.stats.totals.itl_s.count
    drawn = sum(len(event.request_ids) for event in watched.events if isinstance(event, Drew))
    assert gaps + len(watched.token_s) == drawn + sum(e.requests for e in watched.events if isinstance(e, Decoded))
    again = Watched(setting, capacity, budget, patience_s=patience_s).run(arrivals)
    assert again.events == watched.events


def test_a_prompt_does_not_stop_the_beat() -> None:
    """With one lane and whole prompts first, streams wait for a long prompt; beside it they hardly do."""
    arrivals = list(traffic(seed=5, count=20, rate=30.0, longest=40))
    long = replace(arrivals[-1], prompt=(type(arrivals[-1].prompt[0])(4000),))
    worst = {}
    for lanes in ("one", "fixed"):
        setting = EngineSettings(batch="prefill-first", lanes=lanes, prefix_cache=False)
        watched = Watched(setting, Capacity(1000, 16, 5000, 100), 8192).run([*arrivals[:-1], long])
        worst[lanes] = watched.stats.totals.itl_s.greatest
    assert worst["fixed"] < 0.4 * worst["one"]
