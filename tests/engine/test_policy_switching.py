"""Priorities that change, and who yields to them."""

from __future__ import annotations

from collections import Counter

import pytest
from engine_rig import Rig, make_request
from policy_views import View

from headrace.core.config import EngineSettings
from headrace.core.events import StepDone
from headrace.core.step import Run
from headrace.core.types import FinishReason, HeadraceError
from headrace.engine.policies.switching import LEVELS, STAY, PriorityTrace, markov_priority, random_priority
from headrace.engine.policy import AGEING_S, MOST_PREEMPTIONS, swap

OFTEN = EngineSettings(priority_updates=1.0)


def stepped(policy: PriorityTrace, steps: int) -> None:
    policy.observe(StepDone(0.0, 0, 1.0, 1, Run(steps, 1.0 / steps), 0, 0.0))


def level(policy: PriorityTrace, name: str) -> int:
    return round(-policy(View(make_request(name, range(4))), 0.0) / AGEING_S)


def test_priorities_change_every_so_many_steps_and_are_all_alike_likely() -> None:
    policy = random_priority(EngineSettings(priority_updates=0.04))
    names = [str(number) for number in range(400)]
    first = [level(policy, name) for name in names]
    stepped(policy, 24)
    assert [level(policy, name) for name in names] == first
    stepped(policy, 1)
    second = [level(policy, name) for name in names]
    assert sum(map(int.__eq__, first, second)) < 2 * len(names) / LEVELS
    assert all(20 < count < 60 for count in Counter(first).values()) and len(set(first)) == LEVELS


def test_a_memory_keeps_most_of_them() -> None:
    policy = markov_priority(OFTEN)
    names = [str(number) for number in range(500)]
    first = [level(policy, name) for name in names]
    stepped(policy, 1)
    kept = sum(map(int.__eq__, first, (level(policy, name) for name in names))) / len(names)
    assert abs(kept - (STAY + (1 - STAY) / LEVELS)) < 0.05


@pytest.mark.parametrize("make", [random_priority, markov_priority])
def test_it_does_not_matter_how_often_one_asks_or_who_else_is_there(make) -> None:  # type: ignore[no-untyped-def]
    often, seldom = make(OFTEN), make(OFTEN)
    names = [str(number) for number in range(40)]
    for name in names:
        assert level(often, name) == level(seldom, name)
    for _ in range(30):
        stepped(often, 1)
        for name in names:
            level(often, name)
    stepped(seldom, 30)
    assert [level(seldom, name) for name in names] == [level(often, name) for name in names]


@pytest.mark.parametrize("frequency", [0.0, -1.0, 1.5, float("nan")])
def test_frequencies_are_bounded(frequency: float) -> None:
    with pytest.raises(HeadraceError, match="priority_updates"):
        random_priority(EngineSettings(priority_updates=frequency))


def test_the_last_yields_to_whoever_precedes_it_but_not_for_ever() -> None:
    needy, first, last = View(), View(running=True), View(running=True, known_tokens=12, prompt_tokens=10)
    assert swap([first, last], needy) is last
    last.preemptions = MOST_PREEMPTIONS + 2
    assert swap([first, last], needy) is first
    first.preemptions = MOST_PREEMPTIONS
    assert swap([first, last], needy) is None
    assert swap([first, last], View(running=True)) is last


@pytest.mark.parametrize("ordering", ["random", "markov"])
def test_priorities_that_change_in_every_step_still_let_everybody_end(ordering: str) -> None:
    rig = Rig(12, 5, ordering=ordering, preemption="swap", priority_updates=1.0, host_blocks=60)
    for number in range(12):
        rig.add(make_request(str(number), [number] * 9, 20))
    rig.drain()
    assert {rig.finish(str(number)) for number in range(12)} == {FinishReason.LENGTH}
    assert sum(outputs[-1].usage.preemptions for outputs in rig.outputs.values() if outputs[-1].usage) > 20
