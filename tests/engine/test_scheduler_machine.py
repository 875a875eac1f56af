"""Random lives of a scheduler: arrivals, shared prefixes, aborts, deadlines and failing steps, in tiny pools under
tiny budgets, with every combination of policies. After each event every invariant holds; at the end nothing is left."""

from __future__ import annotations

import itertools
from typing import Any

from engine_rig import Rig, make_request
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from headrace.core.types import FinishReason, Overloaded
from headrace.engine.policy import ADMISSIONS, BATCHES, ORDERINGS, PoolView, RequestView

ANYTHING = settings(
    derandomize=True, deadline=None, max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
PREFIXES = (tuple(range(8)), tuple(range(23)), (1, 1, 1, 1, 1), (9,) * 16)


def shortest_left(request: RequestView, now: float) -> float:
    """An ordering whose keys move: whoever has least to compute goes first."""
    return float(request.limit_tokens - request.computed_tokens) + (now - request.request.arrival_s) % 3


def anybody(request: RequestView, pool: PoolView) -> bool:
    """An admission that never refuses: memory runs out all the time."""
    return True


class SchedulerMachine(RuleBasedStateMachine):
    """The rig does the checking; the rules only make trouble."""

    rig: Rig

    @initialize(
        blocks=st.integers(4, 24),
        budget=st.integers(1, 40),
        block_tokens=st.sampled_from([1, 3, 4, 8]),
        ordering=st.sampled_from([*ORDERINGS, shortest_left]),
        admission=st.sampled_from([*ADMISSIONS, anybody]),
        batch=st.sampled_from(list(BATCHES)),
        max_running=st.integers(1, 8),
        prefix_cache=st.booleans(),
    )
    def start(self, **choices: Any) -> None:
        self.rig = Rig(**choices, max_queue_requests=6, max_queue_tokens=120)
        self.names = map(str, itertools.count())

    @rule(
        prefix=st.sampled_from(PREFIXES),
        own=st.lists(st.integers(0, 3), max_size=12),
        new=st.integers(1, 20),
        priority=st.integers(-3, 3),
        wait_s=st.none() | st.integers(1, 60),
        keyed=st.booleans(),
        stops=st.frozensets(st.integers(0, 49), max_size=3),
        logprobs=st.none() | st.just(0),
    )
    def arrive(self, prefix, own, new, priority, wait_s, keyed, stops, logprobs) -> None:  # type: ignore[no-untyped-def]
        rig = self.rig
        prompt = (*prefix, *own)[: rig.capacity.max_context_tokens - 1]
        more = {} if keyed else {"block_keys": ()}
        request = make_request(
            next(self.names),
            prompt,
            new,
            rig.capacity.block_tokens,
            arrival_s=rig.now,
            priority=priority,
            deadline_s=None if wait_s is None else rig.now + wait_s,
            stop_token_ids=stops,
            prompt_logprobs=logprobs,
            **more,
        )
        try:
            rig.add(request)
        except Overloaded as error:
            assert rig.scheduler.waiting
            assert error.retry_after_s >= 1

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.rig.step()

    @rule(data=st.data(), in_flight=st.booleans())
    @precondition(lambda self: self.rig.requests)
    def abort(self, data: st.DataObject, in_flight: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.rig.requests)))
        if in_flight:
            self.rig.step(abort_in_flight=name)
        else:
            self.rig.abort(name)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        victim = data.draw(st.none() | st.sampled_from(sorted(self.rig.requests))) if self.rig.requests else None
        self.rig.step(fails=True, abort_in_flight=victim)

    def teardown(self) -> None:
        rig = self.rig
        rig.drain()
        unexpected = {FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.ERROR}
        reasons = {rig.finish(name) for name in rig.requests}
        assert reasons <= {FinishReason.STOP, FinishReason.LENGTH} | unexpected


def test_random_lives() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=ANYTHING)
