"""What steps compute under each batch former, and who yields to one that waits, step by step on small cases."""

from __future__ import annotations

from typing import Any

import pytest
from engine_rig import Rig, make_request
from policy_views import View, arriving, play

from headrace.core import events
from headrace.core.types import FinishReason
from headrace.engine.policy import (
    MOST_PREEMPTIONS,
    PRIORITY_LEVELS,
    BatchView,
    filling,
    is_filler,
    lower_level,
    splitfuse,
    static,
)


def served(rig: Rig) -> list[list[tuple[str, int]]]:
    """Who computed how many tokens in each step so far."""
    return [[(work.request_id, work.tokens) for work in plan.work] for plan in rig.plans]


def steps(rig: Rig, count: int) -> list[list[tuple[str, int]]]:
    before = len(rig.plans)
    for _ in range(count):
        rig.step()
    return served(rig)[before:]


def prompt(tokens: int, content: int) -> Any:
    return [content] * tokens


def test_static_batches_run_to_their_end_before_the_next_starts() -> None:
    rig = Rig(256, 64, batch="static", max_running=2)
    rig.add(make_request("long", prompt(4, 1), 5), make_request("short", prompt(4, 2), 2))
    rig.add(make_request("next", prompt(4, 3), 2))
    rig.drain()
    admitted_s = {event.request_id: event.at_s for event in rig.recorder.of(events.Admitted)}
    finished_s = {event.request_id: event.at_s for event in rig.recorder.of(events.Finished)}
    assert finished_s["short"] < finished_s["long"] <= admitted_s["next"]


def test_a_static_batch_fills_over_several_steps_before_it_decodes() -> None:
    rig = Rig(256, 8, batch="static", max_running=4)
    rig.add(*(make_request(name, prompt(6, at), 3) for at, name in enumerate("abcd")))
    assert steps(rig, 5) == [[("a", 6)], [("b", 6)], [("c", 6)], [("d", 6)], [(name, 1) for name in "abcd"]]
    rig.add(make_request("late", prompt(6, 9), 3))
    assert [name for name, _ in steps(rig, 1)[0]] == list("abcd")
    rig.drain()


def test_static_decodes_those_that_run_although_others_wait() -> None:
    drawn = View(known_tokens=12, computed_tokens=11)
    batch = BatchView(0.0, 32, [drawn], [], [View()])
    assert [share.requests for share in play(static(batch), [1])] == [[drawn], []]


def test_orca_puts_whole_prompts_beside_decodes_without_a_cap() -> None:
    rig = Rig(256, 8, batch="orca", admission="reserve-all", context=128)
    rig.add(make_request("a", prompt(4, 1), 9))
    steps(rig, 1)
    rig.add(make_request("b", prompt(100, 2), 3), make_request("c", prompt(60, 3), 3))
    assert steps(rig, 1) == [[("a", 1), ("b", 100), ("c", 60)]]
    rig.drain()
    assert not rig.recorder.of(events.Preempted)


def test_orca_reserves_the_longest_and_so_wastes_memory_that_pages_would_use() -> None:
    running = {}
    for admission in ("reserve-all", "free-blocks"):
        rig = Rig(64, 64, batch="orca", admission=admission, context=128)
        rig.add(*(make_request(str(number), prompt(8, number), 100) for number in range(8)))
        steps(rig, 2)
        running[admission] = rig.scheduler.running
    assert running == {"reserve-all": 2, "free-blocks": 8}


def test_splitfuse_steps_are_all_of_one_size() -> None:
    """Long prompts split, short ones composed: while prompts are left, every step computes exactly the budget."""
    rig = Rig(512, 20, batch="splitfuse", context=128)
    rig.add(make_request("long", prompt(50, 1), 9), *(make_request(f"s{at}", prompt(7, 2 + at), 9) for at in range(8)))
    dealt = steps(rig, 5)
    assert dealt[:3] == [[("long", 20)], [("long", 20)], [("long", 10), ("s0", 7), ("s1", 3)]]
    assert [sum(tokens for _, tokens in step) for step in dealt] == [20] * 5
    rig.drain()


def test_splitfuse_bounds_decodes_too() -> None:
    batch = BatchView(0.0, 4, [View()] * 6, [View()], [View()])
    assert [share.tokens for share in play(splitfuse(batch), [4, 0])] == [4, 0, 0]


def test_chunked_never_lets_a_decode_wait_and_never_exceeds_its_budget() -> None:
    """Sarathi-Serve: n decodes count first, then min(left of the prompt, budget - n)."""
    rig = Rig(512, 16, context=128)
    rig.add(*(make_request(str(at), prompt(4, at), 30) for at in range(3)))
    steps(rig, 1)
    rig.add(make_request("long", prompt(40, 9), 5), make_request("short", prompt(5, 8), 5))
    dealt = steps(rig, 4)
    assert [dict(step).get("long") for step in dealt] == [13, 13, 13, 1]
    assert dict(dealt[3])["short"] == 5
    assert all({"0", "1", "2"} <= dict(step).keys() for step in dealt)
    rig.drain()


def filler(name: str, tokens: int, **more: Any) -> Any:
    return make_request(name, prompt(tokens, 77), 1, priority=-PRIORITY_LEVELS, **more)


def test_filler_gets_what_others_leave() -> None:
    """FlexLLM: s = budget - c, window by window; nothing while prompts need all of it."""
    rig = Rig(512, 16, batch="filling", ordering="priority", context=128)
    rig.add(filler("train", 60), make_request("a", prompt(4, 1), 8), make_request("b", prompt(40, 2), 8))
    dealt = [dict(step) for step in steps(rig, 6)]
    assert [step.get("train", 0) for step in dealt] == [0, 0, 2, 14, 14, 14]  # the prompt takes 12, 15 and 13 tokens
    assert all(sum(step.values()) == 16 for step in dealt[2:5])
    rig.drain()
    assert rig.finish("train") is FinishReason.LENGTH


def test_filler_starts_only_while_nobody_waits_and_alone_gets_everything() -> None:
    fill, other = View(filler("f", 9)), View()
    assert is_filler(fill)
    assert not is_filler(other)
    batch = BatchView(0.0, 16, [], [fill], [other, fill])
    shares = play(filling(batch), [0, 0, 5, 1])
    assert [(share.requests, share.tokens) for share in shares] == [([], 0), ([], 16), ([other], 16), ([fill], 11)]
    alone = play(filling(BatchView(0.0, 16, [], [], [fill])), [0, 0, 0, 0])
    assert (alone[-1].requests, alone[-1].tokens) == ([fill], 16)


# -- layer groups ------------------------------------------------------------------------------------------------------


def layers_of(rig: Rig, count: int) -> list[dict[str, Any]]:
    """Who goes through which layers in each of so many steps."""
    before = len(rig.plans)
    steps(rig, count)
    return [{work.request_id: work.layers for work in plan.work} for plan in rig.plans[before:]]


def test_a_prompt_goes_through_the_layers_group_by_group_while_others_decode() -> None:
    """41 tokens, 15 beside a decode: n = floor(15 * 8 / 41) = 2 of 8 layers a step, and the token with the last."""
    rig = Rig(512, 16, batch="layered", layers=8, context=128)
    rig.add(make_request("a", prompt(4, 1), 30))
    steps(rig, 1)
    rig.add(make_request("long", prompt(41, 2), 5))
    assert layers_of(rig, 5) == [*({"a": None, "long": (at, at + 2)} for at in (0, 2, 4, 6)), {"a": None, "long": None}]
    assert [plan.work[-1].sample for plan in rig.plans[1:5]] == [False, False, False, True]
    assert [work.new_blocks != () for plan in rig.plans[1:5] for work in plan.others] == [True, False, False, False]
    assert [event.tokens for event in rig.recorder.of(events.StepDone)[1:5]] == [1, 1, 1, 42]
    rig.drain()


def test_layered_is_chunked_where_plans_cannot_cut_layers() -> None:
    plans = []
    for batch in ("chunked", "layered"):
        rig = Rig(64, 16, batch=batch, context=128)
        rig.add(*(make_request(str(at), prompt(9 * at + 4, at // 2), 9) for at in range(6)))
        rig.drain()
        plans.append(rig.plans)
    assert plans[0] == plans[1]


def test_what_fits_goes_whole_and_one_cohort_at_a_time() -> None:
    rig = Rig(512, 16, batch="layered", layers=4, context=128)
    rig.add(make_request("short", prompt(10, 1), 9), make_request("x", prompt(12, 2), 9))
    rig.add(make_request("y", prompt(9, 3), 9), make_request("z", prompt(20, 4), 9))
    assert layers_of(rig, 3) == [
        {"short": None, "x": (0, 1), "y": (0, 1)},  # 6 tokens left for 21, and 24 would be too many
        {"short": None, "x": (1, 3), "y": (1, 3)},  # 15 for 21
        {"short": None, "x": (3, 4), "y": (3, 4), "z": (0, 1)},  # 9 are left for 20
    ]
    rig.drain()


def test_steps_stay_within_the_budget_whatever_comes() -> None:
    rig = Rig(512, 16, batch="layered", layers=6, context=128, max_running=12)
    rig.add(*(make_request(str(at), prompt(5 + 17 * at % 60, at), 3 + at % 7) for at in range(30)))
    rig.drain()
    worth = [
        sum(one.tokens * ((one.layers[1] - one.layers[0]) if one.layers else 6) for one in plan.work) / 6
        for plan in rig.plans
    ]
    assert max(worth) <= 16
    assert sum(any(work.layers for work in plan.work) for plan in rig.plans) > 20


def test_who_begins_like_one_under_way_waits_and_shares() -> None:
    rig = Rig(512, 16, batch="layered", layers=4, context=128)
    rig.add(*(make_request(name, [*prompt(40, 1), at], 5) for at, name in enumerate("abc")))
    assert steps(rig, 4) == [*([[("a", 41)]] * 3), [("a", 41), ("b", 1), ("c", 1)]]  # with a's last layer
    rig.drain()
    assert [event.cached_tokens for event in rig.recorder.of(events.Admitted)] == [0, 40, 40]


def on_the_way() -> Rig:
    """One that decodes, and one after five of eight layers, in a pool that is full."""
    rig = Rig(14, 6, batch="layered", layers=8, context=56, admission=lambda one, pool: True)
    rig.add(make_request("a", prompt(5, 1), 30))
    steps(rig, 6)
    rig.add(make_request("long", prompt(40, 2), 5))
    assert layers_of(rig, 5)[-1] == {"a": None, "long": (4, 5)}
    assert rig.scheduler.used_blocks == 14
    return rig


def test_who_yields_on_the_way_starts_again_at_the_first_layer() -> None:
    rig = on_the_way()
    assert layers_of(rig, 3) == [{"a": None, "long": (5, 6)}, {"a": None}, {"a": None, "long": (0, 1)}]
    assert [event.request_id for event in rig.recorder.of(events.Preempted)] == ["long"]
    rig.drain()


def test_who_leaves_or_fails_on_the_way_leaves_nothing() -> None:
    gone, failed = on_the_way(), on_the_way()
    gone.abort("long")
    assert gone.scheduler.used_blocks == 4
    failed.step(fails=True)
    assert {failed.finish("a"), failed.finish("long")} == {FinishReason.ERROR}
    for rig in (gone, failed):
        rig.add(make_request("as long", prompt(40, 2), 5))
        rig.drain()
        assert not any(event.cached_tokens for event in rig.recorder.of(events.Admitted))


# -- a priority that preempts ------------------------------------------------------------------------------------------


def test_only_lower_levels_that_have_not_yielded_too_often_yield_to_one_that_waits() -> None:
    needy, worn = arriving(0.0, 5), arriving(3.0, 1)
    worn.preemptions = MOST_PREEMPTIONS
    behind = [arriving(1.0, 1), arriving(2.0, 5), worn, arriving(4.0, 5)]
    assert lower_level(behind, needy) is behind[0]
    assert lower_level(behind[1:], needy) is None
    needy.running = True
    assert lower_level(behind, needy) is behind[-1]


def urgent_among(preemption: str, tokens: int = 16, **more: Any) -> Rig:
    rig = Rig(ordering="priority", preemption=preemption, **{"blocks": 24, "budget": 32, "context": 64, **more})
    rig.add(*(make_request(f"batch{at}", prompt(8, at), 40) for at in range(3)))
    steps(rig, 3)
    rig.add(make_request("urgent", prompt(tokens, 9), 4, priority=5, arrival_s=rig.now))
    steps(rig, 2)
    return rig


def test_an_urgent_request_starts_at_once_at_the_cost_of_the_least() -> None:
    rig = urgent_among("priority", max_running=3)
    assert [event.request_id for event in rig.recorder.of(events.Preempted)] == ["batch2"]
    assert rig.tokens("urgent")
    rig.drain()
    patient = urgent_among("last-arrived", max_running=3)
    assert not patient.recorder.of(events.Preempted)
    assert not patient.tokens("urgent")
    patient.drain()


def test_as_many_yield_as_it_takes_for_memory() -> None:
    rig = urgent_among("priority", tokens=24, blocks=11)
    assert [event.request_id for event in rig.recorder.of(events.Preempted)] == ["batch2", "batch1"]
    assert rig.tokens("urgent")
    rig.drain()


def test_nobody_yields_in_vain() -> None:
    """Of two that run one is as urgent, so the other would yield and the newcomer still not start."""
    rig = Rig(
        24, 32, context=64, ordering="priority", preemption="priority", admission=lambda _, pool: not pool.running
    )
    rig.add(make_request("batch", prompt(8, 1), 8))
    steps(rig, 1)
    rig.add(make_request("urgent", prompt(8, 9), 4, priority=5, arrival_s=rig.now))
    steps(rig, 1)
    assert [event.request_id for event in rig.recorder.of(events.Preempted)] == ["batch"]
    rig.add(make_request("as urgent", prompt(8, 8), 4, priority=5, arrival_s=rig.now))
    rig.drain()
    assert [event.request_id for event in rig.recorder.of(events.Preempted)] == ["batch"]


def test_nobody_is_preempted_for_ever() -> None:
    """Urgent requests keep coming; the batch request is thrown out a few times and then runs to its end."""
    rig = Rig(64, 32, max_running=1, context=64, ordering="priority", preemption="priority")
    rig.add(make_request("batch", prompt(8, 1), 20))
    while not rig.finish("batch"):
        for _ in range(4):
            rig.step()
        rig.add(make_request(f"urgent at {rig.now}", prompt(4, 2), 2, priority=50, arrival_s=rig.now))
    assert rig.finish("batch") is FinishReason.LENGTH
    preempted = [event.request_id for event in rig.recorder.of(events.Preempted)]
    assert preempted == ["batch"] * MOST_PREEMPTIONS
    rig.drain()


def test_filler_pauses_for_prompts_of_others_and_goes_on_in_small_pieces() -> None:
    rig = Rig(256, 32, batch="chunked", max_running=8)
    rig.add(make_request("batch", prompt(6, 1), 6, priority=-PRIORITY_LEVELS))
    assert steps(rig, 3) == [[("batch", 4)], [("batch", 2)], [("batch", 1)]]
    rig.add(make_request("other", prompt(40, 2), 3), make_request("more", prompt(9, 3), 2, priority=-PRIORITY_LEVELS))
    assert steps(rig, 2) == [[("other", 32)], [("other", 8)]]
    assert sorted(steps(rig, 1)[0]) == [("batch", 1), ("more", 4), ("other", 1)]
    rig.drain()


def test_filler_comes_after_all_others_whenever_it_came() -> None:
    rig = Rig(256, 32, batch="chunked", max_running=1)
    rig.add(make_request("batch", prompt(4, 1), 2, priority=-PRIORITY_LEVELS), make_request("other", prompt(4, 2), 2))
    assert steps(rig, 1) == [[("other", 4)]]
    rig.drain()


def first_tokens(ordering: str, preemption: str) -> tuple[int, int]:
    """After how many steps an urgent request draws that came while a long prompt was begun, and the long one."""
    rig = Rig(256, 8, block_tokens=16, context=400, ordering=ordering, preemption=preemption)
    rig.add(make_request("long", prompt(300, 1), 2, 16))
    steps(rig, 2)
    rig.add(make_request("urgent", prompt(20, 2), 2, 16, priority=3, arrival_s=rig.now))
    after: dict[str, int] = {}
    for count in range(1, 60):
        rig.step()
        for name in ("long", "urgent"):
            if rig.tokens(name):
                after.setdefault(name, count)
    rig.drain()
    return after["urgent"], after["long"]


@pytest.mark.parametrize("preemption", ["priority", "swap", "last-arrived"])
def test_who_precedes_others_overtakes_the_prompts_they_have_begun(preemption: str) -> None:
    """Twenty tokens in steps of eight are three steps; behind the long prompt it would be its thirty-six and more."""
    assert first_tokens("priority", preemption) == (3, 39)
    waited, _ = first_tokens("fcfs", preemption)
    assert waited > 30


def test_only_those_behind_are_overtaken() -> None:
    """Of three urgent prompts, those that come later wait for the first, which has begun; all overtake the long one."""
    rig = Rig(256, 8, block_tokens=16, context=400, ordering="priority")
    rig.add(make_request("long", prompt(300, 1), 2, 16))
    steps(rig, 1)
    for number in range(3):
        rig.add(make_request(f"urgent{number}", prompt(20, number + 2), 2, 16, priority=3, arrival_s=rig.now))
        steps(rig, 1)
    rig.drain()
    urgent = [work.request_id for plan in rig.plans for work in plan.others if work.request_id != "long"]
    assert urgent == sorted(urgent) and len(set(urgent)) == 3
    assert [one.request_id for one in rig.recorder.of(events.Finished)] == [*dict.fromkeys(urgent), "long"]
