"""The scheduler against the strict executor: what one scenario at a time must do. The executor checks content."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_rig import Rig, make_request, newest_first

from headrace.core import events
from headrace.core.ports import Capacity
from headrace.core.step import Sampled, StepResult
from headrace.core.types import Blank, FinishReason, InvalidRequest, Overloaded, Request
from headrace.engine.policy import RequestView
from headrace.engine.progress import check_servable
from headrace.engine.scheduler import BadResult

# -- lengths and ends ----------------------------------------------------------------------------------------------


def test_one_request_runs_to_its_length() -> None:
    rig = Rig()
    rig.add(make_request("a", range(10), 5))
    rig.drain()
    assert rig.finish("a") is FinishReason.LENGTH
    assert len(rig.tokens("a")) == 5
    assert [plan.tokens for plan in rig.plans] == [10, 1, 1, 1, 1, 0]
    assert rig.plans[-1].released == ("a",)


def test_the_context_ends_a_request_too() -> None:
    rig = Rig(context=12)
    rig.add(make_request("a", range(10), 500))
    rig.drain()
    assert rig.finish("a") is FinishReason.LENGTH
    assert len(rig.tokens("a")) == 2


def test_a_stop_token_is_the_last_token() -> None:
    rig = Rig()
    rig.add(make_request("a", range(10), 20))
    rig.drain()
    stop = rig.tokens("a")[3]
    rig.add(make_request("b", range(10), 20, stop_token_ids=frozenset({stop})))
    rig.drain()
    assert rig.finish("b") is FinishReason.STOP
    assert rig.tokens("b") == rig.tokens("a")[: rig.tokens("a").index(stop) + 1]


def test_usage_counts_the_cache_of_the_first_admission() -> None:
    rig = Rig()
    rig.add(make_request("a", range(10), 2))
    rig.drain()
    rig.add(make_request("b", range(10), 2))
    rig.drain()
    usage = rig.outputs["b"][-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.output_tokens, usage.cached_tokens, usage.preemptions) == (10, 2, 8, 0)


def test_a_deadline_ends_the_waiting_and_the_running() -> None:
    rig = Rig(max_running=1)
    rig.add(make_request("runs", range(4), 50, deadline_s=20.0), make_request("waits", range(4), 50, deadline_s=9.0))
    assert rig.scheduler.next_deadline() == 9.0
    rig.drain()
    assert {rig.finish("runs"), rig.finish("waits")} == {FinishReason.DEADLINE}
    assert rig.tokens("runs")
    assert not rig.tokens("waits")
    assert rig.scheduler.next_deadline() is None


def test_abort_in_flight_drops_what_the_step_draws_even_if_the_id_comes_back() -> None:
    rig = Rig()
    rig.add(make_request("a", range(6), 8))
    rig.step()
    rig.now += 1
    plan = rig.scheduler.plan(rig.now)
    assert plan is not None
    result = rig.executor.perform(plan)
    assert rig.scheduler.abort("a", rig.now) is not None
    rig.scheduler.add(make_request("a", range(6), 3), rig.now)
    assert rig.scheduler.commit(result, rig.now) == []
    rig.requests["a"], rig.outputs["a"] = make_request("a", range(6), 3), []
    rig.drain()
    assert len(rig.tokens("a")) == 3


def test_aborting_nobody_is_nothing() -> None:
    rig = Rig()
    assert rig.scheduler.abort("ghost", 0.0) is None


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (make_request("a", [], 4), "empty"),
        (make_request("a", range(4), 0), "max_tokens must be at least 1"),
        (make_request("a", range(32), 4), "the prompt has 32 tokens, but prompt and output together may have 32"),
        (make_request("a", range(4), 4, block_keys=(1, 2)), "more block keys"),
        (make_request("a", range(4), 4, deadline_s=float("nan")), "deadline"),
    ],
)
def test_what_can_never_be_served_is_refused(request_: Request, says: str) -> None:
    rig = Rig(context=32)
    with pytest.raises(InvalidRequest, match=says):
        rig.scheduler.add(request_, 0.0)
    assert rig.scheduler.live == 0
    assert len(rig.recorder.of(events.Rejected)) == 1


def test_an_id_is_taken_until_its_request_ends() -> None:
    rig = Rig()
    rig.add(make_request("a", range(4)))
    with pytest.raises(InvalidRequest, match="another id"):
        rig.scheduler.add(make_request("a", range(4)), 0.0)
    rig.drain()
    rig.add(make_request("a", range(4)))
    rig.drain()


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    rig = Rig(max_running=1, max_queue_requests=3, max_queue_tokens=20)
    rig.add(make_request("0", range(4)))
    rig.step()
    rig.add(*(make_request(str(n), range(4)) for n in (1, 2, 3)))
    with pytest.raises(Overloaded):
        rig.scheduler.add(make_request("4", range(4)), rig.now)
    rig.abort("3")
    with pytest.raises(Overloaded):
        rig.scheduler.add(make_request("5", range(13)), rig.now)
    rig.add(make_request("6", range(12)))
    rig.drain()


# -- sharing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [5, 7, 16, 33, 64, 101, 1000])
@pytest.mark.parametrize("batch", ["chunked", "prefill-first"])
def test_equal_prompts_compute_the_prefix_about_once(budget: int, batch: str) -> None:
    """32 requests, 100 shared tokens, 25 blocks: the prefix once, and of each its own token and its output."""
    rig = Rig(blocks=512, budget=budget, context=200, batch=batch)
    rig.add(*(make_request(str(n), [*range(100), n], 2) for n in range(32)))
    rig.drain()
    assert rig.executor.computed_tokens == 100 + 32 * 2


def test_without_the_cache_everybody_computes_everything() -> None:
    rig = Rig(blocks=512, context=200, prefix_cache=False)
    rig.add(*(make_request(str(n), [*range(100), n], 2) for n in range(4)))
    rig.drain()
    assert rig.executor.computed_tokens == 4 * 102


def test_an_overtaken_prefill_adopts_what_the_other_computed() -> None:
    """Request early stands in the middle of a block when late, with the same prompt, overtakes it. When early goes on,
    it replaces the begun block by the full one and jumps to the last token that it must compute itself."""
    rig = Rig(budget=10, batch=newest_first)
    rig.add(make_request("early", range(40), 2))
    rig.step()
    rig.add(make_request("late", range(40), 2))
    rig.drain()
    adopting = [work for plan in rig.plans for work in plan.work if work.replaced_blocks]
    assert [(work.request_id, work.start, work.tokens) for work in adopting] == [("early", 36, 4)]
    assert rig.executor.computed_tokens == 10 + 32 + 4 + 1 + 1


def test_the_last_token_is_computed_even_if_its_block_is_cached() -> None:
    rig = Rig()
    for name in ("a", "b"):
        rig.add(make_request(name, range(8), 1))
        rig.drain()
    assert [plan.tokens for plan in rig.plans if plan.work] == [8, 4]


def test_a_next_turn_finds_what_was_generated() -> None:
    rig = Rig()
    rig.add(make_request("first", range(10), 11))
    rig.drain()
    spoken = [*range(10), *rig.tokens("first")]
    rig.add(make_request("second", [*spoken, 7, 7], 2))
    rig.drain()
    usage = rig.outputs["second"][-1].usage
    assert usage is not None
    assert usage.cached_tokens == 20  # all computed tokens but the unfilled block


@pytest.mark.parametrize("salt", [b"", b"tenant"])
def test_a_prompt_shorter_than_a_block_starts_a_chain_from_its_salt(salt: bytes) -> None:
    rig = Rig()
    rig.add(make_request("first", [1, 2], 12, salt=salt))
    rig.drain()
    longer = [1, 2, *rig.tokens("first")]
    for name, other in (("same", salt), ("other", b"somebody else")):
        rig.add(make_request(name, longer, 2, salt=other))
        rig.drain()
    cached = {name: rig.outputs[name][-1].usage.cached_tokens for name in ("same", "other")}  # type: ignore[union-attr]
    assert cached == {"same": 12, "other": 0}


def test_nothing_is_shared_without_keys() -> None:
    rig = Rig()
    for name in ("a", "b"):
        rig.add(make_request(name, range(20), 8, block_keys=()))
        rig.drain()
    assert rig.outputs["b"][-1].usage.cached_tokens == 0  # type: ignore[union-attr]


def test_a_trace_shares_by_keys_alone() -> None:
    """Blank prompts have keys but no tokens: prompts are shared, what was generated cannot be named."""
    rig = Rig()
    for name in ("a", "b"):
        rig.scheduler.add(Request(name, (Blank(18),), 0.0, 9, block_keys=(1, 2, 3, 4)), 0.0)
        while (plan := rig.scheduler.plan(0.0)) is not None:
            drawn = {work.request_id: Sampled((0,)) for work in plan.work if work.sample}
            rig.scheduler.commit(StepResult(plan.step, drawn), 0.0)
            rig.scheduler.check()
    assert [event.cached_tokens for event in rig.recorder.of(events.Admitted)] == [0, 16]
    assert len(rig.scheduler._memory.index) == 4


def test_prompt_logprobs_come_once_and_in_order_and_read_no_cache() -> None:
    rig = Rig(budget=7)
    rig.add(make_request("plain", range(20), 2))
    rig.drain()
    rig.add(make_request("asks", range(20), 2, prompt_logprobs=0))
    rig.drain()
    logprobs = [entry.logprob for output in rig.outputs["asks"] for entry in output.prompt_logprobs]
    assert logprobs == [-float(position) for position in range(1, 20)]
    assert rig.outputs["asks"][-1].usage.cached_tokens == 0  # type: ignore[union-attr]


def test_prompt_logprobs_that_come_again_after_a_preemption_are_dropped() -> None:
    rig = Rig(budget=8)
    rig.add(make_request("a", range(6), 9), make_request("asks", range(30), 4, prompt_logprobs=0))
    for _ in range(3):
        rig.step()
    rig.scheduler.token_budget = 1  # only the decode fits, and that step fails
    rig.step(fails=True)
    rig.scheduler.token_budget = 8
    rig.drain()
    assert rig.outputs["asks"][-1].usage.preemptions == 1  # type: ignore[union-attr]
    logprobs = [entry.logprob for output in rig.outputs["asks"] for entry in output.prompt_logprobs]
    assert logprobs == [-float(position) for position in range(1, 30)]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_the_last_in_order_yields_and_comes_back_with_its_tokens() -> None:
    rig = Rig(blocks=8)
    rig.add(make_request("old", range(8), 16), make_request("new", range(50, 58), 16))
    rig.drain()
    preempted = [event.request_id for event in rig.recorder.of(events.Preempted)]
    assert preempted
    assert set(preempted) == {"new"}
    back = [admitted for plan in rig.plans for admitted in plan.admitted if admitted.output_ids]
    assert [admitted.request.id for admitted in back] == preempted
    assert rig.outputs["new"][-1].usage.preemptions == len(preempted)  # type: ignore[union-attr]
    again = [event.again for event in rig.recorder.of(events.Admitted)]
    assert again.count(True) == len(preempted)


def test_one_request_may_use_all_memory() -> None:
    rig = Rig(blocks=8, context=32)
    rig.add(make_request("a", range(20), 12))
    rig.drain()
    assert len(rig.tokens("a")) == 12


def test_a_request_that_could_outgrow_all_memory_is_refused() -> None:
    capacity = Capacity(blocks=4, block_tokens=4, max_context_tokens=64, vocab=50)
    with pytest.raises(InvalidRequest, match="memory for 61 tokens, but there is room for 16; lower max_tokens"):
        check_servable(make_request("b", range(12), 50), capacity)
    check_servable(make_request("b", range(12), 5), capacity)


def test_reserve_all_never_preempts() -> None:
    rig = Rig(blocks=12, admission="reserve-all")
    rig.add(*(make_request(str(n), [n] * 7, 12) for n in range(8)))
    rig.drain()
    assert not rig.recorder.of(events.Preempted)


def test_the_first_is_never_stuck_twice_in_a_row() -> None:
    """An urgent prompt comes after decodes in every plan, and they take each block that gets free. When that leaves it
    without, it goes before them in the next step and takes theirs."""
    rig = Rig(blocks=12, budget=12, ordering="priority", admission=lambda *_: True)
    rig.add(*(make_request(str(n), [n] * 5, 30) for n in range(4)))
    rig.step()
    rig.step()
    rig.add(make_request("urgent", range(36), 4, priority=9))
    while rig.finish("urgent") is None:
        rig.step()
    served = [plan.step for plan in rig.plans if any(work.request_id == "urgent" for work in plan.work)]
    gaps = [after - before for before, after in itertools.pairwise(served)]
    assert max(gaps) == 2
    assert "urgent" not in [event.request_id for event in rig.recorder.of(events.Preempted)]
    rig.drain()


def test_nobody_takes_from_those_before_it_and_nobody_from_the_preempted() -> None:
    """Whoever the policy picks is behind the needy one, so the oldest request is safe; and what was given back in a
    step is not taken by an admission of the same step."""
    rig = Rig(
        blocks=10, admission=lambda *_: True, preemption=lambda behind, needy: behind[0] if needy.running else None
    )
    rig.add(*(make_request(str(n), [n] * 5, 20) for n in range(6)))
    rig.drain()
    preempted = rig.recorder.of(events.Preempted)
    assert preempted
    assert "0" not in [event.request_id for event in preempted]
    admitted_s = {event.at_s for event in rig.recorder.of(events.Admitted)}
    assert not admitted_s & {event.at_s for event in preempted}


# -- order and budget --------------------------------------------------------------------------------------------------


def test_fcfs_admits_in_order_of_arrival_and_starves_nobody() -> None:
    rig = Rig(blocks=16, max_running=3)
    for number in range(20):
        rig.add(make_request(str(number), [number] * (1 + number * 7 % 20), 3, arrival_s=rig.now))
        rig.step()
    rig.drain()
    first = [event.request_id for event in rig.recorder.of(events.Admitted) if not event.again]
    assert first == [str(number) for number in range(20)]


def test_priority_goes_first_but_waiting_makes_up_for_it() -> None:
    rig = Rig(max_running=1, ordering="priority")
    rig.add(make_request("runs", range(4), 3))
    rig.step()
    rig.add(make_request("low", range(4), 3), make_request("high", range(4), 3, priority=1))
    rig.add(make_request("late", range(4), 3, priority=1, arrival_s=10.5))
    rig.drain()
    admitted = [event.request_id for event in rig.recorder.of(events.Admitted)]
    assert admitted == ["runs", "high", "low", "late"]


def test_chunked_steps_keep_the_budget_and_skip_no_decode() -> None:
    rig = Rig(blocks=256, budget=16, context=128)
    rig.add(*(make_request(str(n), [n] * 5, 20) for n in range(4)))
    rig.step()
    rig.step()
    rig.add(make_request("long", range(100), 4))
    rig.drain()
    assert max(plan.tokens for plan in rig.plans) <= 16
    for name in map(str, range(4)):
        served = [plan.step for plan in rig.plans if any(w.request_id == name and w.sample for w in plan.work)]
        assert served == list(range(served[0], served[0] + 20))


def test_more_requests_than_budget_wait_for_their_turn() -> None:
    rig = Rig(budget=3)
    rig.add(*(make_request(str(n), [n] * 5, 5) for n in range(8)))
    rig.drain()
    assert max(plan.tokens for plan in rig.plans) == 3
    assert max(event.running for event in rig.recorder.of(events.Planned)) == 3


def test_prefill_first_computes_whole_prompts_and_stalls_decodes() -> None:
    rig = Rig(blocks=256, budget=16, context=128, batch="prefill-first")
    rig.add(make_request("a", range(5), 6))
    rig.step()
    rig.add(make_request("long", range(50, 150), 4))
    plan = rig.step()
    assert plan is not None
    assert [(work.request_id, work.tokens) for work in plan.work] == [("long", 100)]
    rig.drain()


def test_a_policy_that_wishes_nothing_cannot_stop_the_replica() -> None:
    rig = Rig(batch=lambda batch: iter(()), preemption=lambda behind, needy: needy)
    rig.add(make_request("a", range(10), 3), make_request("b", range(10), 3))
    rig.drain()
    assert rig.finish("b") is FinishReason.LENGTH


def test_a_moving_ordering_is_sorted_anew_each_step() -> None:
    def shortest(request: RequestView, now: float) -> float:
        return request.limit_tokens - request.computed_tokens

    rig = Rig(max_running=1, ordering=shortest)
    rig.add(make_request("long", range(30), 9), make_request("short", range(3), 2), make_request("middle", range(9), 2))
    rig.drain()
    assert [event.request_id for event in rig.recorder.of(events.Admitted)] == ["short", "middle", "long"]


def test_tokens_of_one_request_come_at_growing_times() -> None:
    rig = Rig(blocks=8, budget=9)
    rig.add(*(make_request(str(n), range(n, n + 6), 9) for n in range(4)))
    rig.drain()
    for name in rig.requests:
        drew = [(event.at_s, event.request_ids) for event in rig.recorder.of(events.Drew)]
        drew += [(event.at_s, dict(event.rows)) for event in rig.recorder.of(events.Decoded)]
        times = sorted(at_s for at_s, ids in drew if name in ids)
        assert times == sorted(set(times))
        assert len(times) == 9


# -- when a step fails -------------------------------------------------------------------------------------------------


def test_a_failed_step_ends_its_requests_and_is_forgotten() -> None:
    rig = Rig()
    rig.add(make_request("a", range(20), 4), make_request("b", range(20), 4))
    rig.step(fails=True)
    assert rig.finish("a") is rig.finish("b") is FinishReason.ERROR
    assert rig.outputs["a"][-1].error == "on purpose"
    assert rig.scheduler.used_blocks == len(rig.scheduler._memory.index) == 0
    rig.add(make_request("c", range(20), 4))
    rig.drain()
    assert rig.outputs["c"][-1].usage.cached_tokens == 0  # type: ignore[union-attr]


def test_those_beside_a_failed_step_start_over() -> None:
    rig = Rig(budget=8)
    rig.add(make_request("a", range(6), 9), make_request("b", range(30), 4))
    rig.step()
    rig.add(make_request("c", range(50, 60), 4))
    rig.scheduler.token_budget = 1  # only the decode fits
    plan = rig.step(fails=True)
    assert plan is not None
    assert [work.request_id for work in plan.work] == ["a"]
    rig.scheduler.token_budget = 8
    rig.drain()
    assert [rig.finish(name) for name in "abc"] == [FinishReason.ERROR, FinishReason.LENGTH, FinishReason.LENGTH]


@pytest.mark.parametrize("answer", ["another step", "no token", "two tokens"])
def test_a_result_that_does_not_fit_the_plan_changes_nothing(answer: str) -> None:
    rig = Rig()
    rig.add(make_request("a", range(4)), make_request("b", range(4)))
    plan = rig.scheduler.plan(0.0)
    assert plan is not None
    sampled = {"another step": {}, "no token": {"a": Sampled((1,))}, "two tokens": dict.fromkeys("ab", Sampled((1, 2)))}
    with pytest.raises(BadResult):
        rig.scheduler.commit(StepResult(plan.step + (answer == "another step"), sampled[answer]), 1.0)
    rig.scheduler.check()
    with pytest.raises(RuntimeError, match="in flight"):
        rig.scheduler.plan(1.0)
    assert [output.finish for output in rig.scheduler.fail(1.0, "bad result")] == [FinishReason.ERROR] * 2


# -- the same again ----------------------------------------------------------------------------------------------------


def test_plans_do_not_depend_on_hash_seeds() -> None:
    script = Path(__file__).parent / "plan_trace.py"
    traces = {
        subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(traces) == 1
    assert len(traces.pop()) > 10_000
