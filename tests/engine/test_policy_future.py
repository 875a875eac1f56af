"""Predicted memory: quantiles of past lengths, the peak of the future, and the four ways to predict."""

from __future__ import annotations

import itertools

import pytest
from engine_rig import Rig, make_request
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_views import View, pool

from headrace.core import events
from headrace.core.config import EngineSettings
from headrace.core.types import FinishReason, HeadraceError, Usage
from headrace.engine.policies.lengths import Lengths
from headrace.engine.policy import FuturePeak, PastFuture, aggressive, choose, conservative


def ended(tokens: int, reason: FinishReason = FinishReason.STOP) -> events.Finished:
    return events.Finished(0.0, "a", reason, Usage(1, tokens, 0), 0.0, None, None, 99)


def test_quantiles_of_what_is_left() -> None:
    lengths = Lengths(window=4)
    assert lengths.quantile(0.5, 0, 64) == 64  # nothing is known
    for tokens in (50, 10, 20, 30, 40):  # the first one falls out of the window
        lengths.observe(ended(tokens))
    lengths.observe(ended(1, FinishReason.ABORT))
    assert [lengths.quantile(share, 0, 64) for share in (0.0, 0.25, 0.5, 0.75, 0.875)] == [10, 20, 30, 40, 52]
    assert lengths.quantile(0.0, 20, 64) == 30  # given that it drew more than 20
    assert lengths.quantile(0.5, 40, 64) == 64  # longer than anything seen
    assert lengths.quantile(0.75, 0, 35) == 35  # never beyond its limit


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 8), st.integers(0, 30), st.floats(0, 0.999))
def test_the_window_holds_the_last_lengths_and_quantiles_lie_between(
    past: list[int], window: int, drawn: int, share: float
) -> None:
    lengths = Lengths(window)
    for tokens in past:
        lengths.observe(ended(tokens))
    beyond = sorted(tokens for tokens in past[-window:] if tokens > drawn)
    assert min([*beyond, 40]) <= lengths.quantile(share, drawn, 40) <= 40
    assert lengths.quantile(0.0, drawn, 40) == (beyond or [40])[0]


def running(known: int, left: int) -> View:
    """Holds its blocks of one token; `left` in its preemptions, for the predictor below."""
    return View(prompt_tokens=known, known_tokens=known, held_blocks=known, preemptions=left, running=True)


def peak_by_stepping(requests: list[tuple[int, int]]) -> int:
    """Tokens in memory, one step after the other, everybody growing by one until its end."""
    longest = max(left for _, left in requests)
    return max(sum(held + step for held, left in requests if left >= step) for step in range(longest + 1))


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 15)), min_size=1, max_size=7), st.integers(0, 200))
def test_the_peak_is_that_of_the_future(requests: list[tuple[int, int]], more: int) -> None:
    """M* = max over k of the sum of the k longest-lived plus k times what is left of the k-th, to the token."""
    total = sum(held for held, _ in requests) + more
    (held, left), *others = requests
    views = [running(*one) for one in others]
    free = total - sum(view.held_blocks for view in views)
    view = pool(total_blocks=total, free_blocks=free, block_tokens=1, running=views)
    admission = FuturePeak(lambda one: one.preemptions + 1, 0.0)  # type: ignore[attr-defined]
    assert admission(running(held, left), view) == (peak_by_stepping(requests) <= total)


def test_shared_blocks_count_once() -> None:
    """Two requests of ten blocks hold the same eight: twelve are in use, and there is room for eight more."""
    views = [running(10, 0), running(10, 0)]
    view = pool(total_blocks=20, free_blocks=8, block_tokens=1, running=views)
    admission = FuturePeak(lambda one: 0, 0.0)
    assert admission(View(known_tokens=8), view)
    assert not admission(View(known_tokens=9), view)
    assert admission(View(known_tokens=12, cached_blocks=4), view)


def test_neighbours_between_the_worst_and_the_best_case() -> None:
    """Forty tokens of memory, two that came ten tokens far of at most thirty."""
    views = [View(prompt_tokens=5, known_tokens=10, limit_tokens=30, held_blocks=10, running=True) for _ in range(2)]
    view = pool(total_blocks=40, free_blocks=20, block_tokens=1, running=views)
    newcomer = View(prompt_tokens=5, known_tokens=5, limit_tokens=30)
    assert not conservative(newcomer, view)
    assert aggressive(newcomer, view)
    learnt = PastFuture(EngineSettings())
    assert not learnt(newcomer, view)
    for _ in range(200):
        learnt.observe(ended(8))
    assert learnt(newcomer, view)
    assert not aggressive(View(known_tokens=20), view)


def test_the_oracle_is_for_those_who_know() -> None:
    asked = EngineSettings(admission="oracle")
    with pytest.raises(HeadraceError, match="admission 'oracle' is unknown"):
        choose(asked)
    admission = choose(asked, {"short": 2, "long": 90}).admission
    view = pool(total_blocks=40, free_blocks=40, block_tokens=1)
    for name, fits in (("short", True), ("long", False)):
        assert admission(View(make_request(name, range(4)), prompt_tokens=4, known_tokens=4), view) is fits


def test_draws_differ_within_a_batch_and_agree_between_replays() -> None:
    """Two that learnt the same say the same, question by question, and not always yes or always no."""
    answers = []
    for _ in range(2):
        policy = PastFuture(EngineSettings())
        for tokens in itertools.islice(itertools.cycle(range(2, 60, 3)), 300):
            policy.observe(ended(tokens))
        others = [View(known_tokens=12, limit_tokens=80, held_blocks=12, running=True) for _ in range(5)]
        view = pool(total_blocks=190, free_blocks=130, block_tokens=1, running=others)
        answers.append([policy(View(limit_tokens=80), view) for _ in range(40)])
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == 2


def test_past_future_learns_within_a_scheduler() -> None:
    """Answers stop after four tokens where sixty are allowed: once it has seen that, more run side by side."""
    most = []
    for admission in ("conservative", "past-future"):
        rig = Rig(40, 64, admission=admission, context=80)
        for number in range(60):
            prompt = [number, number // 2, number // 3]
            rig.add(make_request(str(number), prompt, 60, stop_token_ids=frozenset(range(0, 50, 3))))
        rig.drain()
        most.append(max(event.running for event in rig.recorder.of(events.Planned)))
    assert most[1] > most[0] + 2
