"""Fair shares: who gets what under floods, with weights, after absences and debts, and within the stated bounds."""

from __future__ import annotations

from collections import Counter

import pytest
from engine_rig import Rig, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core import events
from headrace.core.config import EngineSettings
from headrace.core.step import Decode, Run
from headrace.core.types import FinishReason, HeadraceError, Usage
from headrace.engine.policies.fairness import (
    OUTPUT_COST,
    QUANTUM,
    SAVED,
    DeficitRoundRobin,
    Tenants,
    TokenCounter,
    weights_of,
)


def arrive(policy: TokenCounter | DeficitRoundRobin, name: str, tenant: str, prompt: int = 100) -> None:
    request = make_request(name, range(prompt), 8, tenant=tenant)
    policy.observe(events.Arrived(0.0, name, prompt, 8, request))


def start(policy: TokenCounter | DeficitRoundRobin, name: str, cached: int = 0, again: bool = False) -> None:
    policy.observe(events.Admitted(0.0, name, cached, 0.0, again))


def end(policy: TokenCounter | DeficitRoundRobin, name: str) -> None:
    usage = Usage(1, 1, 0)
    policy.observe(events.Finished(0.0, name, FinishReason.STOP, usage, 0.0, None, None, 8))


def order(policy: TokenCounter | DeficitRoundRobin, *waiting: tuple[str, str]) -> list[str]:
    """Names of (name, tenant) by key, ties as given."""
    from policy_views import View

    policy.survey([], 0.0)
    keys = {name: policy(View(make_request(name, range(4), tenant=tenant)), 0.0) for name, tenant in waiting}
    return sorted(keys, key=keys.__getitem__)


def costs(rig: Rig, until_s: float) -> Counter[str]:
    """What each tenant was served, in tokens: prompts once plus twice what it drew."""
    served: Counter[str] = Counter()
    tenant = {name: request.tenant for name, request in rig.requests.items()}
    for event in rig.recorder.events:
        if event.at_s > until_s:
            break
        if isinstance(event, events.Admitted) and not event.again:
            served[tenant[event.request_id]] += rig.requests[event.request_id].prompt_tokens - event.cached_tokens
        elif isinstance(event, events.Decoded):
            for row in event.rows:
                served[tenant[row.request_id]] += OUTPUT_COST * event.run.steps
        elif isinstance(event, events.Drew):
            for name in event.request_ids:
                served[tenant[name]] += OUTPUT_COST
    return served


def flood(ordering: str, weights: str = "") -> tuple[Rig, Counter[str]]:
    """Tenant `a` sends twenty requests for each of `b`, who still has somebody waiting all the time."""
    rig = Rig(64, 16, ordering=ordering, max_running=4, tenant_weights=weights, max_queue_requests=10**6)
    for number in range(400):
        tenant = "b" if number < 80 and number % 2 else "a"
        rig.add(make_request(str(number), [number] * 9, 6, tenant=tenant))
    while any(rig.requests[name].tenant == "b" for name in rig.scheduler.live_ids()):
        rig.step()
    served = costs(rig, max(one.at_s for one in rig.recorder.of(events.Finished)))
    return rig, served


@pytest.mark.parametrize("ordering", ["vtc", "drr"])
def test_equal_tenants_get_equal_shares_whatever_they_send(ordering: str) -> None:
    _, served = flood(ordering)
    jain = sum(served.values()) ** 2 / (2 * sum(cost**2 for cost in served.values()))
    assert jain > 0.95
    _, unfair = flood("fcfs")
    assert unfair["a"] > unfair["b"]


@pytest.mark.parametrize(("ordering", "most"), [("vtc", 0.1), ("drr", 0.25)])
def test_weights_are_shares(ordering: str, most: float) -> None:
    _, served = flood(ordering, "a=3")
    assert served["a"] / served["b"] == pytest.approx(3.0, rel=most)


def test_vtc_keeps_its_bound_at_every_moment() -> None:
    """Theorem 4.4: two tenants with somebody waiting differ by at most 2 max(longest prompt, 2 * tokens in memory)."""
    rig, _ = flood("vtc")
    running = rig.scheduler.capacity.blocks * rig.scheduler.capacity.block_tokens
    last_b = max(one.at_s for one in rig.recorder.of(events.Admitted) if rig.requests[one.request_id].tenant == "b")
    gaps = [abs((now := costs(rig, at))["a"] - now["b"]) for at in range(2, int(last_b), 40)]
    assert max(gaps) <= 2 * max(9, OUTPUT_COST * running)
    assert max(gaps) <= 4 * (9 + 6 * OUTPUT_COST)  # four may run, so much better than the bound


def test_vtc_serves_the_least_served_and_looks_ahead() -> None:
    policy = TokenCounter(EngineSettings())
    for name, tenant in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")):
        arrive(policy, name, tenant)
    assert order(policy, ("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b")) == ["a1", "b1", "a2", "a3"]
    start(policy, "a1", cached=40)
    assert policy.counter("a") == 60
    policy.observe(events.Drew(0.0, ("a1",), (1,), ("a1",)))
    policy.observe(events.Decoded(0.0, (Decode("a1", 0),), (), 1, Run(9, 0.1)))
    assert policy.counter("a") == 80


def test_vtc_lifts_who_was_away_and_charges_no_recomputation() -> None:
    policy = TokenCounter(EngineSettings())
    arrive(policy, "a1", "a", 500)
    start(policy, "a1")
    policy.observe(events.Preempted(0.0, "a1", 500, "memory"))
    start(policy, "a1", again=True)
    assert policy.counter("a") == 500
    arrive(policy, "b1", "b")
    assert policy.counter("b") == 500  # the last one to leave the queue was served so much
    arrive(policy, "a2", "a")
    arrive(policy, "c1", "c")
    assert policy.counter("c") == 500  # the least of those who wait


def test_vtc_lets_a_tenant_save_a_little() -> None:
    """What is not asked for is kept up to SAVED, and what is asked for is taken from it."""
    policy = TokenCounter(EngineSettings())
    arrive(policy, "b1", "b")
    start(policy, "b1")
    end(policy, "b1")
    for number, size in enumerate((SAVED, SAVED, 10)):
        arrive(policy, f"a{number}", "a", size)
        start(policy, f"a{number}")
    arrive(policy, "a3", "a")
    arrive(policy, "b2", "b", 700)
    assert policy.counter("a") == 2 * SAVED + 110 and policy.counter("b") == SAVED + 110
    start(policy, "b2")
    arrive(policy, "b3", "b")
    assert policy.counter("b") == SAVED + 810  # it has a thousand and more left


def begun_together(ordering: str) -> tuple[float, int]:
    """Two tenants with prompts of many steps and somebody waiting all the time: Jain's index of what they were served,
    and how many prompts were under way at once at most."""
    rig = Rig(256, 8, ordering=ordering, max_queue_requests=10**6)
    for number in range(40):
        rig.add(make_request(str(number), [number] * 40, 4, tenant="ab"[number % 2]))
    computed: Counter[str] = Counter()
    most = 0
    for _ in range(100):
        rig.step()
        computed.update({work.request_id: work.tokens for work in rig.plans[-1].others})
        most = max(most, sum(tokens < 40 for tokens in computed.values()))
    served = costs(rig, rig.now)
    return sum(served.values()) ** 2 / (2 * sum(cost**2 for cost in served.values())), most


@pytest.mark.parametrize("ordering", ["vtc", "drr"])
def test_prompts_that_have_begun_are_not_overtaken_by_their_like(ordering: str) -> None:
    jain, most = begun_together(ordering)
    assert jain > 0.95 and most <= 3


def test_drr_takes_turns_by_quantum() -> None:
    policy = DeficitRoundRobin(EngineSettings(tenant_weights="b=2"))
    half = QUANTUM // 2
    names = [(f"{tenant}{number}", tenant) for number in range(4) for tenant in "ab"]
    for name, tenant in names:
        arrive(policy, name, tenant, half)
    assert order(policy, *names) == ["a0", "a1", "b0", "b1", "b2", "b3", "a2", "a3"]
    for name in ("a0", "a1", "b0"):
        start(policy, name)
    assert policy.credit("b") == 2 * QUANTUM - half
    assert order(policy, ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b"), ("b3", "b"))[:3] == ["b1", "b2", "b3"]


def test_drr_debts_last_and_savings_do_not() -> None:
    policy = DeficitRoundRobin(EngineSettings())
    arrive(policy, "a1", "a", 10)
    start(policy, "a1")
    assert policy.credit("a") == 0  # was in its turn with much to spare, and left
    policy.observe(events.Decoded(0.0, (Decode("a1", 0),), (), 1, Run(10 * QUANTUM, 0.1)))
    assert policy.credit("a") == -20 * QUANTUM
    end(policy, "a1")
    arrive(policy, "b1", "b", 10)
    arrive(policy, "a2", "a", 10)
    arrive(policy, "b2", "b", 10 * QUANTUM)
    assert order(policy, ("a2", "a"), ("b1", "b"), ("b2", "b")) == ["b1", "b2", "a2"]
    for name in ("b1", "b2", "a2"):
        start(policy, name)
    assert policy.credit("a") <= 0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 900)), min_size=2, max_size=14))
def test_drr_is_what_taking_turns_one_by_one_gives(sizes: list[tuple[str, int]]) -> None:
    """The order computed by counting turns is that of the algorithm as published, for requests that are all here."""
    policy = DeficitRoundRobin(EngineSettings())
    names = [(f"{number}", tenant) for number, (tenant, _) in enumerate(sizes)]
    for (name, tenant), (_, prompt) in zip(names, sizes, strict=True):
        arrive(policy, name, tenant, prompt)
    queues: dict[str, list[tuple[str, int]]] = {}
    for (name, tenant), (_, prompt) in zip(names, sizes, strict=True):
        queues.setdefault(tenant, []).append((name, prompt))
    deficit, expected = dict.fromkeys(queues, 0), []
    while any(queues.values()):
        for tenant, queue in queues.items():
            deficit[tenant] += QUANTUM if queue else 0
            while queue and queue[0][1] <= deficit[tenant]:
                name, cost = queue.pop(0)
                deficit[tenant] -= cost
                expected.append(name)
    assert order(policy, *names) == expected
    waiting = list(names)
    for name in expected:  # and it still is after each start
        assert order(policy, *waiting)[0] == name
        start(policy, name)
        waiting = [one for one in waiting if one[0] != name]


def test_weights_are_read_or_refused() -> None:
    assert weights_of(EngineSettings(tenant_weights="a=2, b=0.5,,c=d=3")) == {"a": 2.0, "b": 0.5, "c=d": 3.0}
    for text in ("a", "=2", "a=x", "a=0", "a=nan", "a=1e9"):
        with pytest.raises(HeadraceError, match="write name=weight"):
            weights_of(EngineSettings(tenant_weights=text))


def test_accounts_of_absent_tenants_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.engine.policies.fairness.REMEMBERED_TENANTS", 5)
    tenants = Tenants()
    tenants.live = {"here": 1}
    accounts = {"here": 0, **{str(number): number for number in range(20)}}
    tenants.forget(accounts, keep_highest=True)
    assert list(accounts) == ["here", "15", "16", "17", "18", "19"]
