"""How two lanes share a device: what is told is told, feedback moves for whoever breaks a promise alone, and prediction
finds what looking at every split finds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, pairwise
from typing import Any

import pytest
from engine_rig import Rig, make_request
from hypothesis import given as drawn
from hypothesis import settings as limits
from hypothesis import strategies as st

from headrace.core.config import EngineSettings
from headrace.core.events import Arrived, Decoded, Drew, Preempted, StepDone
from headrace.core.step import Run
from headrace.core.types import HeadraceError, RequestId
from headrace.engine.policies.lanes import LANES, LEAST, STEP, Fixed, LanesView, Load, Measured, Nexus, SemiPD, Shares

PROMPTS, DECODES = 0, 1
EVEN = EngineSettings(lane_shares="50,50", first_token_ms=1000.0, inter_token_ms=100.0)


def load(tokens: int) -> Load:
    return Load(1, tokens, 0, 0, 0, 0, 0)


def view(prompts: Load | None, decodes: Load | None, now: float = 0.0, used: int = 0) -> LanesView:
    return LanesView(now, PROMPTS, (prompts, decodes), (0.5, 0.5), used, 100)


def test_fixed_is_what_the_settings_say() -> None:
    policy = Fixed(EngineSettings(lane_shares="60,40"))
    assert policy(view(load(9), None)) == policy(view(load(9), load(1), now=1e6, used=100)) == (0.6, 0.4)


@pytest.mark.parametrize("shares", ["60", "60,x", "5,95", "60,101", "60,40,1", ""])
@pytest.mark.parametrize("name", ["fixed", "semi-pd", "nexus"])
def test_shares_that_nobody_can_have(name: str, shares: str) -> None:
    with pytest.raises(HeadraceError, match="lane-shares"):
        LANES[name](EngineSettings(lane_shares=shares), Measured(1.0, 1.0))


def test_nexus_needs_a_prediction() -> None:
    with pytest.raises(HeadraceError, match="what steps take"):
        LANES["nexus"](EVEN, None)


# -- feedback ----------------------------------------------------------------------------------------------------------

NAMES: Iterator[RequestId] = map(RequestId, map(str, count()))


def window(policy: SemiPD, start_s: float, ttft_s: float, tpot_s: float, prompts: int = 10) -> float:
    """A window of steps in which every first token took `ttft_s`, a tenth of that computing, and every other `tpot_s`.
    Returns when it was over."""
    policy(view(load(1), load(1), now=start_s))
    each_s = tpot_s * policy.WINDOW / prompts
    for number in range(prompts):
        name, at_s = next(NAMES), start_s + number * each_s
        policy.observe(Arrived(at_s, name, 100, 10))
        policy.observe(StepDone(at_s + ttft_s, number, 0.1 * ttft_s, 100, Run(1, 0.1 * ttft_s), 0, 0.0))
        policy.observe(Drew(at_s + ttft_s, (name,), (1,), (name,)))
    run = Run(policy.WINDOW, tpot_s)
    end_s = start_s + run.total_s
    policy.observe(StepDone(end_s, 0, run.total_s, 4, run, 0, 0.0))
    policy.observe(Decoded(end_s, (), (), 4, run))
    return end_s


def after(policy: SemiPD, end_s: float) -> Shares:
    """The shares once what was seen by `end_s` counts; until then they are the old ones."""
    before = policy(view(load(1), load(1), now=end_s))
    assert policy(view(load(1), load(1), now=end_s + 0.9 * policy.SWITCH_S)) == before
    return policy(view(load(1), load(1), now=end_s + 1.1 * policy.SWITCH_S))


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "moved"),
    [(0.5, 0.05, None), (3.0, 0.3, None), (3.0, 0.05, PROMPTS), (0.5, 0.3, DECODES)],
    ids=["both kept", "both broken", "first tokens late", "decodes slow"],
)
def test_feedback_moves_for_whoever_breaks_a_promise_alone(ttft_s: float, tpot_s: float, moved: int | None) -> None:
    policy = SemiPD(EVEN)
    shares = after(policy, window(policy, 0.0, ttft_s, tpot_s))
    if moved is None:
        assert shares == (0.5, 0.5)
    else:
        assert 0.5 < shares[moved] <= 0.5 + policy.MOST * STEP + 1e-9
        assert shares[1 - moved] == 0.5


def test_nothing_moves_before_the_window_is_full() -> None:
    policy = SemiPD(EVEN)
    policy(view(load(1), load(1)))
    policy.observe(Arrived(0.0, RequestId("late"), 100, 10))
    run = Run(policy.WINDOW - 1, 0.05)
    policy.observe(StepDone(run.total_s, 0, run.total_s, 4, run, 0, 0.0))
    assert after(policy, 1e3) == (0.5, 0.5)


def test_who_still_waits_counts_as_late() -> None:
    """Else the worst overload, in which nobody gets a first token, would look like none."""
    policy = SemiPD(EVEN)
    policy(view(load(1), load(1)))
    for number in range(20):
        policy.observe(Arrived(0.1 * number, next(NAMES), 100, 10))
    run = Run(policy.WINDOW, 0.05)
    policy.observe(StepDone(run.total_s, 0, run.total_s, 4, run, 0, 0.0))
    policy.observe(Decoded(run.total_s, (), (), 4, run))
    assert after(policy, run.total_s)[PROMPTS] > 0.5


@pytest.mark.parametrize(("lane", "ttft_s", "tpot_s"), [(PROMPTS, 9.0, 0.05), (DECODES, 0.5, 0.9)])
def test_where_one_lane_has_all_the_other_shrinks_to_the_least(lane: int, ttft_s: float, tpot_s: float) -> None:
    policy, now = SemiPD(EVEN), 0.0
    seen = [(0.5, 0.5)]
    for _ in range(40):
        end_s = window(policy, now, ttft_s, tpot_s)
        seen.append(after(policy, end_s))
        now = end_s + 1.2 * policy.SWITCH_S
    assert seen[-1][lane] == 1.0 and seen[-1][1 - lane] == pytest.approx(LEAST)
    for before, then in pairwise(seen):
        assert then[lane] >= before[lane] and then[1 - lane] <= before[1 - lane]
        assert before[1 - lane] == then[1 - lane] or then[lane] == 1.0, "taken before all was given"


# -- prediction --------------------------------------------------------------------------------------------------------


def splits(start: float) -> list[float]:
    """All that can be reached from there step by step."""
    reachable = (round(start + STEP * steps, 6) for steps in range(-20, 21))
    return [split for split in reachable if LEAST <= split <= 1.0 - LEAST]


@limits(max_examples=300)
@drawn(
    prompts=st.integers(1, 2000),
    decodes=st.integers(1, 200),
    base_s=st.floats(1e-4, 0.1),
    used=st.integers(0, 100),
    start=st.integers(20, 80),
)
def test_prediction_finds_what_looking_at_every_split_finds(
    prompts: int, decodes: int, base_s: float, used: int, start: int
) -> None:
    predict = Measured(base_s, 1e-3)
    policy = Nexus(EngineSettings(lane_shares=f"{start},{100 - start}"), predict)
    loads = (load(prompts), load(decodes))
    first = PROMPTS if used < 70 else DECODES
    other = 1 - first
    alone = predict((None, loads[1]) if other else (loads[0], None), (1.0, 1.0))[other]
    bound = alone * (policy.BETA if first == PROMPTS else policy.ALPHA)

    def seconds(split: float) -> Shares:
        return predict(loads, (split, 1.0 - split))

    within = [split for split in splits(start / 100) if seconds(split)[other] <= bound]
    best = min(within, key=lambda split: seconds(split)[first])
    shares = policy(view(*loads, used=used))
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] == pytest.approx(best) or abs(best - start / 100) <= policy.DELTA + 1e-9


def test_a_lane_without_the_other_gets_the_whole_device() -> None:
    policy = Nexus(EVEN, Measured(0.01, 0.001))
    assert policy(view(load(9), None)) == (1.0, LEAST)
    assert policy(view(None, load(9))) == (LEAST, 1.0)


def test_a_small_change_is_not_worth_one() -> None:
    """From 0.35 the best is 0.30: a step is DELTA, and so nothing."""
    policy = Nexus(EngineSettings(lane_shares="35,65"), Measured(0.01, 0.001))
    assert policy(view(load(500), load(50))) == pytest.approx((0.35, 0.65))


def test_measured_shares_what_both_were_promised() -> None:
    predict, both = Measured(0.01, 0.001), (load(90), load(40))
    assert predict(both, (0.5, 0.5)) == pytest.approx((0.2, 0.1))
    assert predict(both, (1.0, 1.0)) == pytest.approx((0.2, 0.1)), "both cannot have all"
    assert predict((load(90), None), (1.0, 1.0)) == pytest.approx((0.1, 0.0))


# -- who plans first ---------------------------------------------------------------------------------------------------


def test_a_lane_waits_for_the_first_in_the_ordering_that_found_no_block() -> None:
    """Else whoever decodes takes his next step, and his blocks, before anybody may take them from him; for ever."""
    choices: dict[str, Any] = {"lanes": "fixed", "ordering": "priority", "admission": lambda request, pool: True}
    rig = Rig(5, 4, context=20, prefix_cache=False, **choices)
    rig.add(make_request("low", [1, 2, 3], 12, 4))
    rig.begin(0)
    rig.end(0)
    while rig.scheduler.used_blocks < 3:
        assert rig.begin(1)
        rig.end(1)
    rig.add(make_request("high", [7] * 12, 2, 4, priority=3))
    assert rig.begin(1), "it decodes, beside all that follows"
    for _ in range(2):
        assert rig.begin(0)
        rig.end(0)
    assert rig.begin(0) is None, "no block is free, and who is in flight yields to nobody"
    rig.end(1)
    assert rig.begin(1) is None, "the other lane goes first"
    assert rig.begin(0)
    assert [event.request_id for event in rig.recorder.of(Preempted)] == ["low"]
    rig.end(0)
    rig.drain()
