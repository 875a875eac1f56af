"""A bounded sample of lives: evenly thinned, whatever the number and however replicas are merged."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.events import Finished
from headrace.core.types import FinishReason, Usage
from headrace.sim.lives import MOST_LIVES, Lives


def lived(count: int, first: int = 0) -> Lives:
    lives = Lives()
    for number in range(first, first + count):
        lives.add(
            Finished(number + 2.0, str(number), FinishReason.STOP, Usage(7, number, 0), number, number + 0.5, None, 9)
        )
    return lives


@settings(derandomize=True, deadline=None, max_examples=40)
@given(count=st.integers(0, 5000))
def test_every_so_many(count: int) -> None:
    lives = lived(count)
    assert lives.seen == count
    assert [life[0] for life in lives.kept] == list(range(0, count, lives.every))
    assert len(lives.kept) <= MOST_LIVES
    assert lives.every == 1 or len(lives.kept) >= MOST_LIVES // 2


@settings(derandomize=True, deadline=None, max_examples=40)
@given(ours=st.integers(0, 3000), theirs=st.integers(0, 3000))
def test_merged(ours: int, theirs: int) -> None:
    lives, other = lived(ours), lived(theirs, 10_000)
    lives.merge(other)
    assert lives.seen == ours + theirs
    assert len(lives.kept) <= MOST_LIVES
    assert {int(life[0]) for life in lives.kept} <= {*range(ours), *range(10_000, 10_000 + theirs)}
    assert abs(len(lives.kept) - lives.seen / lives.every) <= 4
