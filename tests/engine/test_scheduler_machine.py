"""Random lives of a scheduler: arrivals, shared prefixes, aborts, deadlines and failing steps, in tiny pools under
tiny budgets, with every combination of policies. After each event every invariant holds; at the end nothing is left.
Hypothesis looks for the shortest trouble; the crowds after it make sure that every mechanism was in use."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
from engine_rig import Rig, make_request, newest_first
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from headrace.core import events
from headrace.core.types import FinishReason, Overloaded
from headrace.engine.policy import ADMISSIONS, BATCHES, ORDERINGS, PoolView, RequestView

ANYTHING = settings(
    derandomize=True, deadline=None, max_examples=120, stateful_step_count=40, suppress_health_check=list(HealthCheck)
)
PREFIXES = (tuple(range(8)), tuple(range(23)), (9,) * 16)


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
        blocks=st.integers(4, 12),
        budget=st.integers(1, 40),
        block_tokens=st.sampled_from([1, 3, 4, 8]),
        ordering=st.sampled_from([*ORDERINGS, shortest_left]),
        admission=st.sampled_from([*ADMISSIONS, anybody, anybody]),
        batch=st.sampled_from([*BATCHES, newest_first]),
        max_running=st.integers(1, 8),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def start(self, **choices: Any) -> None:
        self.rig = Rig(**choices, max_queue_requests=6, max_queue_tokens=120)
        self.names = map(str, itertools.count())

    @rule(
        prefix=st.sampled_from(PREFIXES),
        own=st.lists(st.integers(0, 1), max_size=6),
        new=st.integers(1, 20),
        priority=st.integers(-3, 3),
        wait_s=st.sampled_from([None, None, None, 3, 20]),
        keyed=st.sampled_from([True, True, False]),
        stops=st.frozensets(st.integers(0, 49), max_size=3),
        logprobs=st.sampled_from([None, None, None, 0]),
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

    @rule(data=st.data(), luck=st.integers(0, 4))
    def fail(self, data: st.DataObject, luck: int) -> None:
        if luck:
            return self.step(luck)
        victim = data.draw(st.none() | st.sampled_from(sorted(self.rig.requests))) if self.rig.requests else None
        self.rig.step(fails=True, abort_in_flight=victim)
        return None

    def teardown(self) -> None:
        rig = self.rig
        rig.drain()
        unexpected = {FinishReason.ABORT, FinishReason.DEADLINE, FinishReason.ERROR}
        reasons = {rig.finish(name) for name in rig.requests}
        assert reasons <= {FinishReason.STOP, FinishReason.LENGTH} | unexpected


def test_random_lives() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=ANYTHING)


ORDERINGS_TRIED = [*ORDERINGS, shortest_left]
BATCHES_TRIED = [*BATCHES, newest_first]


@pytest.mark.parametrize("ordering", ORDERINGS_TRIED)
@pytest.mark.parametrize("admission", [*ADMISSIONS, anybody])
@pytest.mark.parametrize("batch", BATCHES_TRIED)
def test_crowds(ordering: Any, admission: Any, batch: Any) -> None:
    """Eight requests at a time in a dozen blocks: most steps preempt, share or finish somebody."""
    used: Counter[str] = Counter()
    for seed in range(4):
        rng = random.Random(seed)
        budget = rng.choice([3, 9, 30])
        rig = Rig(12, budget, context=40, ordering=ordering, admission=admission, batch=batch, max_running=8)
        for number in range(40):
            prompt = [*rng.choice(PREFIXES), *rng.choices(range(2), k=rng.randint(0, 5))]
            rig.add(make_request(str(number), prompt, rng.randint(1, 16), arrival_s=rig.now))
            if rng.random() < 0.1:
                rig.abort(str(rng.randint(0, number)))
            for _ in range(rng.randint(0, 6)):
                rig.step(fails=rng.random() < 0.02)
        rig.drain()
        used["preempted"] += len(rig.recorder.of(events.Preempted))
        used["shared"] += sum(event.cached_tokens > 0 for event in rig.recorder.of(events.Admitted))
        used["finished"] += sum(rig.finish(name) is FinishReason.LENGTH for name in rig.requests)
    assert used["shared"] > 10
    assert used["finished"] > 80
    assert used["preempted"] > 5 if admission is anybody else used["preempted"] >= 0
