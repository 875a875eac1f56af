"""What is drafted and how much of it: lookups against a search that looks at everything, and lengths by goodput."""

from __future__ import annotations

import random
from typing import Any

import pytest
from engine_rig import Rig, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import View

from headrace.core.config import EngineSettings
from headrace.core.events import StepDone, Verified
from headrace.core.step import Run
from headrace.core.types import FinishReason, HeadraceError
from headrace.engine.policies import lookup
from headrace.engine.policies.estimates import Chances, StepTime
from headrace.engine.policies.joints import Draft, DraftView
from headrace.engine.policies.lookup import LONGEST, PLACES, SHORTEST, Suffixes
from headrace.engine.policy import Goodput, Lookup, choose

# -- lookups -----------------------------------------------------------------------------------------------------------


def looked_up(ids: list[int]) -> tuple[int, int]:
    """The same from the definition, at the price of looking everywhere."""
    places = [at for at in range(1, len(ids) - 1) if ids[at - 1 : at + 1] == ids[-2:]][::-1][:PLACES]
    best = (-1, 0)
    for at in places:
        agree = SHORTEST
        while agree <= at and agree < min(LONGEST, len(ids) - 1) and ids[at - agree] == ids[-1 - agree]:
            agree += 1
        best = (at, agree) if agree > best[1] else best
    return best


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ids=st.lists(st.integers(0, 2), max_size=80), cuts=st.lists(st.integers(1, 9), min_size=1))
def test_the_longest_ending_is_found(ids: list[int], cuts: list[int]) -> None:
    text, at = Suffixes(), 0
    while at < len(ids):
        step = cuts[at % len(cuts)]
        text.extend(ids[at : at + step])
        at += step
        known = ids[:at]
        found, agree = looked_up(known)
        assert text.find() == (found, agree)
        if agree:
            draft = text.after(found, 12)
            assert len(draft) == 12
            whole = [*known, *draft]  # goes on as it went on there, be it into the draft itself
            assert all(whole[len(known) + j] == whole[found + 1 + j] for j in range(12))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "WINDOW", 50)
    text, rng = Suffixes(), random.Random(1)
    for _ in range(100):
        text.extend([rng.randrange(9) for _ in range(7)])
        assert len(text.ids) <= 107
        assert text.find() == looked_up(text.ids)


def view(prompt: list[int], output: list[int], name: str = "a") -> Any:
    """A request that decodes, as a policy sees it."""
    rig = Rig(blocks=400, context=1600, budget=2000)
    rig.add(make_request(name, prompt, 100))
    rig.step()
    progress = rig.scheduler._lines.live[name]
    progress.output_ids[:] = output
    for _ in output[1:]:
        rig.scheduler._lines.decoding.skip(progress, 1)
    return progress


def test_a_request_is_looked_up_in_its_own_text() -> None:
    drafter = Lookup(EngineSettings())
    assert drafter(view([1, 2, 3, 4, 5, 9, 1, 2], [3]), 4) == Draft((4, 5, 9, 1), 3)
    assert drafter(view([1, 2, 3, 4, 5, 9, 1], [7], "b"), 4) is None


def test_a_long_prompt_is_indexed_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "AT_ONCE", 300)
    drafter, request = Lookup(EngineSettings()), view([*range(500)] * 2, [0, 1, 2])
    assert [drafter(request, 2) is not None for _ in range(5)] == [False, False, False, True, True]
    assert drafter(request, 2) == Draft((3, 4), LONGEST)


# -- goodput -----------------------------------------------------------------------------------------------------------


def test_a_step_is_priced_from_steps() -> None:
    time, rng = StepTime(), random.Random(2)
    for _ in range(400):
        tokens, context, drafts = rng.randint(1, 60), rng.randint(0, 20000), rng.random() < 0.5
        time.learn(
            tokens, context, drafts, (5e-3 + 2e-4 * tokens + 1e-7 * context + 1e-3 * drafts) * rng.gauss(1, 0.02)
        )
    assert time.seconds(30, 10000, False) == pytest.approx(12e-3, rel=0.05)
    assert time.seconds(50, 10000, True) == pytest.approx(17e-3, rel=0.05)
    assert time.seconds_per_token(5000) == pytest.approx(7e-4, rel=0.3)


def test_what_held_a_step_up_is_not_learnt() -> None:
    time = StepTime()
    for at in range(300):
        time.learn(1 + at % 8, 100, False, 1.0 if at % 50 == 49 else 5e-3 + 1e-4 * (at % 8))
    assert time.seconds(4, 100, False) == pytest.approx(5.3e-3, rel=0.1)


def test_no_price_is_negative() -> None:
    time = StepTime()
    for at in range(200):
        time.learn(1 + at % 9, 1000 + at, at % 9 > 0, 5e-3)  # flat: memory bounds it
    assert time.seconds_per_token(1000) > 0
    assert time.drafting_s >= 0
    assert time.seconds(9, 1200, True) == pytest.approx(5e-3, rel=0.05)


def test_chances_follow_what_was_accepted() -> None:
    chances = Chances()
    for at in range(200):
        chances.expect("a", 2)
        chances.learn("a", 4, 4)
        chances.expect(f"b{at}", 8)
        chances.learn(f"b{at}", 4, 0)
    assert chances.of("c", 2, 3)[-1] > 0.8
    assert chances.of("c", 8, 3)[0] < 0.1
    assert chances.of("c", 2, 4) == sorted(chances.of("c", 2, 4), reverse=True)


def test_what_did_not_pay_is_tried_again() -> None:
    chances = Chances()
    for _ in range(100):
        for evidence in range(40):
            chances.expect("a", evidence)
            chances.learn("a", 1, 0)
    assert chances.best < 0.1
    for _ in range(5000):
        chances.fade()
    assert chances.best > 0.5


def decoding(name: str) -> View:
    return View(make_request(name, range(50), 100), 50, known_tokens=60, computed_tokens=59, limit_tokens=150)


def decided(rows: int, token_s: float) -> int:
    """How many drafts a replica verifies that has seen 200 steps with drafts of which two in three were right."""
    controller, rng = Goodput(EngineSettings(draft_tokens=8)), random.Random(rows)
    some = [decoding(f"r{at}") for at in range(rows)]
    drafted = 0
    for step in range(300):
        drafts = controller(DraftView(some, 60 * rows, 1000, False), lambda request, most: Draft((1,) * most, 5))
        drafted = sum(len(ids) for _, ids in drafts)
        seconds = 5e-3 + token_s * (rows + drafted)
        controller.observe(StepDone(0.0, step, seconds, rows + drafted, Run(1, seconds), 1, 1.0))
        names, lengths = tuple(one.request.id for one, _ in drafts), tuple(len(ids) for _, ids in drafts)
        right = tuple(next((at for at in range(n) if rng.random() > 2 / 3), n) for n in lengths)
        controller.observe(Verified(0.0, names, lengths, right))
        if step % 10 == 0:  # somebody else comes and goes, so that what a token costs can be seen
            some = some[:-1] if len(some) == rows > 1 else [*some[: rows - 1], decoding("x")]
    return drafted


def test_drafts_become_fewer_as_they_cost_more() -> None:
    by_price = [decided(4, token_s) / 4 for token_s in (1e-5, 5e-4, 5e-3, 1e-1)]
    assert by_price[0] > by_price[1] > 0
    assert by_price[3] == 0
    assert by_price == sorted(by_price, reverse=True)


def test_under_load_nobody_drafts() -> None:
    assert decided(1, 5e-4) > 2
    assert decided(200, 5e-4) == 0


@pytest.mark.parametrize("tokens", [0, -1, 257])
def test_bounds_of_the_length(tokens: int) -> None:
    with pytest.raises(HeadraceError, match="draft_tokens"):
        choose(EngineSettings(speculate="lookup", draft_tokens=tokens))


# -- in a step ---------------------------------------------------------------------------------------------------------


def test_tokens_behind_a_stop_token_are_nobodys() -> None:
    whole = Rig()
    whole.add(make_request("a", [1, 2, 3], 20))
    whole.drain()
    stop = whole.tokens("a")[9]
    rig = Rig(drafts=16, drafter=lambda request, most: Draft(tuple(whole.tokens("a")[1:]), 1))
    rig.add(make_request("a", [1, 2, 3], 20, stop_token_ids=frozenset([stop])))
    rig.drain()
    assert rig.finish("a") is FinishReason.STOP
    assert rig.tokens("a") == whole.tokens("a")[: whole.tokens("a").index(stop) + 1]
    assert len(rig.plans) == 3  # the prompt, everything else, and the release


def test_length_is_never_exceeded_and_steps_are_saved() -> None:
    whole = Rig()
    whole.add(make_request("a", [1, 2, 3], 20))
    whole.drain()

    def all_of_it(request: Any, most: int) -> Draft:
        return Draft((*whole.tokens("a")[request.known_tokens - 3 :], 0, 0, 0), 1)

    rig = Rig(drafts=7, drafter=all_of_it)
    rig.add(make_request("a", [1, 2, 3], 20))
    rig.drain()
    assert rig.tokens("a") == whole.tokens("a")
    assert len(rig.plans) < len(whole.plans)
    assert sum(sum(event.accepted) for event in rig.recorder.of(Verified)) == 19 - (len(rig.plans) - 2)


def test_drafts_never_take_what_others_need() -> None:
    """Nobody yields for a draft: in a pool that is just large enough, drafts are cut to the blocks that are left."""
    rig = Rig(blocks=10, drafts=12)
    for name in "ab":
        rig.add(make_request(name, [ord(name)] * 4, 16))
    rig.drain()
    assert rig.executor.drafted
    assert all(plan.work for plan in rig.plans[:-1])
    assert not [event for event in rig.recorder.events if type(event).__name__ == "Preempted"]
