"""Losing the executor is a preemption of everyone: whatever happens, every request ends once with exactly the tokens it
would have got alone, unless it was itself the reason."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from engine_rig import Recorder, Rig, make_request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from null_executor import NullExecutor, reference

from headrace.core import clock, events
from headrace.core.config import EngineSettings
from headrace.core.ports import Capacity, ExecutorLost
from headrace.core.step import StepPlan, StepResult, Work
from headrace.core.types import FinishReason, HeadraceError, Output, Overloaded, Request, Unavailable
from headrace.engine.loop import IDLE_S, Engine
from headrace.engine.policy import ADMISSIONS, BATCHES, LANES, ORDERINGS, PREEMPTIONS
from headrace.engine.restarts import MOST, WINDOW_S, Restarts
from headrace.engine.scheduler import Scheduler
from headrace.engine.suspects import Suspects
from headrace.engine.watch import PATIENCE, SILENT_S, SLACK_S, Watch

CAPACITY = Capacity(blocks=64, block_tokens=4, max_context_tokens=100, vocab=50)


class LossyRig(Rig):
    """A rig whose executor may be gone before, amid or after any step."""

    def lose(self, *, begun: bool = True) -> None:
        """With whatever is in flight."""
        if not self.flights and begun and self.scheduler.lanes == 1:
            plan = self.scheduler.plan(self.now)
            if plan is not None:
                self.plans.append(plan)
                self.executor.begin(plan)
        self.now += 1.0
        outputs = self.scheduler.lost(self.now, "on purpose", begun)
        self.flights.clear()
        plans = self.executor.plans
        self.executor = NullExecutor(self.capacity)  # another one, which knows nobody and holds nothing
        self.executor.plans = plans
        self.collect(outputs)
        assert self.scheduler.used_blocks == self.scheduler.running == 0
        assert not self.scheduler.in_flight


class LossMachine(RuleBasedStateMachine):
    """Arrivals, steps, aborts, failed steps and lost executors, under every policy."""

    rig: LossyRig

    @initialize(
        blocks=st.integers(4, 12),
        budget=st.integers(1, 40),
        block_tokens=st.sampled_from([1, 4, 8]),
        layers=st.sampled_from([1, 2, 5]),
        drafts=st.sampled_from([0, 1, 5]),
        ordering=st.sampled_from(list(ORDERINGS)),
        admission=st.sampled_from(list(ADMISSIONS)),
        batch=st.sampled_from(list(BATCHES)),
        preemption=st.sampled_from(list(PREEMPTIONS)),
        max_running=st.integers(1, 8),
        prefix_cache=st.booleans(),
        host_blocks=st.sampled_from([0, 0, 3, 40]),
        lanes=st.sampled_from(["one", *LANES]),
    )
    def start(self, **choices: Any) -> None:
        if choices["lanes"] != "one":
            choices["host_blocks"] = 0  # two lanes have no host tier
        self.rig = LossyRig(**choices, max_queue_requests=6, max_queue_tokens=120)
        self.names = map(str, itertools.count())

    @rule(
        prompt=st.lists(st.integers(0, 3), min_size=1, max_size=24),
        new=st.integers(1, 20),
        wait_s=st.sampled_from([None, None, 9]),
        stops=st.frozensets(st.integers(0, 49), max_size=2),
        logprobs=st.sampled_from([None, None, None, 0]),
        keyed=st.booleans(),
    )
    def arrive(self, prompt, new, wait_s, stops, logprobs, keyed) -> None:  # type: ignore[no-untyped-def]
        rig = self.rig
        more = {} if keyed else {"block_keys": ()}
        deadline_s = None if wait_s is None else rig.now + wait_s
        prompt = prompt[: rig.capacity.max_context_tokens - 1]
        with suppress(Overloaded):
            rig.add(
                make_request(
                    next(self.names), prompt, new, rig.capacity.block_tokens, arrival_s=rig.now,
                    deadline_s=deadline_s, stop_token_ids=stops, prompt_logprobs=logprobs, **more,
                )
            )  # fmt: skip

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.rig.step()

    @rule(begun=st.booleans())
    def lose(self, begun: bool) -> None:
        self.rig.lose(begun=begun)

    @rule(data=st.data(), in_flight=st.booleans())
    @precondition(lambda self: self.rig.requests)
    def abort(self, data: st.DataObject, in_flight: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.rig.requests)))
        self.rig.step(abort_in_flight=name) if in_flight else self.rig.abort(name)

    @rule()
    def fail(self) -> None:
        self.rig.step(fails=True)

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.drain()


def test_nothing_is_lost_with_the_executor() -> None:
    many = settings(
        derandomize=True,
        deadline=None,
        max_examples=60,
        stateful_step_count=30,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(LossMachine, settings=many)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("more", [{}, {"host_blocks": 20, "preemption": "swap"}, {"drafts": 3}, {"lanes": "fixed"}])
@pytest.mark.parametrize("losses", [3, 5])
def test_a_crowd_survives_losses_and_everybody_gets_its_own_tokens(more: dict[str, Any], losses: int) -> None:
    rig = LossyRig(blocks=24, budget=16, **more)
    rig.add(*[make_request(str(n), [n % 3] * 9, 12) for n in range(8)])
    for _ in range(losses):
        drawn = Counter({name: len(rig.tokens(name)) for name in rig.requests})
        while any(len(rig.tokens(name)) == drawn[name] and rig.finish(name) is None for name in rig.requests):
            rig.step()  # so that nobody is suspected
        rig.lose()
    rig.drain()
    assert {rig.finish(name) for name in rig.requests} == {FinishReason.LENGTH}
    assert len(rig.recorder.of(events.Lost)) == losses


def test_who_was_in_a_step_goes_on_from_its_tokens() -> None:
    rig = LossyRig()
    rig.add(make_request("a", range(10), 8))
    for _ in range(4):
        rig.step()
    rig.lose()
    plan = rig.step()
    assert plan is not None and plan.admitted[0].output_ids == tuple(rig.tokens("a")[:4])
    assert plan.admitted[0].start == 0
    rig.drain()
    assert rig.outputs["a"][-1].usage.preemptions == 1  # type: ignore[union-attr]


# -- who is the reason -------------------------------------------------------------------------------------------------


def poisoned(rig: LossyRig, poison: str, most_losses: int = 9) -> int:
    """Serve everybody; every step that computes `poison` beyond its third token loses the executor. Returns losses."""
    losses = 0
    for _ in range(500):
        waits = rig.scheduler.plan(rig.now)
        if waits is None:
            return losses
        rig.plans.append(waits)
        rig.now += 1.0
        if poison in {work.request_id for work in waits.work} and len(rig.tokens(poison)) >= 3:
            losses += 1
            assert losses <= most_losses
            rig.collect(rig.scheduler.lost(rig.now, "it crashed"))
            rig.executor = NullExecutor(rig.capacity)
        else:
            rig.collect(rig.scheduler.commit(rig.executor.perform(waits), rig.now))
    raise AssertionError("still busy")


@pytest.mark.parametrize("others", [0, 1, 7])
def test_a_poisonous_request_ends_and_all_others_go_on(others: int) -> None:
    rig = LossyRig(blocks=64, budget=40)
    rig.add(*[make_request(str(n), [n % 4, *range(n + 2)], 10) for n in range(others)])
    rig.add(make_request("poison", [7] * 5, 10))
    assert poisoned(rig, "poison") == (3 if others else 2)
    assert rig.finish("poison") is FinishReason.ERROR
    assert "it crashed" in (rig.outputs["poison"][-1].error or "")
    assert len(rig.tokens("poison")) == 3
    assert {rig.finish(str(n)) for n in range(others)} <= {FinishReason.LENGTH}
    for name in rig.requests:
        rig.check_outputs(name)


def test_with_two_lanes_the_second_loss_decides() -> None:
    rig = LossyRig(lanes="fixed")
    rig.add(make_request("a", range(8), 8))
    for _ in range(2):
        assert rig.begin(0) is not None
        rig.lose()
    assert rig.finish("a") is FinishReason.ERROR


def test_bad_luck_far_apart_is_nobodys_fault() -> None:
    rig = LossyRig()
    rig.add(make_request("a", range(8), 20))
    for _ in range(6):
        rig.step()
        rig.step()
        rig.lose()
    rig.drain()
    assert rig.finish("a") is FinishReason.LENGTH


def test_idle_losses_blame_nobody() -> None:
    suspects = Suspects(isolates=True)
    assert not suspects.lost([]) and not suspects and suspects.alone() is None


# -- when it is hung ---------------------------------------------------------------------------------------------------


def plan(tokens: int = 1) -> StepPlan:
    return StepPlan(0, (Work("a", 0, tokens, True),))


def looks(watch: Watch, start: float, end: float) -> list[float]:
    """When it is found hung, looked at four times a second."""
    times = [start + at / 4 for at in range(int((end - start) * 4) + 1)]
    return [now for now in times if watch.look(now)]


def test_silence_and_long_steps_are_noticed() -> None:
    watch = Watch(0.01, 0.001)
    watch.heard(0.0)
    assert looks(watch, 0.0, 10.0)[0] == pytest.approx(SILENT_S, abs=0.26)
    watch.forget()
    assert not looks(watch, 10.0, 30.0)
    watch.began(plan(), 30.0)
    assert looks(watch, 30.0, 40.0)[0] == pytest.approx(30.0 + SLACK_S + PATIENCE * 0.011, abs=0.26)
    watch.ended(plan(), 40.0)
    assert not looks(watch, 40.0, 50.0)


def test_steps_that_grow_slower_are_no_alarm_and_a_stopped_watcher_blames_nobody() -> None:
    watch, now, seconds = Watch(0.01, 0.0002), 0.0, 0.1
    for _ in range(60):  # chunks of a long prompt: each attends to more than the one before
        watch.began(plan(500), now)
        assert watch.overdue(now + seconds * 4) is None  # though the machine has other work, too
        now += seconds
        watch.ended(plan(500), now)
        seconds *= 1.1
    watch.forget()
    watch.heard(now)
    watch.began(plan(), now)
    assert watch.look(now + 0.2) is None
    assert watch.look(now + 500.0) is None  # nobody looked meanwhile: the machine slept
    assert any(watch.look(now + 500.25 + at / 4) for at in range(40))  # but it does not wake with us


def test_restarts_are_bounded_within_a_window() -> None:
    restarts = Restarts()
    assert [restarts.next(float(at)) for at in range(MOST)] == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert restarts.next(10.0) is None
    assert restarts.next(WINDOW_S + 2.5) is not None
    restarts.explained()
    assert restarts.next(WINDOW_S + 3.0) == 0.0
    assert restarts.count == MOST + 2


# -- the loop ----------------------------------------------------------------------------------------------------------


class Mortal(NullExecutor):
    """Dies in these steps, and comes back after a second if `comes` says so."""

    def __init__(self, dies: Callable[[StepPlan], bool], comes: Callable[[int], bool] = lambda attempt: True) -> None:
        super().__init__(CAPACITY)
        self._dies, self._comes = dies, comes
        self.attempts = 0
        self.up = True

    async def run(self, plan: StepPlan) -> StepResult:
        if not self.up:
            raise ExecutorLost("it is away", self.again, begun=False)
        if self._dies(plan):
            await clock.sleep(0.004)
            raise self.die()
        return await super().run(plan)

    def die(self) -> ExecutorLost:
        self.up = False
        self.known, self.slots, self.computing = {}, {}, {}
        return ExecutorLost("it died", self.again)

    async def again(self, delay_s: float) -> None:
        await clock.sleep(delay_s + 1.0)
        self.attempts += 1
        if not self._comes(self.attempts):
            raise HeadraceError("the file is gone")
        self.up = True


class Bench:
    def __init__(self, executor: Mortal, **more: Any) -> None:
        self.executor = executor
        self.recorder = Recorder()
        self.settings = EngineSettings(**more)
        self.schedulers: list[Scheduler] = []
        self.engine = Engine("model", self.fresh(), executor, fresh=self.fresh)

    def fresh(self) -> Scheduler:
        made = Scheduler(self.settings, CAPACITY, token_budget=32, observer=self.recorder)
        self.schedulers.append(made)
        return made

    def serve(self, main: Any) -> Any:
        async def both() -> Any:
            serving = asyncio.create_task(self.engine.run())
            try:
                return await main
            finally:
                await clock.sleep(IDLE_S + 1)
                serving.cancel()
                with suppress(asyncio.CancelledError):
                    await serving
                self.schedulers[-1].check()
                assert self.schedulers[-1].live == self.schedulers[-1].used_blocks == 0

        return clock.run(both(), virtual=True)

    async def collect(self, request: Request) -> list[Output]:
        return [output async for output in self.engine.generate(request)]


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize("more", [{}, {"lanes": "fixed"}])
def test_streams_go_on_over_a_restart(more: dict[str, Any]) -> None:
    bench = Bench(Mortal(lambda plan: plan.step in (5, 40)), **more)
    requests = [make_request(str(n), range(n, n + 12), 9 + n) for n in range(8)]

    async def main() -> list[list[Output]]:
        return await asyncio.gather(*map(bench.collect, requests))

    for request, outputs in zip(requests, bench.serve(main()), strict=True):
        assert tokens(outputs) == reference(request, CAPACITY)
        assert outputs[-1].finish is FinishReason.LENGTH
    assert bench.engine.status().restarts == len(bench.recorder.of(events.Lost)) >= 1


def test_while_it_restarts_it_says_so_takes_requests_and_keeps_deadlines() -> None:
    bench = Bench(Mortal(lambda plan: plan.step == 3), max_queue_requests=2)

    async def main() -> None:
        first = asyncio.create_task(bench.collect(make_request("a", range(8), 9)))
        await clock.sleep(0.5)
        status = bench.engine.status()
        assert (status.state, status.error) == ("restarting", "the executor was lost: it died")
        late = asyncio.create_task(bench.collect(make_request("b", range(8), 9, deadline_s=clock.now() + 0.1)))
        await clock.sleep(0)
        with pytest.raises(Unavailable, match="restarting"):
            await bench.collect(make_request("c", range(8), 9))
        assert (await late)[-1].finish is FinishReason.DEADLINE
        assert tokens(await first) == reference(make_request("a", range(8), 9), CAPACITY)
        assert bench.engine.status().state == "ready"

    bench.serve(main())


def test_an_idle_executor_that_dies_is_back_before_anybody_asks() -> None:
    bench = Bench(Mortal(lambda plan: False))

    async def main() -> None:
        await bench.collect(make_request("a", range(12), 3))
        bench.engine.lost(bench.executor.die())
        assert bench.engine.status().state == "restarting"
        await clock.sleep(2)
        assert bench.engine.status().state == "ready"
        outputs = await bench.collect(make_request("b", range(12), 3))
        assert tokens(outputs) == reference(make_request("b", range(12), 3), CAPACITY)
        assert outputs[-1].usage is not None and outputs[-1].usage.cached_tokens == 0  # the prefix went with it

    bench.serve(main())


def test_an_executor_that_does_not_come_back_is_given_up_in_words() -> None:
    bench = Bench(Mortal(lambda plan: plan.step == 2, comes=lambda attempt: False))

    async def main() -> list[Output]:
        outputs = await bench.collect(make_request("a", range(8), 9))
        with pytest.raises(Unavailable, match="file is gone"):
            await bench.collect(make_request("b", range(8), 9))
        return outputs

    outputs = bench.serve(main())
    assert outputs[-1].finish is FinishReason.ERROR
    assert bench.engine.status().state == "failed"
    assert bench.executor.attempts == MOST


def test_a_start_that_fails_once_is_tried_again() -> None:
    bench = Bench(Mortal(lambda plan: plan.step == 2, comes=lambda attempt: attempt == 2))
    outputs = bench.serve(bench.collect(make_request("a", range(8), 9)))
    assert tokens(outputs) == reference(make_request("a", range(8), 9), CAPACITY)


def test_a_scheduler_that_is_not_sound_is_put_away_when_nobody_is_here() -> None:
    bench = Bench(Mortal(lambda plan: False))

    async def main() -> None:
        await bench.collect(make_request("a", range(8), 3))
        bench.schedulers[0]._memory.pool.free += 1  # a leak of memory that is not there
        await bench.collect(make_request("b", range(8), 3))
        await clock.sleep(IDLE_S + 0.5)
        assert bench.engine.status().violations == 1
        outputs = await bench.collect(make_request("c", range(8), 3))
        assert tokens(outputs) == reference(make_request("c", range(8), 3), CAPACITY)

    bench.serve(main())
    assert len(bench.schedulers) == 2
