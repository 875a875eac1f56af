"""Random lives of a scheduler: arrivals, shared prefixes, aborts, deadlines and failing steps, in tiny pools under
tiny budgets, with every combination of policies. After each event every invariant holds; at the end nothing is left.
Hypothesis looks for the shortest trouble; the crowds after it make sure that every mechanism was in use."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
from engine_rig import Rig, make_request, newest_first
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from headrace.core import events
from headrace.core.types import SLO, FinishReason, Overloaded
from headrace.engine import policy
from headrace.engine.policy import (
    ADMISSIONS,
    BATCHES,
    CONTROLLERS,
    DRAFTERS,
    LANES,
    ORDERINGS,
    PREEMPTIONS,
    PoolView,
    RequestView,
)

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
        layers=st.sampled_from([1, 2, 5]),
        drafts=st.sampled_from([0, 1, 3, 9]),
        ordering=st.sampled_from([*ORDERINGS, shortest_left]),
        admission=st.sampled_from([*ADMISSIONS, anybody, anybody]),
        batch=st.sampled_from([*BATCHES, newest_first]),
        preemption=st.sampled_from(list(PREEMPTIONS)),
        max_running=st.integers(1, 8),
        prefix_cache=st.sampled_from([True, True, True, False]),
        host_blocks=st.sampled_from([0, 0, 3, 9, 40]),
        least_copied_blocks=st.sampled_from([1, 1, 1, 2]),
        lanes=st.sampled_from(["one", *LANES]),
        follows=st.booleans(),
        speculate=st.sampled_from(list(DRAFTERS)),
        draft_control=st.sampled_from(list(CONTROLLERS)),
    )
    def start(self, **choices: Any) -> None:
        if choices["lanes"] != "one":
            choices["host_blocks"] = 0  # two lanes have no host tier
        self.rig = Rig(**choices, max_queue_requests=6, max_queue_tokens=120)
        self.names = map(str, itertools.count())

    @rule(
        prefix=st.sampled_from(PREFIXES),
        own=st.lists(st.integers(0, 1), max_size=6),
        new=st.integers(1, 20),
        priority=st.sampled_from([-100, -3, -1, 0, 0, 0, 1, 3]),
        tenant=st.sampled_from(["", "a", "b"]),
        slo=st.sampled_from([None, SLO(1.0, 2.0), SLO(ttft_s=30.0)]),
        wait_s=st.sampled_from([None, None, None, 3, 20]),
        keyed=st.sampled_from([True, True, False]),
        stops=st.frozensets(st.integers(0, 49), max_size=3),
        logprobs=st.sampled_from([None, None, None, 0]),
    )
    def arrive(self, prefix, own, new, priority, tenant, slo, wait_s, keyed, stops, logprobs) -> None:  # type: ignore[no-untyped-def]
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
            tenant=tenant,
            slo=slo,
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


def combinations() -> list[tuple[Any, Any, Any, Any]]:
    """Every ordering with every batch former, and among these every pair of any two policies."""
    orderings, admissions = [*ORDERINGS, shortest_left], [*ADMISSIONS, anybody]
    batches, preemptions = [*BATCHES, newest_first], list(PREEMPTIONS)
    return [
        (ordering, admissions[(at + place) % len(admissions)], batch, preemptions[(at + place // 2) % len(preemptions)])
        for at, ordering in enumerate(orderings)
        for place, batch in enumerate(batches)
    ]


def test_every_pair_of_policies_is_tried() -> None:
    tried, sides = combinations(), ([*ORDERINGS], [*ADMISSIONS], [*BATCHES], [*PREEMPTIONS])
    for one, other in itertools.combinations(range(4), 2):
        assert {(choice[one], choice[other]) for choice in tried} >= set(itertools.product(sides[one], sides[other]))


def test_no_policy_is_left_out() -> None:
    """These lives draw from the dicts themselves, so a new name is in them; a new dict would not be."""
    dicts = {name for name, value in vars(policy).items() if name.isupper() and isinstance(value, Mapping)}
    assert dicts == {"ORDERINGS", "ADMISSIONS", "BATCHES", "PREEMPTIONS", "DRAFTERS", "CONTROLLERS", "LANES"}


def crowd(seed: int, choices: tuple[Any, Any, Any, Any], tiered: bool = False, **more: Any) -> Rig:
    """Eight requests at a time in a dozen blocks: most steps preempt, share or finish somebody."""
    rng = random.Random(seed)
    names = ("ordering", "admission", "batch", "preemption")
    cuts: dict[str, Any] = {"layers": 5 if choices[2] == "layered" else 1, "host_blocks": 20 if tiered else 0}
    cuts |= {"drafts": rng.choice([0, 2, 6]), **dict(zip(names, choices, strict=True)), **more}
    rig = Rig(12, rng.choice([3, 9, 30]), context=40, max_running=8, **cuts)
    for number in range(40):
        prompt = [*rng.choice(PREFIXES), *rng.choices(range(2), k=rng.randint(0, 5))]
        more = {"priority": rng.choice([-100, 0, 0, 2]), "tenant": rng.choice("ab"), "slo": SLO(rng.random(), 1.0)}
        rig.add(make_request(str(number), prompt, rng.randint(1, 16), arrival_s=rig.now, **more))
        if rng.random() < 0.1:
            rig.abort(str(rng.randint(0, number)))
        for _ in range(rng.randint(0, 6)):
            rig.step(fails=rng.random() < 0.02)
    rig.drain()
    return rig


@pytest.mark.parametrize(
    "choices", combinations(), ids=lambda choices: "-".join(getattr(one, "__name__", one) for one in choices)
)
def test_crowds(choices: tuple[Any, Any, Any, Any]) -> None:
    used: Counter[str] = Counter()
    for seed in range(2):
        rig = crowd(seed, choices)
        used["preempted"] += len(rig.recorder.of(events.Preempted))
        used["shared"] += sum(event.cached_tokens > 0 for event in rig.recorder.of(events.Admitted))
        used["drafted"] += rig.executor.drafted
        used["finished"] += sum(rig.finish(name) is FinishReason.LENGTH for name in rig.requests)
    assert used["shared"] > 5
    assert used["finished"] > 40
    assert used["preempted"] > 5 or choices[1] is not anybody
    assert crowd(1, choices).recorder.events == rig.recorder.events, "a replay took another course"
    tiered = [crowd(seed, choices, tiered=True) for seed in range(2)]
    assert sum(rig.executor.copied_out for rig in tiered) > 20
    assert sum(rig.executor.copied_in for rig in tiered) > 5 or choices[1] is not anybody


@pytest.mark.parametrize("lanes", [name for name in LANES if name != "one"])
@pytest.mark.parametrize("batch", [*BATCHES, newest_first], ids=lambda one: getattr(one, "__name__", one))
def test_crowds_in_two_lanes(lanes: str, batch: Any) -> None:
    used: Counter[str] = Counter()
    orderings, admissions, preemptions = [*ORDERINGS, shortest_left], [*ADMISSIONS, anybody], [*PREEMPTIONS]
    place, beside = [*LANES].index(lanes) * len(BATCHES) + [*BATCHES, newest_first].index(batch), 0
    for seed in range(4):
        at = 4 * place + seed
        ordering, preemption = orderings[at % len(orderings)], preemptions[at % len(preemptions)]
        choices = (ordering, [anybody, *admissions][at % (len(admissions) + 1)], batch, preemption)
        rig = crowd(seed, choices, lanes=lanes)
        used["preempted"] += len(rig.recorder.of(events.Preempted))
        used["finished"] += sum(rig.finish(name) is FinishReason.LENGTH for name in rig.requests)
        beside += sum(one.lane != other.lane for one, other in itertools.pairwise(rig.plans))
    assert used["finished"] > 80
    assert used["preempted"] > 5
    assert beside > 150
    assert crowd(seed, choices, lanes=lanes).recorder.events == rig.recorder.events, "a replay took another course"


@pytest.mark.parametrize("control", CONTROLLERS)
@pytest.mark.parametrize("speculate", DRAFTERS)
def test_crowds_that_draft(speculate: str, control: str) -> None:
    drafted = 0
    for seed, ordering in ((2, "vtc"), (3, "fcfs"), (9, "markov")):  # lives in which somebody repeats himself
        choices = (ordering, anybody, "chunked", "last-arrived" if ordering == "fcfs" else "swap")
        rig = crowd(seed, choices, drafts=0, speculate=speculate, draft_control=control)
        drafted += rig.executor.drafted
        assert sum(rig.finish(name) is FinishReason.LENGTH for name in rig.requests) > 20
    assert (drafted > 0) == (speculate != "off")


@pytest.mark.parametrize("batch", [*BATCHES, newest_first], ids=lambda one: getattr(one, "__name__", one))
def test_crowds_whose_budget_follows(batch: Any) -> None:
    """Steps take four times the target whatever is in them, so that the budget falls to its floor."""
    sizes: list[int] = []
    for seed, (ordering, preemption) in enumerate(
        [("fcfs", "last-arrived"), ("priority", "priority"), ("vtc", "swap")]
    ):
        rig = crowd(seed, (ordering, anybody, batch, preemption), follows=True)
        sizes += [plan.tokens for plan in rig.plans]
        assert sum(rig.finish(name) is FinishReason.LENGTH for name in rig.requests) > 20
    assert crowd(seed, (ordering, anybody, batch, preemption), follows=True).recorder.events == rig.recorder.events
    assert max(sizes) > 16
