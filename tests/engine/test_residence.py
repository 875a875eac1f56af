"""Which models are in memory: the ledger under any order of facts, and how long a request can wait."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.residence import Admit, Decision, Drop, Load, Refuse, Residence, Sizes, State, Terms, Unload


def sizes(weights: int = 100, activations: int = 10, least: int = 20, wanted: int = 80) -> Sizes:
    return Sizes(weights, activations, least, wanted)


def residence(budget: float, patience_s: float = 0.0, keep_kv: bool = True, **models: Terms) -> Residence:
    return Residence(models, budget, patience_s, keep_kv)


def loaded(one: Residence, name: str, now: float = 0.0) -> Load:
    """Bring a model in with a request that leaves at once."""
    ticket = one.enter(name, now)
    assert ticket is not None
    decision = one.decide(now)
    assert isinstance(decision, Load) and decision.name == name
    one.loaded(name, one._models[name].sizes, decision.kv_bytes, now)
    assert one.decide(now) == Admit(name, (ticket,))
    one.leave(name, now)
    return decision


def test_what_is_there_takes_requests_at_once() -> None:
    one = residence(1000, a=Terms(sizes()))
    assert loaded(one, "a").kv_bytes == 80
    assert one.enter("a", 1.0) is None
    assert one.used == 190 and one.in_flight("a") == 1


def test_the_least_recently_used_goes_and_its_kv_is_kept() -> None:
    one = residence(380, **{name: Terms(sizes()) for name in "abc"})
    for at, name in enumerate("ab"):
        assert loaded(one, name, at).kv_bytes == 53  # what two models leave, for three
    one.enter("c", 2.0)
    assert one.decide(2.0) == Unload("a", True)
    assert one.decide(2.0) is None, "one move at a time"
    one.unloaded("a", 30)
    assert one.decide(2.0) == Load("c", 53)
    assert one.kept("a") == 30 and one.used == 30 + 163 + 163
    one.check()


def test_a_process_a_little_larger_than_last_time_takes_no_kept_kv() -> None:
    """All that is left is divided as KV, but for this."""
    some = Sizes(weights=100, activations=10, kv_least=20, kv_wanted=400, process=80)
    one = residence(600, **{name: Terms(some) for name in "abc"})
    loaded(one, "a")
    kv = loaded(one, "b", 1.0).kv_bytes
    one.enter("c", 2.0)
    assert one.decide(2.0) == Unload("a", True)
    one.unloaded("a", kv)
    decision = one.decide(2.0)
    assert isinstance(decision, Load)
    larger = replace(some, process=some.process + some.spare)
    assert one.excess("c", larger, decision.kv_bytes) is None
    one.loaded("c", larger, decision.kv_bytes, 3.0)
    assert one.excess("c", replace(larger, process=larger.process + 2 * some.spare + 3), decision.kv_bytes)
    assert one.kept("a") == kv
    one.check()


def test_kept_kv_goes_before_a_model_does() -> None:
    one = residence(420, a=Terms(sizes()), b=Terms(sizes()), c=Terms(sizes(weights=150)))
    loaded(one, "a")
    one.keep("a", 0, 1.0)
    assert one.decide(1.0) == Unload("a", True)
    one.unloaded("a", 60)
    loaded(one, "b", 2.0)
    one.enter("c", 3.0)
    assert one.decide(3.0) == Drop("a")
    assert isinstance(one.decide(3.0), Load)


def test_kv_that_was_kept_comes_back_at_its_size() -> None:
    one = residence(1000, a=Terms(sizes()))
    loaded(one, "a")
    one.keep("a", 0, 1.0)
    assert one.decide(1.0) == Unload("a", True)
    one.unloaded("a", 7)
    assert loaded(one, "a", 2.0).kv_bytes == 80 and one.kept("a") == 0


def test_a_busy_model_yields_at_once_or_when_patience_ends() -> None:
    for patience_s in (0.0, 5.0):
        one = residence(250, patience_s, a=Terms(sizes()), b=Terms(sizes()))
        loaded(one, "a")
        assert one.enter("a", 1.0) is None
        one.enter("b", 2.0)
        assert one.decide(2.0) is None
        assert one.yielding("a") == (patience_s == 0)
        if patience_s:
            assert one.enter("a", 3.0) is None, "it still takes requests"
            one.leave("a", 3.0)
            assert one.wake_s(3.0) == 7.0 and one.decide(7.0) is None and one.yielding("a")
        assert one.enter("a", 8.0) is not None
        one.leave("a", 9.0)
        assert one.decide(9.0) == Unload("a", True)
        one.check()


def test_who_yielded_goes_on_when_nobody_waits_any_more() -> None:
    one = residence(250, a=Terms(sizes()), b=Terms(sizes()))
    loaded(one, "a")
    one.enter("a", 1.0)
    ticket, later = one.enter("b", 2.0), None
    assert one.decide(2.0) is None
    later = one.enter("a", 3.0)
    assert ticket is not None and later is not None
    one.withdraw("b", ticket)
    assert one.decide(3.0) == Admit("a", (later,))


def test_no_model_goes_in_vain() -> None:
    one = residence(500, small=Terms(sizes(10, 0, 10, 10)), large=Terms(sizes(300)), new=Terms(sizes(250)))
    loaded(one, "small", 0.0)
    loaded(one, "large", 1.0)
    one.enter("new", 2.0)
    assert one.decide(2.0) == Unload("large", True), "the small one was used less recently, and is not enough"


def test_what_can_never_fit_is_refused_with_numbers_and_nobody_goes() -> None:
    one = residence(250, a=Terms(sizes(), pinned=True), b=Terms(sizes()))
    loaded(one, "a")
    ticket = one.enter("b", 1.0)
    decision = one.decide(1.0)
    assert isinstance(decision, Refuse) and decision.tickets == (ticket,)
    assert "b needs 130 B (100 B of weights, 10 B of activations, 20 B of KV for one request)" in decision.error
    assert one.state("a") is State.READY and one.decide(1.0) is None


def test_a_model_that_proves_larger_never_exceeds_the_budget() -> None:
    one = residence(320, a=Terms(sizes()), b=Terms(sizes()))
    loaded(one, "a")
    ticket = one.enter("b", 1.0)
    decision = one.decide(1.0)
    assert isinstance(decision, Load)
    measured = sizes(weights=170)
    error = one.excess("b", measured, decision.kv_bytes)
    assert error and "b takes 180 B without KV, where 110 B were expected" in error and "320 B" in error
    one.misjudged("b", measured)
    assert one.decide(2.0) == Unload("a", True), "who waits for it goes on waiting"
    one.unloaded("a", 0)
    again = one.decide(2.0)
    assert isinstance(again, Load) and one.excess("b", measured, again.kv_bytes) is None
    one.loaded("b", measured, again.kv_bytes, 3.0)
    assert one.decide(3.0) == Admit("b", (ticket,))
    one.check()


def test_a_model_that_proves_too_large_is_refused_when_that_is_known() -> None:
    one = residence(160, a=Terms(sizes()))
    ticket = one.enter("a", 1.0)
    assert ticket is not None and one.decide(1.0) == Load("a", 50)
    one.misjudged("a", sizes(weights=150))
    refusal = one.decide(1.0)
    assert isinstance(refusal, Refuse) and refusal.tickets == (ticket,) and "a needs 180 B" in refusal.error


def test_a_load_that_fails_ends_those_who_wait_and_the_next_one_tries_again() -> None:
    one = residence(320, a=Terms(sizes()))
    tickets = one.enter("a", 1.0), one.enter("a", 1.5)
    assert isinstance(one.decide(1.5), Load)
    assert one.load_failed("a") == tickets and one.decide(2.0) is None
    one.enter("a", 3.0)
    assert isinstance(one.decide(3.0), Load)
    one.check()


def test_idle_models_go_by_the_clock_and_pinned_ones_never() -> None:
    one = residence(1000, a=Terms(sizes(), keep_alive_s=10), b=Terms(sizes(), keep_alive_s=10, pinned=True))
    loaded(one, "a", 0.0)
    loaded(one, "b", 0.0)
    assert one.wake_s(0.0) == 10 and one.decide(9.9) is None
    one.keep("a", 60, 5.0)
    assert one.decide(10.0) is None and one.leaves_s("a") == 65
    assert one.decide(65.0) == Unload("a", True)
    one.unloaded("a", 0)
    one.keep("b", 0, 66.0)
    assert one.decide(1e9) is None


def test_a_dismissed_model_finishes_first_and_a_broken_one_is_not_trusted() -> None:
    one = residence(1000, a=Terms(sizes()))
    loaded(one, "a")
    one.enter("a", 1.0)
    one.keep("a", 0, 1.0)
    assert one.decide(1.0) is None
    one.leave("a", 2.0)
    assert one.decide(2.0) == Unload("a", True)
    one.unloaded("a", 0)
    loaded(one, "a", 3.0)
    one.broke("a")
    ticket = one.enter("a", 4.0)
    assert ticket is not None and one.decide(4.0) == Unload("a", False)
    one.unloaded("a", 0)
    assert isinstance(one.decide(4.0), Load)


@given(st.lists(st.tuples(*[st.integers(1, 100)] * 3), min_size=1, max_size=5), st.integers(50, 500))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_shares_fit_beside_the_largest_models_that_fit(shapes: list[tuple[int, int, int]], budget: int) -> None:
    models = {str(at): Terms(Sizes(w, 0, least, least + more)) for at, (w, least, more) in enumerate(shapes)}
    one = Residence(models, budget)
    shares = {name: one.share(name) for name in models}
    for name, terms in models.items():
        assert terms.sizes.kv_least <= shares[name] <= terms.sizes.kv_wanted
    largest = max(terms.sizes.fixed for terms in models.values())
    if sum(shares.values()) > sum(terms.sizes.kv_least for terms in models.values()) + 1e-6:
        above = sum(share for name, share in shares.items() if share > models[name].sizes.kv_least)
        assert largest + above <= budget + 1e-6


@dataclass
class World:
    """Performs decisions in virtual time, each load and unload taking a while, and measures how long requests wait."""

    one: Residence
    load_s: float
    unload_s: float
    answer_s: Callable[[], float]
    fails: Callable[[], bool] = lambda: False
    now: float = 0.0
    waits: list[float] = field(default_factory=list)
    came: dict[int, float] = field(default_factory=dict)
    refused: int = 0
    loads: int = 0
    _due: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (when, next(self._order), what))

    def arrive(self, name: str) -> None:
        ticket = self.one.enter(name, self.now)
        if ticket is None:
            self._serve(name, 0.0)
        else:
            self.came[ticket] = self.now

    def run(self) -> None:
        while True:
            while (decision := self.one.decide(self.now)) is not None:
                self._do(decision)
                self.one.check()
            wake = min(self.one.wake_s(self.now), self._due[0][0] if self._due else math.inf)
            if wake == math.inf:
                return
            self.now = wake
            while self._due and self._due[0][0] <= self.now:
                heapq.heappop(self._due)[2]()
                self.one.check()

    def _do(self, decision: Decision) -> None:
        match decision:
            case Load(name, kv):
                self.loads += 1
                self.at(self.now + self.load_s, lambda: self._loaded(name, kv))
            case Unload(name, keep):
                kept = self.one._models[name].kv // 2 if keep else 0
                self.at(self.now + self.unload_s, lambda: self.one.unloaded(name, kept))
            case Admit(name, tickets):
                for ticket in tickets:
                    self._serve(name, self.now - self.came.pop(ticket))
            case Refuse(_, tickets, _):
                self._refuse(tickets)

    def _loaded(self, name: str, kv: int) -> None:
        if self.fails():
            self._refuse(self.one.load_failed(name))
        else:
            self.one.loaded(name, self.one._models[name].sizes, kv, self.now)

    def _refuse(self, tickets: tuple[int, ...]) -> None:
        self.refused += len(tickets)
        for ticket in tickets:
            del self.came[ticket]

    def _serve(self, name: str, waited: float) -> None:
        self.waits.append(waited)
        self.at(self.now + self.answer_s(), lambda: self.one.leave(name, self.now))


ARRIVALS = st.lists(st.tuples(st.floats(0, 40), st.integers(0, 3)), min_size=1, max_size=40)


@pytest.mark.parametrize("patience_s", [0.0, 3.0])
@given(ARRIVALS, st.integers(130, 700), st.randoms(use_true_random=False))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_nobody_waits_longer_than_promised(
    patience_s: float, arrivals: list[tuple[float, int]], budget: int, random: Random
) -> None:
    models = {str(at): Terms(sizes(weights=100 + 10 * at)) for at in range(4)}
    world = World(Residence(models, budget, patience_s), 2.0, 1.0, lambda: random.uniform(0, 4))
    for when, model in arrivals:
        world.at(when, lambda model=model: world.arrive(str(model)))
    world.run()
    assert not world.came, "somebody waits for ever"
    assert len(world.waits) + world.refused == len(arrivals)
    assert max(world.waits, default=0) <= patience_s + len(models) * (4 + 1 + 2) + 1e-9


@given(ARRIVALS, st.integers(100, 700), st.randoms(use_true_random=False))
@settings(derandomize=True, max_examples=60, deadline=None)
def test_the_ledger_holds_whatever_fails_or_leaves(arrivals, budget, random) -> None:
    models = {str(at): Terms(sizes(weights=60 + 40 * at), 3.0 if at % 2 else math.inf) for at in range(4)}
    one = Residence(models, budget)
    world = World(one, 2.0, 1.0, lambda: random.uniform(0, 4), lambda: random.random() < 0.3)

    def leave_early() -> None:
        if world.came:
            ticket = random.choice(sorted(world.came))
            del world.came[ticket]
            for name in models:
                one.withdraw(name, ticket)

    for when, model in arrivals:
        world.at(when, lambda model=model: world.arrive(str(model)))
        if random.random() < 0.3:
            world.at(when + random.uniform(0, 3), leave_early)
        if random.random() < 0.2:
            world.at(when, lambda model=model: one.keep(str(model), random.choice([0, 1, math.inf]), world.now))
    world.run()
    assert not world.came and not any(one.in_flight(name) for name in models)


def test_fewer_swaps_with_patience() -> None:
    """Two models that do not fit side by side and are asked in turn."""
    swaps = []
    for patience_s in (0.0, 8.0):
        world = World(residence(250, patience_s, a=Terms(sizes()), b=Terms(sizes())), 2.0, 1.0, lambda: 1.0)
        for at in range(120):
            world.at(at / 2, partial(world.arrive, "ab"[at % 2]))
        world.run()
        assert len(world.waits) == 120
        swaps.append(world.loads)
    assert swaps[1] < swaps[0]
