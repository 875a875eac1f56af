"""The prefix index: runs of keys, one name per block, one block per name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.prefix import PrefixIndex


def test_match_is_the_longest_run_within_the_range() -> None:
    index = PrefixIndex()
    for key in (10, 11, 12, 14):
        index.insert(key, key % 10)
    keys = (10, 11, 12, 13, 14)
    assert index.match(keys, 0, 5) == [0, 1, 2]
    assert index.match(keys, 1, 2) == [1]
    assert index.match(keys, 4, 9) == [4]
    assert index.match(keys, 3, 5) == []
    assert index.match((), 0, 5) == []


def test_the_first_block_keeps_the_name() -> None:
    index = PrefixIndex()
    assert index.insert(5, 1)
    assert not index.insert(5, 2)
    assert index.find(5) == 1
    assert not index.holds(2)


def test_a_block_has_one_name() -> None:
    index = PrefixIndex()
    index.insert(5, 1)
    with pytest.raises(AssertionError):
        index.insert(6, 1)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 5)), max_size=40))
def test_both_directions_agree(calls: list[tuple[bool, int, int]]) -> None:
    index = PrefixIndex()
    model: dict[int, int] = {}
    for insert, key, block in calls:
        if not insert:
            index.forget(block)
            model = {k: b for k, b in model.items() if b != block}
        elif not index.holds(block):
            assert index.insert(key, block) == (key not in model)
            model.setdefault(key, block)
        index.check()
        assert {key: index.find(key) for key in range(6)} == {key: model.get(key) for key in range(6)}
