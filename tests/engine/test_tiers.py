"""Groups of neighbours, copies that are given up in order, and what a scheduler copies when: each block once, nothing
that is not needed, never what a failed step left."""

from __future__ import annotations

from typing import Any

import pytest
from engine_rig import Rig, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from headrace.core.step import DEVICE, HOST, Beat, Copy, StepPlan, Work
from headrace.core.types import FinishReason
from headrace.engine.tiers import HostTier, Own, Runs

IDLE, WAITED_FOR = (False, 0), (True, 0)


def test_a_group_lies_together_where_it_can() -> None:
    runs = Runs(10)
    first, second, third = runs.take(3), runs.take(3), runs.take(3)
    assert (first, second, third) == ([0, 1, 2], [3, 4, 5], [6, 7, 8])
    runs.release(second)
    assert runs.take(2) == [3, 4]  # the first run that holds it
    runs.release(first)
    runs.check()
    assert runs.take(5) == [0, 1, 2, 5, 9]  # in pieces, the longest first


def test_what_comes_back_joins_its_neighbours() -> None:
    runs = Runs(8)
    runs.take(8)
    for block in (3, 1, 5, 4, 2):
        runs.release([block])
        runs.check()
    assert runs.take(5) == [1, 2, 3, 4, 5]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=30))
def test_runs_against_a_set(blocks: int, calls: list[tuple[bool, int]]) -> None:
    runs, free, taken = Runs(blocks), set(range(blocks)), list[int]()
    for takes, count in calls:
        if takes and count <= runs.free:
            got = runs.take(count)
            assert len(set(got)) == count and free >= set(got)
            longest = max(sum(1 for _ in _from(free, start)) for start in free)
            assert longest < count or got == list(range(got[0], got[0] + count)), "a run was there, and was not used"
            free -= set(got)
            taken += got
        elif not takes:
            back, taken = taken[::2][:count], [one for at, one in enumerate(taken) if at % 2 or at // 2 >= count]
            runs.release(back)
            free |= set(back)
        runs.check()
        assert runs.free == len(free)


def _from(free: set[int], start: int) -> Any:
    while start in free:
        yield start
        start += 1


def test_copies_of_a_lower_rank_and_then_the_oldest_go_first_and_last_blocks_before_first_ones() -> None:
    tier = HostTier(6)
    tier.keep([1, 2], WAITED_FOR)
    tier.keep([3, 4], IDLE)
    tier.keep([5, 6], IDLE)
    tier.settle()
    tier.touch([3, 4], IDLE)
    tier.keep([7], IDLE)
    assert [name in tier for name in range(1, 8)] == [True, True, True, True, True, False, True]
    tier.settle()
    assert [name for name, _ in tier.keep([11, 12, 13, 14, 15], IDLE)] == [11, 12, 13, 14]  # not those waited for
    tier.settle()
    tier.keep([21, 22, 23, 24, 25, 26], WAITED_FOR)
    assert len(tier) == 6 and 1 not in tier and 11 not in tier
    tier.check()


def test_what_is_on_its_way_stays() -> None:
    tier = HostTier(2)
    tier.keep([1], IDLE)
    tier.settle()
    tier.hold([1])
    assert [name for name, _ in tier.keep([2, 3], WAITED_FOR)] == [2]
    assert 1 in tier
    tier.settle()
    assert [name for name, _ in tier.keep([3], WAITED_FOR)] == [3]
    assert 1 not in tier


class HostTierMachine(RuleBasedStateMachine):
    """The tier against a dict: a name keeps its block as long as it is here, and two names never share one."""

    names = st.lists(st.one_of(st.integers(0, 9), st.builds(Own, st.integers(0, 1), st.integers(0, 3))), unique=True)

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(7)
        self.block: dict[Any, int] = {}
        self.busy: set[Any] = set()

    @rule(names=names, waits=st.booleans(), priority=st.integers(-1, 1))
    def keep(self, names: list[Any], waits: bool, priority: int) -> None:
        rank = (waits, priority)
        higher = {name for name, held in self.tier._rank.items() if held > rank}
        there = [name for name in names if name in self.tier]
        missing = [name for name in names if name not in self.tier]
        new = self.tier.keep(names, rank)
        assert [name for name, _ in new] == missing[: len(new)]
        if len(new) < len(missing):
            assert self.tier.runs.free == 0
            assert set(self.tier._block) <= higher | self.busy | set(names), "it gave up too early"
        assert all(name in self.tier for name in [*there, *higher, *self.busy])
        self.block |= dict(new)
        self.busy |= {name for name, _ in new}

    @rule(names=names)
    def hold(self, names: list[Any]) -> None:
        here = [name for name in names if name in self.tier]
        self.tier.hold(here)
        self.busy |= set(here)

    @rule()
    def settle(self) -> None:
        self.tier.settle()
        self.busy.clear()

    @rule(name=st.integers(0, 9))
    def forget(self, name: int) -> None:
        self.tier.forget(name)
        self.busy.discard(name)
        assert name not in self.tier

    @invariant()
    def holds(self) -> None:
        self.tier.check()
        assert all(self.tier[name] == self.block[name] for name in self.tier._block)


def test_any_sequence_of_copies() -> None:
    run_state_machine_as_test(
        HostTierMachine, settings=settings(derandomize=True, max_examples=30, stateful_step_count=30, deadline=None)
    )


@pytest.mark.parametrize("damage", ["block", "rank", "run"])
def test_check_sees_damage(damage: str) -> None:
    tier = HostTier(3)
    tier.keep([1, 2], IDLE)
    if damage == "block":
        tier._block[2] = tier._block[1]
    elif damage == "rank":
        tier._rank[1] = WAITED_FOR
    else:
        tier.runs.free += 1
    with pytest.raises(AssertionError):
        tier.check()


def test_a_plan_knows_whether_a_work_waits_for_a_copy() -> None:
    copies = (Copy(DEVICE, HOST, ((5, 0), (6, 1))), Copy(HOST, DEVICE, ((2, 7),)))
    work = Work("a", 0, 4, True, (6,))
    assert StepPlan(0, (work,), copies=copies).overwrites
    assert StepPlan(0, (), copies=copies, beat=Beat(0, (), 0, {"a": (5,)})).overwrites is False  # nobody is in it
    assert not StepPlan(0, (work._replace(new_blocks=(7, 8)),), copies=copies).overwrites
    assert not StepPlan(0, (work,)).overwrites


# -- with a scheduler --------------------------------------------------------------------------------------------------


def tiered(**more: Any) -> Rig:
    return Rig(**{"blocks": 8, "host_blocks": 40, "max_running": 1, **more})


def turn(name: str, prompt: list[int], **more: Any) -> Any:
    return make_request(name, prompt, more.pop("new", 5), **more)


def copies(rig: Rig, target: str) -> list[int]:
    """How many blocks each plan copied there."""
    return [sum(len(copy.pairs) for copy in plan.copies if copy.target_tier == target) for plan in rig.plans]


def test_a_later_turn_finds_the_copies_of_the_turn_before_and_copies_out_what_is_new() -> None:
    rig = tiered()
    first = list(range(10))
    rig.add(turn("one", first))
    rig.drain()
    answered = first + rig.tokens("one")  # 15 tokens, of which 14 were computed: 3 blocks of 4
    assert sum(copies(rig, HOST)) == 3
    rig.add(turn("others", [40] * 28))  # all of the device's memory
    rig.drain()
    out = sum(copies(rig, HOST))
    rig.add(turn("two", answered + [7] * 3))
    rig.drain()
    assert rig.outputs["two"][-1].usage is not None
    assert rig.outputs["two"][-1].usage.cached_tokens == 12
    assert sum(copies(rig, DEVICE)) == 3
    assert sum(copies(rig, HOST)) - out == 2  # of 18 + 4 computed tokens, 5 blocks, three of which are there


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_who_yields_goes_on_with_its_copies_and_others_go_on_beside_them(prefix_cache: bool) -> None:
    rig = tiered(ordering="priority", preemption="swap", prefix_cache=prefix_cache, max_running=2, blocks=13)
    rig.add(turn("beside", [9] * 4, new=16, priority=5), turn("low", list(range(12)), new=12))
    for _ in range(4):
        rig.step()
    rig.add(turn("high", [8] * 28, priority=3, new=4))
    rig.drain()
    assert [rig.finish(name) for name in ("beside", "low", "high")] == [FinishReason.LENGTH] * 3
    low = rig.outputs["low"][-1].usage
    assert low is not None and low.preemptions == 1
    arrived = next(at for at, blocks in enumerate(copies(rig, DEVICE)) if blocks)
    step = rig.plans[arrived]
    assert [work.request_id for work in step.work] == ["beside"]
    assert [one.request.id for one in step.admitted] == ["low"]
    again = next(work for plan in rig.plans[arrived + 1 :] for work in plan.others if work.request_id == "low")
    assert again.start == 12


def test_too_few_blocks_are_computed_again() -> None:
    rig = tiered(ordering="priority", preemption="swap", least_copied_blocks=4)
    rig.add(turn("low", list(range(12)), new=12))
    for _ in range(3):
        rig.step()
    rig.add(turn("high", [8] * 8, priority=3))
    rig.drain()
    assert rig.outputs["low"][-1].usage.preemptions == 1  # type: ignore[union-attr]
    assert sum(copies(rig, DEVICE)) == 0


def test_copies_of_a_failed_step_are_forgotten() -> None:
    rig = tiered()
    rig.add(turn("one", list(range(10))))
    for _ in range(5):
        rig.step()
    rig.step(fails=True)  # copies "one" out
    assert copies(rig, HOST)[-1] == 3
    assert len(rig.scheduler._memory.tiers.host) == 0  # type: ignore[union-attr]


def test_who_was_being_copied_in_when_the_step_failed_starts_over() -> None:
    rig = tiered(max_running=2, blocks=9)
    rig.add(turn("one", list(range(10))))
    rig.drain()
    rig.add(turn("others", [40] * 30))
    rig.drain()
    rig.add(turn("again", list(range(10))))
    rig.step(fails=True)
    assert copies(rig, DEVICE)[-1] == 2
    rig.drain()
    assert rig.finish("again") is FinishReason.LENGTH


def test_two_who_need_the_same_copies_share_them() -> None:
    rig = tiered(max_running=3, blocks=9)
    rig.add(turn("one", list(range(10))))
    rig.drain()
    rig.add(turn("others", [40] * 30))
    rig.drain()
    rig.add(turn("a", list(range(10))), turn("b", list(range(10))))
    rig.drain()
    assert sum(copies(rig, DEVICE)) == 2
    assert [rig.outputs[name][-1].usage.cached_tokens for name in "ab"] == [8, 8]  # type: ignore[union-attr]


def test_without_a_tier_nothing_is_copied() -> None:
    rig = tiered(host_blocks=0, ordering="priority", preemption="swap")
    rig.add(turn("low", list(range(12)), new=12))
    rig.step()
    rig.add(turn("high", [8] * 8, priority=3))
    rig.drain()
    assert not any(plan.copies for plan in rig.plans)
